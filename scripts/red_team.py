"""What each check sees of each forgery: python scripts/red_team.py [--model FOLDER] [--tokens N]

Every forgery claims the honest document's text and tokens, has its digests and receipt made anew, and so is intact and
replays its own receipt; the last one has its digests left as they were. For each: whether digests see it, which blocks
an audit of all blocks fails, whether the numbers alone give it away, whether its receipt replays, and how many of 24
greedy tokens are those of the honest artifact (which nobody has who did not prefill the document).
"""

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvbuy import render
from kvbuy.artifact import Artifact, content_digest, write_artifact
from kvbuy.audit import audit
from kvbuy.bench import cut_text
from kvbuy.cache import DTYPES, block_arrays, empty_cache, fill_rows, reserve_cache
from kvbuy.codec.arrays import Array, head_views
from kvbuy.decode import greedy
from kvbuy.docstrings import help_texts
from kvbuy.errors import DamagedError
from kvbuy.lossy import INT8_MOST, Encoding, fp8_per_tensor, int8_per_channel
from kvbuy.manifest import chain_blocks
from kvbuy.models import Model, load_model
from kvbuy.prefill import make_receipt, precompute, prefill
from kvbuy.reader import Reader
from kvbuy.replay import replay_receipt
from kvbuy.reuse import load_document

SWAPPED = 32  # tokens of another history
Blocks = list[list[torch.Tensor]]  # a block's keys and values [heads, rows, dim] in file order


@dataclass(frozen=True, slots=True)
class Finding:
    """What the checks see of a forgery; `failed` are blocks, `tokens_equal` of 24."""

    name: str
    intact: bool
    verdict: str
    failed: tuple[int, ...]
    numbers: bool
    replays: bool
    tokens_equal: int


def forgeries(model: Model, honest: Artifact, other: Artifact) -> Iterator[tuple[str, Blocks]]:
    """The red team's work: what each publishes as the honest document's blocks."""
    ids, size = list(honest.read_tokens()), honest.manifest.profile.block_size
    blocks = read_blocks(honest)
    middle = len(blocks) // 2
    yield "honest", blocks
    yield "one value vector negated", changed(blocks, middle, lambda tensors: tensors[3][0, 5].neg_())
    yield "one block's keys rotated", changed(blocks, middle, lambda tensors: [rotate(key) for key in tensors[0::2]])
    yield "one mantissa bit, digests anew", changed(blocks, middle, lambda tensors: flip_bit(tensors[2]))
    history = list(ids)
    start = middle * size
    history[start : start + SWAPPED] = other.read_tokens()[:SWAPPED]
    swapped = compute(model, history, size)
    yield "32 tokens of another history, one block", [*blocks[:middle], swapped[middle], *blocks[middle + 1 :]]
    yield "the same, all later blocks computed from it", swapped
    yield "int8, a scale a vector", [[int8_per_vector(tensor) for tensor in block] for block in blocks]
    yield "int8, a scale a channel", [encoded(block, int8_per_channel) for block in blocks]
    yield "fp8", [encoded(block, fp8_per_tensor) for block in blocks]
    yield "another document's block", [*blocks[:middle], read_blocks(other)[middle], *blocks[middle + 1 :]]
    yield "another layer's block", changed(blocks, middle, lambda tensors: exchange(tensors))
    with perturbed(model.model, 0.01):
        wrong = compute(model, ids, size)
    yield "weights perturbed by 1 %", wrong


def examine(model: Model, name: str, artifact: Artifact, wanted: Sequence[int]) -> Finding:
    """All checks on one artifact; `wanted` are the honest continuation's tokens."""
    receipt = artifact.manifest.receipt
    try:
        evidence = audit(artifact, model, blocks=len(artifact.manifest.blocks), seed=0)
    except DamagedError:
        return Finding(name, False, verdict="damaged", failed=(), numbers=True, replays=False, tokens_equal=0)
    loaded = load_document(artifact, model, room=len(receipt.prompt_tokens) + len(wanted))
    tokens, _ = greedy(model, loaded.cache, receipt.prompt_tokens, max_new_tokens=len(wanted))
    return Finding(
        name,
        intact=True,
        verdict=evidence.verdict,
        failed=evidence.failed_blocks,
        numbers=not evidence.implausible,
        replays=replay_receipt(artifact, model),
        tokens_equal=sum(a == b for a, b in zip(tokens, wanted, strict=True)),
    )


