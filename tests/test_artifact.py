"""Artifacts on disk: written whole or not at all, and not one bit of the file is free."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from handmade import FULL, ROW_BYTES, changed, facts_of, handmade
from safetensors import safe_open

from kvbuy.artifact import Artifact, content_digest, write_artifact
from kvbuy.errors import DamagedError, ExistsError, StoreError
from kvbuy.manifest import Manifest, canonical_json, parse_manifest
from kvbuy.prefill import Precomputed
from kvbuy.reader import check_contents

TORCH_DTYPES = {"BF16": torch.bfloat16, "I32": torch.int32, "U8": torch.uint8}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "doc.kv.safetensors"


@pytest.fixture
def artifact(path: Path) -> Artifact:
    return write_artifact(path, *handmade())


@pytest.fixture
def tiny(path: Path) -> Artifact:
    """Two tokens in one layer: as small as an artifact gets."""
    return write_artifact(path, *handmade(range(2), layers=[FULL]))


def written(path: Path, manifest: Manifest, buffers: list[bytes]) -> Artifact:
    return write_artifact(path, manifest, buffers, force=True)


def altered(manifest: Manifest, path: str, value: object) -> Manifest:
    return parse_manifest(canonical_json(changed(facts_of(manifest), path, value)))


def test_what_is_written_is_read_again(artifact: Artifact) -> None:
    manifest, buffers = handmade()
    found = Artifact.open(artifact.path)
    check_contents(found)
    assert found == artifact
    assert (found.manifest, found.id) == (manifest, hashlib.sha256(manifest.canonical()).hexdigest())
    assert found.read_tokens() == tuple(range(40))
    assert found.read_text() == buffers[-1].decode()
    assert artifact.path.read_bytes() == manifest.header() + b"".join(buffers)


def test_a_block_is_read_into_the_caller_s_views(artifact: Artifact) -> None:
    raw = bytearray(16 * ROW_BYTES)
    views = [memoryview(raw)[at : at + 5] for at in range(0, len(raw), 5)]
    artifact.read_block(1, views)
    assert raw == handmade()[1][1]


def test_state_is_read_into_the_caller_s_view(artifact: Artifact) -> None:
    found = [bytearray(tensor.size) for tensor in artifact.manifest.state_tensors()]
    for index, raw in enumerate(found):
        artifact.read_state(artifact.manifest.state[index], artifact.manifest.state_tensors()[index], memoryview(raw))
    assert found == handmade()[1][3:7]


def test_plain_safetensors_reads_the_same_tensors(artifact: Artifact) -> None:
    raw = b"".join(handmade()[1])
    with safe_open(artifact.path, framework="pt") as file:
        names, metadata = file.keys(), file.metadata()
        found = {name: file.get_tensor(name) for name in names}
    wanted = {tensor.name: tensor for tensor in artifact.manifest.tensors()}
    assert metadata == {"format": "pt", "kvbuy": artifact.manifest.canonical().decode(), "kvbuy_id": artifact.id}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == TORCH_DTYPES[tensor.dtype]
        assert tuple(found[name].shape) == tensor.shape
        assert found[name].view(torch.uint8).numpy().tobytes() == raw[tensor.start : tensor.end]


def test_an_existing_file_is_not_replaced(artifact: Artifact) -> None:
    before = artifact.path.read_bytes()
    with pytest.raises(ExistsError, match="is there already") as caught:
        write_artifact(artifact.path, *handmade(fill=1))
    assert caught.value.hint == "give --force to replace it, or --out for another name"
    assert artifact.path.read_bytes() == before


def test_force_replaces_an_existing_file(artifact: Artifact) -> None:
    other = write_artifact(artifact.path, *handmade(fill=1), force=True)
    assert Artifact.open(artifact.path) == other != artifact


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["failure", "Ctrl-C"])
def test_a_writer_that_stops_midway_leaves_nothing_and_keeps_the_old_file(
    error: BaseException, artifact: Artifact
) -> None:
    manifest, buffers = handmade(fill=1)
    before = artifact.path.read_bytes()

    def stopping() -> Iterator[bytes]:
        yield from buffers[:3]
        raise error

    with pytest.raises(type(error)):
        write_artifact(artifact.path, manifest, stopping(), force=True)
    assert list(artifact.path.parent.iterdir()) == [artifact.path]
    assert artifact.path.read_bytes() == before


@pytest.mark.parametrize("buffers", [handmade()[1][:-1], [*handmade()[1], b"?"]], ids=["too few", "too many"])
def test_bytes_that_the_manifest_does_not_imply_are_not_written(buffers: list[bytes], path: Path) -> None:
    with pytest.raises(AssertionError, match="bytes written, the manifest implies 522"):
        write_artifact(path, handmade()[0], buffers)
    assert list(path.parent.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from handmade import handmade
from kvbuy.artifact import write_artifact
from kvbuy.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_artifact(Path(sys.argv[1]), *handmade(fill=1), force=True)
except StoreError as error:
    print(error.message)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files by setrlimit")
def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(artifact: Artifact) -> None:
    before = artifact.path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(artifact.path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.stdout == f"cannot write {artifact.path}: File too large\n"
    assert list(artifact.path.parent.iterdir()) == [artifact.path]
    assert artifact.path.read_bytes() == before


def test_a_folder_that_is_missing_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        write_artifact(tmp_path / "missing" / "doc.kv.safetensors", *handmade())


def test_two_writers_of_one_name_do_not_meet(path: Path) -> None:
    inner, outer = handmade(fill=1), handmade(fill=2)

    def interrupted() -> Iterator[bytes]:
        yield from outer[1][:2]
        written(path, *inner)
        yield from outer[1][2:]

    check_contents(write_artifact(path, outer[0], interrupted(), force=True))
    assert path.read_bytes() == outer[0].header() + b"".join(outer[1])
    assert list(path.parent.iterdir()) == [path]


def test_blocks_that_changed_places_are_damage(artifact: Artifact) -> None:
    manifest, (first, second, *rest) = handmade()
    with pytest.raises(DamagedError, match="block 0 does not match its digest"):
        check_contents(written(artifact.path, manifest, [second, first, *rest]))


def test_blocks_that_changed_places_with_their_entries_are_damage(path: Path) -> None:
    manifest, (first, second, *rest) = handmade()
    entries = facts_of(manifest)["blocks"]
    swapped = altered(manifest, "blocks", [entries[1], entries[0], entries[2]])
    with pytest.raises(DamagedError, match="the block ids are not the chain of its tokens"):
        check_contents(written(path, swapped, [second, first, *rest]))


def test_a_block_of_another_document_is_damage_even_with_its_whole_entry(path: Path) -> None:
    manifest, buffers = handmade()
    other, other_buffers = handmade(range(100, 140), fill=1)
    forged = altered(manifest, "blocks.0", facts_of(other)["blocks"][0])
    with pytest.raises(DamagedError, match="the block ids are not the chain of its tokens"):
        check_contents(written(path, forged, [other_buffers[0], *buffers[1:]]))


def test_tokens_of_another_document_are_damage_even_with_their_digest(path: Path) -> None:
    manifest, buffers = handmade()
    tokens = handmade(range(100, 140))[1][-2]
    forged = altered(manifest, "document.tokens_digest", content_digest([tokens]))
    with pytest.raises(DamagedError, match="the block ids are not the chain of its tokens"):
        check_contents(written(path, forged, [*buffers[:-2], tokens, buffers[-1]]))


def test_another_profile_is_damage_even_in_a_lawful_manifest(path: Path) -> None:
    manifest, buffers = handmade()
    with pytest.raises(DamagedError, match="the block ids are not the chain of its tokens"):
        check_contents(written(path, altered(manifest, "profile.torch", "2.15.0"), buffers))


def test_forged_values_with_their_digest_are_another_artifact(path: Path) -> None:
    """No digest can know that values are wrong: that is what verifying from scratch is for."""
    manifest, (first, *rest) = handmade()
    forged = written(path, altered(manifest, "blocks.0.digest", content_digest([first[::-1]])), [first[::-1], *rest])
    check_contents(forged)
    assert forged.id != manifest.sha256()


def test_a_file_that_shrinks_after_it_was_opened_is_damage(artifact: Artifact) -> None:
    os.truncate(artifact.path, artifact.header_bytes + 10)
    with pytest.raises(DamagedError, match="the file ended early"):
        check_contents(artifact)


def test_a_file_that_vanishes_after_it_was_opened_is_a_store_error(artifact: Artifact) -> None:
    artifact.path.unlink()
    with pytest.raises(StoreError, match=r"cannot read .*: No such file or directory"):
        check_contents(artifact)


def test_every_truncation_is_damage(tiny: Artifact) -> None:
    whole = tiny.path.read_bytes()
    silent = []
    for length in reversed(range(len(whole))):
        os.truncate(tiny.path, length)
        if not is_damaged(tiny.path):
            silent.append(length)
    assert silent == []


def test_every_flipped_bit_is_damage(tiny: Artifact) -> None:
    whole = tiny.path.read_bytes()
    silent = []
    with tiny.path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(whole):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                if not is_damaged(tiny.path):
                    silent.append((at, bit))
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert silent == []
    check_contents(Artifact.open(tiny.path))


def test_every_flipped_byte_of_a_model_s_artifact_s_contents_is_damage(made: Precomputed) -> None:
    """A flip in each digest's share of a real artifact: first, last and a byte between of every tensor."""
    silent = []
    with made.artifact.path.open("r+b", buffering=0) as file:
        for tensor in made.artifact.manifest.tensors():
            for at in (tensor.start, (tensor.start + tensor.end) // 2, tensor.end - 1):
                byte = os.pread(file.fileno(), 1, made.artifact.header_bytes + at)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), made.artifact.header_bytes + at)
                if not is_damaged(made.artifact.path):
                    silent.append((tensor.name, at))
                os.pwrite(file.fileno(), byte, made.artifact.header_bytes + at)
    assert silent == []


def is_damaged(path: Path) -> bool:
    try:
        check_contents(Artifact.open(path))
    except DamagedError:
        return True
    return False
