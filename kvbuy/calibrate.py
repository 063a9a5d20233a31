"""Calibration: a model's pack, fitted to the KV that the model makes of texts.

It runs the model and finds out how its keys turn. The arithmetic is `kvbuy.codec.fit`'s.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvbuy
from kvbuy.cache import block_arrays, empty_cache
from kvbuy.codec.dense import DenseCoder
from kvbuy.codec.fast import encode_tensors
from kvbuy.codec.fit import Fit, Reals, Rotation, Sample, read_numbers
from kvbuy.codec.load import refuse_without_numba
from kvbuy.codec.pack import Pack, PackFacts, PackLayer, add_pack, make_pack
from kvbuy.docstrings import calibration_texts
from kvbuy.document import encode_text
from kvbuy.errors import DocumentError, UsageError
from kvbuy.manifest import FullLayer, as_label
from kvbuy.models import Model
from kvbuy.prefill import BLOCK_SIZE, prefill

SAMPLE_TOKENS = 1024
SAMPLES = 64  # of the default text
FEWEST = 6
SAME = 0.99  # of values that repeat where no context is seen: rounding may differ by a block's shape
LAYERS = "fitting layers"
HELD_BACK = 8  # every eighth sample sets scales instead of weights; at most eight are kept in memory for that
DEPTH = 2  # layers below: each makes the pack as much larger as the layer's own part

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A pack just made, and what it is worth on a text it has not seen.

    `ratio` and `fast_ratio` are those of dense and fast; `token_bytes` what a token's keys and values take raw.
    """

    pack: Pack
    path: Path
    ratio: float
    fast_ratio: float
    token_bytes: int
    seconds: float

    @property
    def pays_after(self) -> int | None:
        """Cached tokens that save as many bytes, against fast, as the pack has; None where they save none."""
        saved = (self.fast_ratio - self.ratio) * self.token_bytes
        return math.ceil(self.pack.size / saved) if saved > 0 else None


def fit_pack(model: Model, texts: Sequence[str] = (), *, progress: Progress = lambda _, __, ___: None) -> Fitted:
    """Fit a model's pack to texts, to those of `kvbuy.docstrings` where none are given, and put it into the store.

    `progress` is told what is being done, how much of it, and how much there is: tokens, then layers.

    Raises:
        UsageError: the extra `dense` is not installed, or the model has no layers that dense could predict.
        DocumentError: the texts are too short, or there is no default text.
        StoreError: the store cannot be written.
    """
    refuse_without_numba()
    layers = pack_layers(model)
    started = time.perf_counter()
    runs = cut_samples(model, texts or calibration_texts())
    runs = runs if texts else runs[:SAMPLES]
    *runs, last = runs
    held = range(HELD_BACK - 1, SAMPLES, HELD_BACK) if len(runs) >= HELD_BACK else [len(runs) - 1]
    done, total = 0, sum(map(len, runs)) + len(last)

    def take(token_ids: tuple[int, ...]) -> Sample:
        nonlocal done
        sample = sample_kv(model, token_ids)
        done += len(token_ids)
        progress("calibration", done, total)
        return sample

    first = take(runs[0])
    angles, rotations = find_rotations(model, layers, first)
    alone = isinstance(model.layers[0], FullLayer) and depends_on_tokens_alone(first)
    facts = _facts(model, layers, frequencies=len(angles), alone=alone, tokens=total - len(last))
    fit = Fit(facts, angles=angles, rotations=rotations)
    fit.observe(first)
    kept = []
    for at, token_ids in enumerate(runs[1:], start=1):
        if at in held:
            kept.append(take(token_ids))
        else:
            fit.observe(take(token_ids))
    pack, raw = make_pack(facts, fit.finish(kept, progress=partial(progress, LAYERS)))
    ratio, fast_ratio, token_bytes = _try_out(pack, take(last))
    return Fitted(pack, add_pack(pack, raw), ratio, fast_ratio, token_bytes, time.perf_counter() - started)


