"""Artifacts made by hand, without a model: as small as the format allows, every byte known."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbuy.artifact import content_digest
from kvbuy.manifest import Fingerprint, Manifest, Profile, StateTensor, canonical_json, chain_blocks, parse_manifest

Facts = dict[str, Any]

BLOCK_SIZE = 16
FINGERPRINT = Fingerprint(
    weights="1" * 64,
    config="2" * 64,
    tokenizer="3" * 64,
    chat_template=None,
    dtype="BF16",
    quantization=None,
    adapters=(),
)
PROFILE = Profile(
    block_size=BLOCK_SIZE, attention="sdpa", torch="2.14.1", transformers="5.23.0", device="cpu", processor="x86_64"
)
FULL = {"kind": "full", "heads": 1, "key_dim": 1, "value_dim": 2}
ROW_BYTES = 6  # of a full layer: one key and two values in bfloat16
SLIDING = {"kind": "sliding", "window": 4}
RECURRENT = {"kind": "recurrent"}
# A document of 40 tokens keeps 8 rows after its last full block, and window - 1 = 3 before it.
STATE_SHAPES = {(1, "key"): (1, 11, 1), (1, "value"): (1, 11, 2), (2, "conv.0"): (1, 3), (2, "recurrent.0"): (5,)}


def handmade(
    tokens: Sequence[int] = range(40),
    *,
    fill: int = 0,
    layers: Sequence[Facts] = (FULL, SLIDING, RECURRENT),
    fingerprint: Fingerprint = FINGERPRINT,
    profile: Profile = PROFILE,
) -> tuple[Manifest, list[bytes]]:
    """A manifest and the buffers of its data section. `fill` chooses the tensors' bytes."""
    text = "".join(chr(97 + token % 26) for token in tokens).encode()
    raw_tokens = struct.pack(f"<{len(tokens)}i", *tokens)
    sizes = [min(BLOCK_SIZE, len(tokens) - start) for start in range(0, len(tokens), BLOCK_SIZE)]
    blocks = [pattern(ROW_BYTES * size, at + fill) for at, size in enumerate(sizes)]
    digests = [content_digest([block]) for block in blocks]
    shapes = {key: shape for key, shape in STATE_SHAPES.items() if key[0] < len(layers)}
    state = [pattern(2 * count(shape), at + fill + 100) for at, shape in enumerate(shapes.values())]
    described = [
        StateTensor(layer=layer, name=name, dtype="BF16", shape=shape, digest=content_digest([raw]))
        for ((layer, name), shape), raw in zip(shapes.items(), state, strict=True)
    ]
    chained = chain_blocks(tokens, fingerprint=fingerprint, profile=profile, digests=digests)
    facts = {
        "format": "kvbuy",
        "version": 1,
        "producer": "hand",
        "created": "2026-01-02T03:04:05Z",
        "model": {"name": "none", "revision": None},
        "fingerprint": fingerprint.model_dump(mode="json"),
        "profile": profile.model_dump(mode="json"),
        "document": {
            "name": "doc.txt",
            "chat": False,
            "text_bytes": len(text),
            "text_digest": content_digest([text]),
            "tokens": len(tokens),
            "tokens_digest": content_digest([raw_tokens]),
        },
        "codec": "raw",
        "layers": list(layers),
        "blocks": [block.model_dump(mode="json") for block in chained],
        "state": [tensor.model_dump(mode="json") for tensor in described],
        "receipt": {"prompt": "?", "prompt_tokens": [1], "tokens": [2], "logits": "4" * 64},
    }
    return parse_manifest(canonical_json(facts)), [*blocks, *state, raw_tokens, text]


def pattern(size: int, seed: int) -> bytes:
    """Bytes that differ from place to place and from seed to seed."""
    return bytes((at * 7 + seed * 31 + 1) % 251 for at in range(size))


def count(shape: Sequence[int]) -> int:
    """How many numbers a tensor of this shape holds."""
    total = 1
    for extent in shape:
        total *= extent
    return total


def facts_of(manifest: Manifest) -> Facts:
    """The manifest as plain JSON values, to be changed."""
    facts: Facts = json.loads(manifest.canonical())
    return facts


def changed(facts: Facts, path: str, value: object) -> Facts:
    """A copy of the facts with the value at a dotted path replaced."""
    copy: Any = json.loads(json.dumps(facts))
    at, *steps = [int(step) if step.isdigit() else step for step in path.split(".")][::-1]
    target = copy
    for step in reversed(steps):
        target = target[step]
    target[at] = value
    return copy  # type: ignore[no-any-return]


def altered_file(path: Path, at: int) -> None:
    """Flip the lowest bit of a file's byte."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
