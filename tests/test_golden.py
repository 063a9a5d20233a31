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
from kvbuy.codec.pack import add_pack, read_pack
from kvbuy.reader import check_contents
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
    check_contents(artifact)
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


# `golden/v1-fast/` and `golden/v1-dense/` are the same law in other codecs, made once from the files in `golden/v1/`.
# The packs beside the dense ones were fitted to the very blocks that they decode.

CODED: dict[tuple[str, str], dict[str, Any]] = {
    (codec, name): facts
    for codec in ("fast", "dense")
    for name, facts in json.loads((FOLDER.with_name(f"v1-{codec}") / "expected.json").read_text("utf-8")).items()
}

by_codec_and_name = pytest.mark.parametrize(("codec", "name"), CODED)


def coded(codec: str, name: str) -> Path:
    return FOLDER.with_name(f"v1-{codec}") / f"{name}.kv.safetensors"


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with the golden packs."""
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path))
    for pack in FOLDER.with_name("v1-dense").glob("*.pack.safetensors"):
        add_pack(*read_pack(pack))


@by_codec_and_name
def test_a_golden_coded_file_has_not_changed(codec: str, name: str) -> None:
    artifact = Artifact.open(coded(codec, name))
    facts = {
        "sha256": hashlib.sha256(artifact.path.read_bytes()).hexdigest(),
        "id": artifact.id,
        "sizes": [piece.size for piece in artifact.manifest.pieces()],
    }
    pack = getattr(artifact.manifest.codec, "pack", None)
    assert facts | ({"pack": pack} if pack else {}) == CODED[codec, name]


@by_codec_and_name
def test_a_golden_coded_artifact_differs_from_the_raw_one_in_its_codec_only(codec: str, name: str) -> None:
    artifact, raw = Artifact.open(coded(codec, name)), Artifact.open(golden(name))
    assert artifact.manifest.with_codec("raw") == raw.manifest
    assert (artifact.read_tokens(), artifact.read_text()) == (raw.read_tokens(), raw.read_text())


@pytest.mark.usefixtures("packs")
@by_codec_and_name
def test_a_golden_coded_artifact_decodes_to_the_raw_one_s_file(codec: str, name: str, tmp_path: Path) -> None:
    again = convert(coded(codec, name), tmp_path / "again.kv.safetensors", codec="raw")
    assert again.artifact.path.read_bytes() == golden(name).read_bytes()


@by_codec_and_name
def test_a_golden_coded_file_s_tensors_are_what_plain_safetensors_reads(codec: str, name: str) -> None:
    artifact, tensors = Artifact.open(coded(codec, name)), load_file(coded(codec, name))
    pieces = {piece.name: bytes(artifact.read_piece(piece)) for piece in artifact.manifest.pieces()}
    assert {piece: raw_bytes(tensors[piece]) for piece in pieces} == pieces
    assert tensors.keys() - pieces.keys() == {"tokens", "text"}


def test_golden_dense_blocks_are_dense() -> None:
    artifacts = [Artifact.open(coded(codec, name)) for codec, name in CODED if codec == "dense"]
    first = [artifact.read_piece(artifact.manifest.pieces()[at])[0] for artifact in artifacts for at in range(3)]
    assert set(first) == {1}, "a block in mode 0 is one of fast"