def cut_samples(model: Model, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Texts as token ids, one after the other, cut into samples that begin as the model's documents do.

    Raises:
        DocumentError: there are too few tokens.
    """
    stream = [token for text in texts for token in encode_text(model.tokenizer, text)]
    opening = _opening(model.tokenizer)
    length = min(SAMPLE_TOKENS, model.context) - len(opening)
    samples = [opening + tuple(stream[at : at + length]) for at in range(0, len(stream) - length + 1, length)]
    if len(samples) < FEWEST:
        raise DocumentError(
            f"{len(stream)} tokens of calibration text are too few: a pack needs {FEWEST * length} at the least",
            hint=f"name more text (--text A --text B); {SAMPLES * SAMPLE_TOKENS} tokens are plenty",
        )
    return samples


@torch.no_grad()
def sample_kv(model: Model, token_ids: tuple[int, ...]) -> Sample:
    """Run a sample through the model."""
    cache = empty_cache(model.model.config, capacity=len(token_ids))
    prefill(model, token_ids, cache, block_size=BLOCK_SIZE)
    return Sample(token_ids, block_arrays(cache, 0, len(token_ids)))


def depends_on_tokens_alone(sample: Sample) -> bool:
    """Whether the first layer's values of a token are the same wherever it stands, bit for bit (nearly always)."""
    values = sample.tensors[1].transpose(1, 0, 2).reshape(len(sample.token_ids), -1)
    _, first, kind = np.unique(sample.token_ids, return_index=True, return_inverse=True)
    return bool((values == values[first[kind]]).mean() > SAME)


def find_rotations(
    model: Model, layers: Sequence[PackLayer], sample: Sample
) -> tuple[Reals, list[tuple[Rotation, Rotation]]]:
    """How each layer's keys and values turn, by trying: radians a token of all frequencies in use, and the rotations.

    Turned back rightly, the keys of a token that occurs again and again come closest together. Tried are the model's
    own frequencies, on pairs of halves or of neighbours, at a head's beginning or end, and no rotation at all. (Values
    turn where attention is latent: they are the keys' rotary part there.)
    """
    tables = _frequency_tables(model)
    angles = np.concatenate([np.empty(0), *tables])
    starts = np.cumsum([0] + [len(table) for table in tables])
    found = []
    for bits in sample.tensors[: 2 * len(layers)]:
        tried = [STILL]
        for table, start in zip(tables, starts, strict=False):
            tried += [Rotation(planes, start + np.arange(len(table))) for planes in _planes(len(table), bits.shape[2])]
        numbers = read_numbers(bits, model.fingerprint.dtype)
        found.append(min(tried, key=lambda one: _disagreement(numbers, sample.token_ids, one, angles)))
    used = np.unique(np.concatenate([one.frequency for one in found]))
    numbered = [Rotation(one.planes, np.searchsorted(used, one.frequency)) for one in found]
    return angles[used], list(zip(numbered[::2], numbered[1::2], strict=True))


STILL = Rotation(np.empty((0, 2), np.int64), np.empty(0, np.int64))


def _frequency_tables(model: Model) -> list[Reals]:
    """The model's rotary frequencies, radians a token, each table once."""
    tables: dict[bytes, Reals] = {}
    for name, buffer in model.model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            table = buffer.double().cpu().numpy().ravel()
            tables[table.tobytes()] = table
    return list(tables.values())


def _planes(count: int, dim: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """The layouts of `count` planes that a head may have, [planes, 2] channels each."""
    if 2 * count > dim:
        return []
    at = np.arange(count)
    layouts = [np.stack([at, at + count], axis=1), np.stack([2 * at, 2 * at + 1], axis=1)]
    return [layout + offset for offset in sorted({0, dim - 2 * count}) for layout in layouts]


def _disagreement(
    keys: np.ndarray[Any, np.dtype[np.float32]], token_ids: tuple[int, ...], rotation: Rotation, angles: Reals
) -> float:
    """How far keys [heads, tokens, dim] of the same token lie apart when turned back: squares, summed."""
    turned = keys.astype(np.float64)
    at = np.arange(len(token_ids))[:, None] * angles[rotation.frequency][None]
    a, b = keys[..., rotation.planes[:, 0]], keys[..., rotation.planes[:, 1]]
    turned[..., rotation.planes[:, 0]] = a * np.cos(at) + b * np.sin(at)
    turned[..., rotation.planes[:, 1]] = b * np.cos(at) - a * np.sin(at)
    _, kind, count = np.unique(token_ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), keys.shape[0] * keys.shape[2]))
    rows = turned.transpose(1, 0, 2).reshape(len(token_ids), -1)
    np.add.at(sums, kind, rows)
    return float(((rows - (sums / count[:, None])[kind]) ** 2).sum())


def pack_layers(model: Model) -> tuple[PackLayer, ...]:
    """The layers that dense codes (UsageError where there are none, or one that it cannot code)."""
    layers = tuple(
        PackLayer(heads=layer.heads, key_dim=layer.key_dim, value_dim=layer.value_dim)
        for layer in model.layers
        if isinstance(layer, FullLayer)
    )
    if not layers:
        raise UsageError(f"{model.label.name} has no full-attention layers for dense to predict", hint="use fast")
    for layer in layers:
        if layer.heads * layer.key_dim % 2 or layer.heads * layer.value_dim % 2:
            raise UsageError(
                f"dense codes channels in pairs; {model.label.name} has a layer with {layer.heads} heads of "
                f"{layer.key_dim} and {layer.value_dim} channels",
                hint="use fast",
            )
    return layers


def _facts(model: Model, layers: tuple[PackLayer, ...], *, frequencies: int, alone: bool, tokens: int) -> PackFacts:
    return PackFacts(
        format="kvbuy pack",
        version=1,
        producer=f"kvbuy {kvbuy.__version__}",
        model=as_label(model.label.name),
        fingerprint=model.fingerprint.sha256(),
        dtype=model.fingerprint.dtype,
        layers=layers,
        depth=DEPTH,
        frequencies=frequencies,
        alone=alone,
        tokens=tokens,
    )


def _opening(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a document."""
    bare, whole = encode_text(tokenizer, "a"), tuple(tokenizer("a")["input_ids"])
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at]


def _try_out(pack: Pack, sample: Sample) -> tuple[float, float, int]:
    """The ratios of dense and fast on a sample, and the raw bytes of a token."""
    tensors = list(sample.tensors)
    raw = sum(tensor.nbytes for tensor in tensors)
    dense = DenseCoder(pack, sample.token_ids, block_size=SAMPLE_TOKENS).encode_block(0, tensors)
    return len(dense.data) / raw, len(encode_tensors(tensors).data) / raw, raw // len(sample.token_ids)
