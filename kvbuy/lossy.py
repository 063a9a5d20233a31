"""What lossy encodings do to the answer, for comparison only: nothing here is ever written into an artifact.

A loaded cache is quantised and dequantised in place, and its greedy continuation of the receipt's prompt compared with
the exact cache's. One row is no encoding but a corruption, a value vector negated: what it leaves equal shows how
little equal tokens prove. Only full-attention layers are touched; other state stays exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from kvbuy.artifact import Artifact
from kvbuy.cache import full_rows
from kvbuy.decode import greedy
from kvbuy.models import Model, refuse_too_long
from kvbuy.replay import measure_drift
from kvbuy.reuse import load_document

TOKENS = 24  # as the paper counts
LONG = 256
INT8_MOST = 127
SCALE_BYTES = 4  # a float32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LossyMeasure:
    """An encoding against the exact cache, on the same rows.

    `ratio` counts codes, float32 scales and untouched state. `tokens_equal` of `tokens` greedy tokens are equal, place
    by place; `_long` the same over a longer continuation, whose first difference is at `first_divergence` (None: none).
    KL (nats, exact against lossy) and logit difference are the largest of the steps within `tokens` that both took from
    the same context.
    """

    name: str
    ratio: float
    tokens_equal: int
    tokens: int
    tokens_equal_long: int
    tokens_long: int
    first_divergence: int | None
    kl: float
    max_abs_logit_diff: float


Encoding = Callable[[Sequence[torch.Tensor]], int]  # changes the tensors in place; returns the bytes it would store


@torch.no_grad()
def measure_lossy(
    artifact: Artifact, model: Model, *, progress: Progress = lambda _, __, ___: None
) -> tuple[LossyMeasure, ...]:
    """Continue the receipt's prompt from each encoding of an artifact. `progress` is told what runs.

    Raises:
        DamagedError, MisfitError: the artifact cannot be used (`kvbuy.reuse.load`).
        DocumentError: the model's context has no room for `TOKENS` tokens.
    """
    manifest = artifact.manifest
    rows, document = manifest.receipt.prompt_tokens, manifest.document.tokens
    refuse_too_long(model, document, extra=len(rows) + TOKENS)
    length = min(LONG, model.context - document - len(rows))
    loaded = load_document(artifact, model, room=len(rows) + length)
    kv_bytes = manifest.kv_bytes()
    state_bytes = kv_bytes - sum(states.nbytes for states in full_rows(loaded.cache))

    def run(name: str, encode: Encoding) -> tuple[int, list[int], torch.Tensor]:
        progress(name, 0, 0)
        cache: Cache = load_document(artifact, model, cache=loaded.cache).cache
        size = encode(list(full_rows(cache)))
        tokens, logits = greedy(model, cache, rows, max_new_tokens=length)
        return size, tokens, logits[:TOKENS]

    _, wanted, logits = run("reference", exact)
    measures = []
    for name, encode in ENCODINGS.items():
        size, tokens, other = run(name, encode)
        drift = measure_drift((wanted[:TOKENS], logits), (tokens[:TOKENS], other))
        differs = [at for at, (one, two) in enumerate(zip(wanted, tokens, strict=True)) if one != two]
        measures.append(
            LossyMeasure(
                name=name,
                ratio=(size + state_bytes) / kv_bytes,
                tokens_equal=drift.tokens_equal,
                tokens=drift.tokens,
                tokens_equal_long=length - len(differs),
                tokens_long=length,
                first_divergence=differs[0] if differs else None,
                kl=drift.kl,
                max_abs_logit_diff=drift.max_abs_logit_diff,
            )
        )
    return tuple(measures)


def exact(tensors: Sequence[torch.Tensor]) -> int:
    """Change nothing: the control."""
    return sum(states.nbytes for states in tensors)


def int8_per_channel(tensors: Sequence[torch.Tensor]) -> int:
    """Symmetric int8: each channel (layer, head, dim) scaled by its largest magnitude over the document."""
    size = 0
    for states in tensors:
        values = states.float()
        scales = values.abs().amax(dim=1, keepdim=True) / INT8_MOST
        scales[scales == 0] = 1
        states.copy_((values / scales).round().clamp(-INT8_MOST, INT8_MOST) * scales)
        size += states.numel() + SCALE_BYTES * scales.numel()
    return size


def fp8_per_tensor(tensors: Sequence[torch.Tensor]) -> int:
    """float8 e4m3: each layer's keys, and its values, scaled so that the largest magnitude is the largest float8."""
    size = 0
    for states in tensors:
        values = states.float().cpu()  # not every device has the type
        scale = values.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        scale = scale if scale > 0 else torch.ones(())
        states.copy_((values / scale).to(torch.float8_e4m3fn).float() * scale)
        size += states.numel() + SCALE_BYTES
    return size


def negate_one_value(tensors: Sequence[torch.Tensor]) -> int:
    """Negate one value vector: of the middle layer, its first head, the document's middle token."""
    if tensors:
        values = tensors[len(tensors) // 4 * 2 + 1]
        values[0, values.shape[1] // 2].neg_()
    return exact(tensors)


ENCODINGS: dict[str, Encoding] = {
    "exact": exact,
    "int8 a channel": int8_per_channel,
    "fp8 e4m3 a tensor": fp8_per_tensor,
    "one value negated": negate_one_value,
}
