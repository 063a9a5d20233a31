"""Where artifacts are found, and where they go."""

import os
from pathlib import Path

import pytest

from kvbuy.errors import StoreError, UsageError
from kvbuy.places import cache_folder, find_artifact, name_artifacts


def touch(path: Path, *, time: int = 0) -> Path:
    path.write_bytes(b"")
    os.utime(path, (time, time))
    return path


def test_a_named_file_is_itself_even_where_there_is_none(tmp_path: Path) -> None:
    touch(tmp_path / "other.kv.safetensors")
    assert find_artifact(tmp_path / "a.kv.safetensors", folder=tmp_path) == tmp_path / "a.kv.safetensors"


def test_the_newest_artifact_is_found_where_none_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "c.kv.safetensors", time=1)
    newest = touch(tmp_path / "a.kv.safetensors", time=3)
    touch(tmp_path / "b.kv.safetensors", time=2)
    touch(tmp_path / "model.safetensors", time=4)
    assert find_artifact(None, folder=tmp_path) == newest


def test_a_named_folder_means_its_newest_artifact(tmp_path: Path) -> None:
    newest = touch(tmp_path / "a.kv.safetensors")
    assert find_artifact(tmp_path) == newest


def test_without_a_folder_the_current_one_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.kv.safetensors")
    monkeypatch.chdir(tmp_path)
    assert find_artifact(None) == Path("a.kv.safetensors")


def test_an_unfinished_artifact_is_not_found(tmp_path: Path) -> None:
    touch(tmp_path / ".a.kv.safetensors.0a1b2c3d.tmp")
    with pytest.raises(StoreError, match="there is no artifact in") as caught:
        find_artifact(None, folder=tmp_path)
    assert caught.value.hint == "make one: kvbuy precompute doc.txt"


def test_a_link_that_leads_nowhere_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "gone.kv.safetensors").symlink_to(tmp_path / "nowhere")
    found = touch(tmp_path / "a.kv.safetensors")
    assert find_artifact(None, folder=tmp_path) == found


NAMES = {
    "doc.txt": "doc.kv.safetensors",
    "some/where/doc.txt": "doc.kv.safetensors",
    "doc": "doc.kv.safetensors",
    "doc.v2.md": "doc.v2.kv.safetensors",
    ".hidden": ".hidden.kv.safetensors",
    "-": "stdin.kv.safetensors",
}


@pytest.mark.parametrize(("document", "name"), NAMES.items())
def test_an_artifact_is_named_after_its_document(document: str, name: str, tmp_path: Path) -> None:
    assert name_artifacts([document], None) == [Path(name)]
    assert name_artifacts([document], tmp_path) == [tmp_path / name]


def test_many_documents_become_artifacts_beside_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a.kv.safetensors", tmp_path / "b.kv.safetensors"]
    assert name_artifacts(["x/a.txt", "y/b.txt"], tmp_path) == paths


def test_one_document_may_become_a_file_of_any_name(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "x.kv.safetensors"
    assert name_artifacts(["doc.txt"], out) == [out]


def test_many_documents_cannot_become_one_file() -> None:
    with pytest.raises(UsageError, match=r"2 documents cannot all become x\.kv\.safetensors") as caught:
        name_artifacts(["a.txt", "b.txt"], Path("x.kv.safetensors"))
    assert caught.value.hint == "give --out a folder"


def test_two_documents_cannot_become_the_same_file() -> None:
    with pytest.raises(UsageError, match=r"^x/a\.txt and y/a\.md would both become a\.kv\.safetensors$") as caught:
        name_artifacts(["x/a.txt", "b.txt", "y/a.md"], None)
    assert caught.value.hint == "precompute them apart"


@pytest.mark.parametrize("name", ["missing.txt", "file.txt"])
def test_out_must_be_a_folder_or_an_artifact_s_name(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "file.txt")
    with pytest.raises(UsageError, match=r"is neither a folder nor a name ending in \.kv\.safetensors"):
        name_artifacts(["doc.txt"], tmp_path / name)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/you")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("KVBUY_CACHE", "~/kv")
    found = [cache_folder()]
    for variable in ("KVBUY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable)
        found.append(cache_folder())
    assert found == [Path("/home/you/kv"), Path("/xdg/kvbuy"), Path("/home/you/.cache/kvbuy")]
