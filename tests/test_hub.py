"""`push`, `pull` and `hf://` against a Hub of our own over real HTTP, in processes of their own as users run them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handmade import FULL, handmade
from hub_server import OWNER, Fault, Hub, Repository, serve_hub

from kvbuy.artifact import Artifact, write_artifact
from kvbuy.errors import UsageError
from kvbuy.hub import Address, parse_address
from kvbuy.manifest import parse_manifest
from kvbuy.pull import parse_blocks
from kvbuy.recode import convert

Kvbuy = Callable[..., "subprocess.CompletedProcess[str]"]
NAME = "doc.kv.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def kvbuy(hub: Hub, tmp_path: Path) -> Kvbuy:
    """Run kvbuy in an empty folder, its Hub being ours; logged in unless `token` is None."""

    def run(*arguments: str, token: str | None = OWNER, **environment: str) -> "subprocess.CompletedProcess[str]":
        settings = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "KVBUY_"))}
        settings |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",  # our Hub speaks the older protocol
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "KVBUY_KEYS": str(tmp_path / "keys"),
            "KVBUY_CACHE": str(tmp_path / "cache"),
            "PYTHONWARNINGS": "error::ResourceWarning",
        }
        settings |= environment
        if token is not None:
            settings["HF_TOKEN"] = token
        command = [sys.executable, "-m", "kvbuy.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """Four blocks, handmade."""
    return write_artifact(tmp_path / NAME, *handmade(range(60), layers=[FULL]))


@pytest.fixture
def shown(hub: Hub, artifact: Artifact) -> Repository:
    """A repository that has the artifact."""
    hub.repositories["ann/docs"] = Repository()
    hub.repositories["ann/docs"].commit({NAME: artifact.path.read_bytes(), "README.md": b"", "evil.sh": b"rm"})
    return hub.repositories["ann/docs"]


def test_what_is_pushed_can_be_pulled(kvbuy: Kvbuy, hub: Hub, artifact: Artifact, tmp_path: Path) -> None:
    kvbuy("keys", "new", "--owner", "Ann")
    assert kvbuy("sign", NAME).returncode == 0
    pushed = kvbuy("push", NAME, "ann/docs", "--license", "gpl-3.0", "--json")
    assert pushed.returncode == 0, pushed.stderr
    names = {NAME, "doc.kv.json", "doc.kv.sig.json", "config.json", "README.md"}
    assert set(json.loads(pushed.stdout)["files"]) == names
    pulled = kvbuy("pull", "ann/docs", "--out", "there", "--require-signature", "--json", token=None)
    assert pulled.returncode == 0, pulled.stderr
    [found] = json.loads(pulled.stdout)["artifacts"]
    assert (found["blocks"], found["of_blocks"]) == (4, 4)
    assert found["commit"] == hub.repositories["ann/docs"].commits[-1][0]
    assert [one["trust"] for one in found["signatures"]] == ["trusted"]
    assert (tmp_path / "there" / NAME).read_bytes() == artifact.path.read_bytes()
    assert (tmp_path / "there" / "doc.kv.sig.json").exists()


def test_large_files_go_first_and_all_appear_in_one_commit(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    assert kvbuy("push", NAME, "ann/docs").returncode == 0
    assert len(hub.repositories["ann/docs"].commits) == 2
    sent = [request for request in hub.requests if request.startswith(("PUT /lfs", "POST /api/models/ann/docs/commit"))]
    assert [request.split()[0] for request in sent] == ["PUT", "POST"]


def test_the_card_says_what_buyers_need(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    kvbuy("push", NAME, "ann/docs", "--license", "gpl-3.0", "--base-model", "Qwen/Qwen3-4B")
    _, files = hub.repositories["ann/docs"].commits[-1]
    card = files["README.md"].decode()
    for line in (
        "library_name: kvbuy",
        "base_model: Qwen/Qwen3-4B",
        "base_model_relation: adapter",
        "license: gpl-3.0",
        "- kv-cache",
        f"kvbuy generate --kv hf://ann/docs/{NAME}",
        "discloses its document",
    ):
        assert line in card
    assert json.loads(files["config.json"])["artifacts"][0]["id"] == artifact.id
    assert parse_manifest(files["doc.kv.json"]) == artifact.manifest


def test_a_second_artifact_joins_the_first(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    convert(artifact, codec="fast")
    for name in (NAME, "doc.fast.kv.safetensors"):
        assert kvbuy("push", name, "ann/docs").returncode == 0
    _, files = hub.repositories["ann/docs"].commits[-1]
    assert [one["name"] for one in json.loads(files["config.json"])["artifacts"]] == [NAME, "doc.fast.kv.safetensors"]
    assert files["README.md"].decode().count("| doc.txt |") == 2
    assert kvbuy("pull", "ann/docs", "--out", "both").returncode == 0


def test_a_later_push_keeps_what_the_card_said(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    kvbuy("push", NAME, "ann/docs", "--license", "gpl-3.0", "--base-model", "Qwen/Qwen3-4B", "--model-license", "mit")
    assert kvbuy("push", NAME, "hf://ann/docs").returncode == 0
    card = hub.repositories["ann/docs"].commits[-1][1]["README.md"].decode()
    assert "license: gpl-3.0" in card
    assert "base_model: Qwen/Qwen3-4B" in card
    assert "The document: gpl-3.0. The model: mit." in card
    assert kvbuy("push", NAME, "docs").returncode == kvbuy("push", NAME, "ann/docs@main").returncode == 2


def test_what_is_here_already_is_not_fetched_again(
    kvbuy: Kvbuy, hub: Hub, shown: Repository, artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / NAME).write_bytes(artifact.path.read_bytes())
    shown.commit({"second.kv.safetensors": artifact.path.read_bytes()})
    pulled = kvbuy("pull", "ann/docs", "--out", "there")
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "there" / "second.kv.safetensors").exists()
    untrusted = kvbuy("pull", "ann/docs", "--out", "there", "--require-signature")
    assert (untrusted.returncode, "is not signed" in untrusted.stderr) == (3, True)
    (tmp_path / "there" / NAME).write_bytes(b"another")
    assert "there already" in kvbuy("pull", "ann/docs", "--out", "there").stderr


def test_a_private_repository_is_for_its_owner(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    assert kvbuy("push", NAME, "ann/docs", "--private").returncode == 0
    assert hub.repositories["ann/docs"].private
    refused = kvbuy("pull", "ann/docs", "--out", "there", token=None)
    assert refused.returncode == 1
    assert "not on the Hub, or not for you" in refused.stderr
    assert "hf auth login" in refused.stderr
    assert kvbuy("pull", "ann/docs", "--out", "there").returncode == 0


def test_what_is_to_be_private_is_not_pushed_where_everybody_reads(
    kvbuy: Kvbuy, hub: Hub, shown: Repository, artifact: Artifact
) -> None:
    refused = kvbuy("push", NAME, "ann/docs", "--private")
    assert refused.returncode == 1
    assert "everybody can read it" in refused.stderr
    assert len(shown.commits) == 1


def test_a_signature_of_what_was_there_before_goes_with_it(
    kvbuy: Kvbuy, hub: Hub, artifact: Artifact, tmp_path: Path
) -> None:
    kvbuy("keys", "new", "--owner", "Ann")
    kvbuy("sign", NAME)
    assert kvbuy("push", NAME, "ann/docs").returncode == 0
    write_artifact(tmp_path / NAME, *handmade(range(50), layers=[FULL]), force=True)
    assert kvbuy("push", NAME, "ann/docs").returncode == 0
    _, files = hub.repositories["ann/docs"].commits[-1]
    assert "doc.kv.sig.json" not in files
    assert kvbuy("pull", "ann/docs", "--out", "there").returncode == 0


def test_a_gated_repository_says_how_to_pass(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    assert kvbuy("push", NAME, "ann/docs", "--gated").returncode == 0
    assert hub.repositories["ann/docs"].gated == "auto"
    refused = kvbuy("pull", "ann/docs", "--out", "there", token=None)
    assert refused.returncode == 1
    assert "is gated" in refused.stderr
    assert "accept its terms" in refused.stderr


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ann/none", "not on the Hub"),
        ("ann/docs@nowhere", "no such revision"),
        ("ann/docs/other", f"its artifacts: {NAME}"),
        ("docs", "names no repository"),
    ],
)
def test_what_is_not_there_is_named(kvbuy: Kvbuy, shown: Repository, address: str, words: str) -> None:
    refused = kvbuy("pull", address, "--out", "there")
    assert refused.returncode in (1, 2)
    assert words in refused.stderr


def test_a_hub_out_of_order_is_asked_again(kvbuy: Kvbuy, hub: Hub, artifact: Artifact, tmp_path: Path) -> None:
    hub.faults = [Fault("POST commit", status=503), Fault("PUT lfs", status=500)]
    assert kvbuy("push", NAME, "ann/docs").returncode == 0
    hub.faults = [Fault("GET /api/models", status=503, times=2), Fault("GET resolve", status=502)]
    pulled = kvbuy("pull", "ann/docs", "--out", "there")
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "there" / NAME).exists()


def test_a_hub_that_stays_out_of_order_leaves_nothing(
    kvbuy: Kvbuy, hub: Hub, shown: Repository, tmp_path: Path
) -> None:
    hub.faults = [Fault("GET /api/models", status=500, times=99)]
    refused = kvbuy("pull", "ann/docs", "--out", "there")
    assert refused.returncode == 1
    assert "try again later" in refused.stderr
    assert list((tmp_path / "there").glob("*") if (tmp_path / "there").exists() else []) == []


DOWNLOAD = "from kvbuy.hub import download, pin; print(download(pin('ann/docs'), 'big.safetensors'))"


def test_a_large_download_that_breaks_goes_on_where_it_broke(hub: Hub, shown: Repository, tmp_path: Path) -> None:
    """huggingface_hub writes pieces of 10 MB: what is smaller is fetched again."""
    big = os.urandom(2**20) * 12
    shown.commit({"big.safetensors": big})
    hub.faults = [Fault("GET resolve big", cut_at=11 * 2**20)]
    settings = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", DOWNLOAD]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == big
    assert hub.ranges == ["bytes=10485760-"]


def test_a_download_that_breaks_is_done_again(kvbuy: Kvbuy, hub: Hub, shown: Repository, tmp_path: Path) -> None:
    hub.faults = [Fault("GET resolve safetensors", cut_at=1000)]
    pulled = kvbuy("pull", "ann/docs", "--out", "there")
    assert pulled.returncode == 0, pulled.stderr
    assert Artifact.open(tmp_path / "there" / NAME).id == Artifact.open(tmp_path / NAME).id


def test_what_changes_between_two_requests_is_pulled_as_it_was(
    kvbuy: Kvbuy, hub: Hub, shown: Repository, artifact: Artifact, tmp_path: Path
) -> None:
    pinned = shown.commits[-1][0]

    def move(repository: Repository) -> None:
        if len(repository.commits) == 1:
            repository.commit({NAME: b"something else"})

    hub.before_download = move
    pulled = kvbuy("pull", "ann/docs", "--out", "there", "--json")
    assert json.loads(pulled.stdout)["artifacts"][0]["commit"] == pinned
    assert (tmp_path / "there" / NAME).read_bytes() == artifact.path.read_bytes()


def test_two_publishers_at_once_do_not_overwrite_each_other(kvbuy: Kvbuy, hub: Hub, artifact: Artifact) -> None:
    kvbuy("push", NAME, "ann/docs")
    repository = hub.repositories["ann/docs"]
    hub.before_download = lambda found: found.commit({"other": b""}) if len(found.commits) == 2 else None
    convert(artifact, codec="fast")
    refused = kvbuy("push", "doc.fast.kv.safetensors", "ann/docs")
    assert refused.returncode == 1
    assert "changed ann/docs meanwhile" in refused.stderr
    assert len(repository.commits) == 3


def test_damage_on_the_hub_gets_no_name(kvbuy: Kvbuy, hub: Hub, shown: Repository, tmp_path: Path) -> None:
    raw = bytearray((tmp_path / NAME).read_bytes())
    raw[-1] ^= 1
    shown.commit({NAME: bytes(raw)})
    refused = kvbuy("pull", "ann/docs", "--out", "there")
    assert refused.returncode == 3
    assert "does not match its digest" in refused.stderr
    assert list((tmp_path / "there").iterdir()) == []


def test_a_signature_of_something_else_gets_no_name(
    kvbuy: Kvbuy, hub: Hub, artifact: Artifact, shown: Repository, tmp_path: Path
) -> None:
    other = write_artifact(tmp_path / "other.kv.safetensors", *handmade(range(20), layers=[FULL]))
    kvbuy("keys", "new", "--owner", "Ann")
    kvbuy("sign", other.path.name)
    shown.commit({"doc.kv.sig.json": (tmp_path / "other.kv.sig.json").read_bytes()})
    refused = kvbuy("pull", "ann/docs", "--out", "there", "--require-signature")
    assert refused.returncode == 3
    assert "is not signed" in refused.stderr
    assert list((tmp_path / "there").iterdir()) == []


def test_blocks_come_apart_and_a_later_pull_fetches_the_rest(
    kvbuy: Kvbuy, hub: Hub, shown: Repository, artifact: Artifact, tmp_path: Path
) -> None:
    some = kvbuy("pull", "ann/docs", "--blocks", "0:2", "--out", "there", "--json")
    assert some.returncode == 0, some.stderr
    [found] = json.loads(some.stdout)["artifacts"]
    assert (found["blocks"], found["of_blocks"]) == (2, 4)
    assert not (tmp_path / "there" / NAME).exists()
    assert (tmp_path / "there" / f"{NAME}.part").exists()
    hub.requests.clear()
    rest = kvbuy("pull", "ann/docs", "--out", "there")
    assert rest.returncode == 0, rest.stderr
    assert (tmp_path / "there" / NAME).read_bytes() == artifact.path.read_bytes()
    assert not (tmp_path / "there" / f"{NAME}.part").exists()
    assert "has blocks 0:4" in kvbuy("pull", "ann/docs", "--blocks", "2:9", "--out", "more").stderr


def test_without_the_hub_what_is_cached_is_taken(kvbuy: Kvbuy, hub: Hub, shown: Repository, tmp_path: Path) -> None:
    address = f"hf://ann/docs/{NAME}"
    assert kvbuy("inspect", address, "--json").returncode == 0
    offline = kvbuy("inspect", address, "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["id"] == Artifact.open(tmp_path / NAME).id
    unreachable = kvbuy("inspect", address, "--json", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 0, unreachable.stderr
    never = kvbuy("inspect", "hf://ann/never", HF_HUB_OFFLINE="1")
    assert never.returncode == 1
    assert "HF_HUB_OFFLINE" in never.stderr or "not here" in never.stderr


def test_addresses() -> None:
    assert parse_address("hf://a/b@main/c.kv.safetensors") == Address("a/b", "main", "c.kv.safetensors")
    assert parse_address("a/b") == Address("a/b", None, None)
    with pytest.raises(UsageError):
        parse_address("hf://a")


@pytest.mark.parametrize("text", ["3", "3:3", "-1:2", "a:b", ":"])
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no blocks"):
        parse_blocks(text)
