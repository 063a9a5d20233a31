"""Format version 1 as files: what was once written is read for good, byte for byte.

`golden/v1/` was written once, by kvbuy 0.1.0 on a CPU, and is never written again; a new format version adds a folder.
All hold "Grüße: " and 31 characters more, in blocks of 16 tokens, made by `precompute` with random models (seed 0) in
bfloat16, with the byte tokenizer of `conftest`, hidden size 16 and two layers of two heads and one KV head of size 8:

- `full`: Llama, full attention, the last block short.
- `chat`: the same with `chat=True`: the text is the rendered head of the chat template. No block is short.
- `sliding`: Gemma 3, a layer with a window of 8 tokens, then a full one.
- `recurrent`: Qwen3-Next, a linear-attention layer with float32 state, then a full one.

Values are compared with what plain safetensors reads from the same file, never with KV computed here: machines differ.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvbuy.artifact import Artifact
from kvbuy.recode import convert

FOLDER = Path(__file__).parent / "golden" / "v1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))

by_name = pytest.mark.parametrize("name", EXPECTED)


def golden(name: str) -> Path:
    return FOLDER / f"{name}.kv.safetensors"


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_every_golden_file_is_expected() -> None:
    assert sorted(FOLDER.glob("*.safetensors")) == sorted(map(golden, EXPECTED))


@by_name
def test_a_golden_file_has_not_changed(name: str) -> None:
    assert hashlib.sha256(golden(name).read_bytes()).hexdigest() == EXPECTED[name]["sha256"]


@by_name
def test_a_golden_artifact_is_intact_and_says_what_it_always_said(name: str) -> None:
    artifact = Artifact.open(golden(name))
    artifact.check_blocks()
    assert {
        "sha256": EXPECTED[name]["sha256"],
        "id": artifact.id,
        "fingerprint": artifact.manifest.fingerprint.sha256(),
        "blocks": [block.id for block in artifact.manifest.blocks],
        "state": [f"{tensor.layer}.{tensor.name}" for tensor in artifact.manifest.state],
        "tokens": list(artifact.read_tokens()),
        "text": artifact.read_text(),
    } == EXPECTED[name]


@by_name
def test_a_golden_artifact_s_blocks_are_what_plain_safetensors_reads(name: str) -> None:
    artifact, tensors = Artifact.open(golden(name)), load_file(golden(name))
    for index in range(len(artifact.manifest.blocks)):
        views = [bytearray(tensor.size) for tensor in artifact.manifest.block_tensors(index)]
        artifact.read_block(index, list(map(memoryview, views)))
        assert views == [raw_bytes(tensors[tensor.name]) for tensor in artifact.manifest.block_tensors(index)]


@by_name
def test_a_golden_artifact_s_state_is_what_plain_safetensors_reads(name: str) -> None:
    artifact, tensors = Artifact.open(golden(name)), load_file(golden(name))
    for index, tensor in enumerate(artifact.manifest.state_tensors()):
        view = bytearray(tensor.size)
        artifact.read_state(artifact.manifest.state[index], artifact.manifest.state_tensors()[index], memoryview(view))
        assert view == raw_bytes(tensors[tensor.name])


@by_name
def test_a_golden_artifact_s_tokens_and_text_are_what_plain_safetensors_reads(name: str) -> None:
    artifact, tensors = Artifact.open(golden(name)), load_file(golden(name))
    assert list(artifact.read_tokens()) == tensors["tokens"].tolist()
    assert artifact.read_text().encode() == raw_bytes(tensors["text"])


# `golden/v1-fast/` is the same law in the codec fast, written once from the file of the same name in `golden/v1/`.

FAST = FOLDER.with_name("v1-fast")
EXPECTED_FAST: dict[str, dict[str, Any]] = json.loads((FAST / "expected.json").read_text(encoding="utf-8"))

by_fast_name = pytest.mark.parametrize("name", EXPECTED_FAST)


@by_fast_name
def test_a_golden_fast_file_has_not_changed(name: str) -> None:
    path = FAST / f"{name}.kv.safetensors"
    artifact = Artifact.open(path)
    assert {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "id": artifact.id,
        "sizes": [piece.size for piece in artifact.manifest.pieces()],
    } == EXPECTED_FAST[name]


@by_fast_name
def test_a_golden_fast_artifact_differs_from_the_raw_one_in_its_codec_only(name: str) -> None:
    artifact, raw = Artifact.open(FAST / f"{name}.kv.safetensors"), Artifact.open(golden(name))
    assert artifact.manifest.with_codec("raw") == raw.manifest
    assert (artifact.read_tokens(), artifact.read_text()) == (raw.read_tokens(), raw.read_text())


@by_fast_name
def test_a_golden_fast_artifact_decodes_to_the_raw_one_s_file(name: str, tmp_path: Path) -> None:
    again = convert(FAST / f"{name}.kv.safetensors", tmp_path / "again.kv.safetensors", codec="raw")
    assert again.artifact.path.read_bytes() == golden(name).read_bytes()


@by_fast_name
def test_a_golden_fast_file_s_tensors_are_what_plain_safetensors_reads(name: str) -> None:
    artifact, tensors = Artifact.open(FAST / f"{name}.kv.safetensors"), load_file(FAST / f"{name}.kv.safetensors")
    pieces = {piece.name: bytes(artifact.read_piece(piece)) for piece in artifact.manifest.pieces()}
    assert {piece: raw_bytes(tensors[piece]) for piece in pieces} == pieces
    assert tensors.keys() - pieces.keys() == {"tokens", "text"}