@torch.no_grad()
def red_team(model: Model, folder: Path, *, tokens: int, block_size: int) -> list[Finding]:
    """The whole table."""
    [first, both] = cut_text(model, help_texts(), [tokens, 2 * tokens])
    second = both[len(first) :]
    made = [
        precompute(one, folder / f"{name}.kv.safetensors", model=model, name=name, block_size=block_size).artifact
        for name, one in (("doc", first), ("other", second))
    ]
    honest, other = made
    wanted = honest.manifest.receipt.tokens
    found = []
    for at, (name, blocks) in enumerate(forgeries(model, honest, other)):
        forged = forge(model, honest, blocks, folder / f"forged{at}.kv.safetensors")
        found.append(examine(model, name, forged, wanted))
    raw = bytearray(honest.path.read_bytes())
    raw[honest.header_bytes + len(raw) // 3] ^= 1
    damaged = folder / "damaged.kv.safetensors"
    damaged.write_bytes(raw)
    found.append(examine(model, "one mantissa bit, digests as they were", Artifact.open(damaged), wanted))
    return found


def forge(model: Model, honest: Artifact, blocks: Blocks, out: Path) -> Artifact:
    """An intact artifact of these blocks under the honest document's name, with a receipt of its own."""
    manifest = honest.manifest
    arrays = [[as_array(tensor) for tensor in block] for block in blocks]
    digests = [content_digest(head_views(block)) for block in arrays]
    ids = honest.read_tokens()
    chain = chain_blocks(ids, fingerprint=manifest.fingerprint, profile=manifest.profile, digests=digests)
    capacity = len(ids) + 1000
    cache = reserve_cache(model.model.config, manifest, capacity=capacity, device=model.device)
    for index, block in enumerate(arrays):
        fill_rows(cache, block, manifest.block_start(index))
    for layer in cache.layers:
        layer.show(len(ids))
    receipt = make_receipt(model, cache, manifest.receipt.prompt, manifest.receipt.prompt_tokens)
    forged = manifest.model_copy(update={"blocks": chain, "receipt": receipt})
    side = (struct.pack(f"<{len(ids)}i", *ids), honest.read_text().encode())
    buffers = [array.tobytes() for block in arrays for array in block]
    return write_artifact(out, forged, [*buffers, *side], force=True)


def compute(model: Model, ids: Sequence[int], block_size: int) -> Blocks:
    """A history's blocks, computed in earnest."""
    cache = empty_cache(model.model.config, capacity=len(ids))
    prefill(model, ids, cache, block_size=block_size)
    starts = range(0, len(ids), block_size)
    cuts = [(start, min(start + block_size, len(ids))) for start in starts]
    return [[as_tensor(array, model) for array in block_arrays(cache, *cut)] for cut in cuts]


def read_blocks(artifact: Artifact) -> Blocks:
    dtype = DTYPES[artifact.manifest.fingerprint.dtype]
    return [[torch.from_numpy(x.copy()).view(dtype) for x in block] for block in Reader.open(artifact).load_blocks()]


def as_tensor(array: Array, model: Model) -> torch.Tensor:
    return torch.from_numpy(array.copy()).view(model.model.dtype)


def as_array(tensor: torch.Tensor) -> Array:
    return tensor.contiguous().view(torch.uint16 if tensor.itemsize == 2 else torch.uint32).numpy()


def changed(blocks: Blocks, at: int, change: Callable[[list[torch.Tensor]], object]) -> Blocks:
    """A copy in which one block was changed in place."""
    copy = [[tensor.clone() for tensor in block] for block in blocks]
    change(copy[at])
    return copy


def rotate(key: torch.Tensor) -> torch.Tensor:
    """Turn every pair of dims by 0.1: norms stay."""
    half = key.shape[-1] // 2
    left, right = key[..., :half].float(), key[..., half:].float()
    angle = torch.tensor(0.1)
    key[..., :half] = left * angle.cos() - right * angle.sin()
    key[..., half:] = right * angle.cos() + left * angle.sin()
    return key


def flip_bit(tensor: torch.Tensor) -> None:
    """The lowest mantissa bit of one value."""
    words = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)
    words[0, 3, 7] ^= 1


def exchange(tensors: list[torch.Tensor]) -> None:
    """Layer 0's keys and values for layer 1's."""
    tensors[0:2], tensors[2:4] = tensors[2:4], tensors[0:2]


def int8_per_vector(tensor: torch.Tensor) -> torch.Tensor:
    scale = tensor.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / INT8_MOST
    return ((tensor.float() / scale).round() * scale).to(tensor.dtype)


def encoded(block: list[torch.Tensor], encode: Encoding) -> list[torch.Tensor]:
    """A block as an encoding that changes tensors in place leaves it."""
    copy = [tensor.clone() for tensor in block]
    encode(copy)
    return copy


class perturbed:
    """A model whose weights are off by a share, until the block ends."""

    def __init__(self, model: torch.nn.Module, share: float) -> None:
        self.model, self.share = model, share

    def __enter__(self) -> None:
        torch.manual_seed(0)
        self.before = [weight.detach().clone() for weight in self.model.parameters()]
        for weight in self.model.parameters():
            weight.mul_(1 + self.share * torch.randn_like(weight))

    def __exit__(self, *_: object) -> None:
        for weight, before in zip(self.model.parameters(), self.before, strict=True):
            weight.copy_(before)


def print_findings(found: Sequence[Finding]) -> None:
    table = render.plain_table("forgery", "digests", "audit of all", "numbers", "receipt", "24 tokens")
    for one in found:
        blocks = ", ".join(map(str, one.failed)) if len(one.failed) < 4 else f"{len(one.failed)} blocks"
        verdict = one.verdict + (f": {blocks}" if blocks else "")
        table.add_row(
            one.name,
            "match" if one.intact else "no",
            verdict,
            "-" if not one.intact else "computed" if one.numbers else "codes",
            "-" if not one.intact else "replays" if one.replays else "no",
            f"{one.tokens_equal}/24" if one.intact else "-",
        )
    render.print_table(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or Hub id [default: as for precompute]")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = load_model(options.model, say=render.say)
    with tempfile.TemporaryDirectory() as folder:
        found = red_team(model, Path(folder), tokens=options.tokens, block_size=options.block_size)
    if options.json:
        print(json.dumps([{name: getattr(one, name) for name in one.__slots__} for one in found]))
    else:
        print_findings(found)
    unseen = [one.name for one in found if (one.verdict == "exact") != (one.name == "honest")]
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()
