"""Packs: fitted to a model's KV, kept by digest, asked for by name when they are missing; dense artifacts with them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT, SaveModel, tiny_llama
from hub_server import OWNER, serve_hub
from test_cache import COMMON, deepseek_v3, gemma3, lfm2, mistral_all_sliding, qwen3
from transformers import PreTrainedConfig
from typer.testing import CliRunner

from kvbuy.artifact import Artifact, write_artifact
from kvbuy.calibrate import (
    Fitted,
    cut_samples,
    depends_on_tokens_alone,
    find_rotations,
    fit_pack,
    pack_layers,
    sample_kv,
)
from kvbuy.cli import app
from kvbuy.codec import Encoded
from kvbuy.codec.arrays import Array
from kvbuy.codec.dense import DenseCoder
from kvbuy.codec.fit import Sample
from kvbuy.codec.load import keep_pack
from kvbuy.codec.pack import add_pack, find_pack, find_pack_for, list_packs, pack_folder, read_pack
from kvbuy.decode import greedy
from kvbuy.docstrings import LENGTH, calibration_texts
from kvbuy.errors import DamagedError, DocumentError, PackError, StoreError, UsageError
from kvbuy.measure import measure
from kvbuy.models import Model, load_model
from kvbuy.parts import DenseCodec
from kvbuy.prefill import Precomputed, precompute
from kvbuy.reader import Reader, check_contents
from kvbuy.recode import convert
from kvbuy.replay import verify
from kvbuy.reuse import load_document

CALIBRATION = [topics["specialnames"][:7_000]]  # of the byte tokenizer's tokens


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that no test finds another one's pack."""
    keep_pack.cache_clear()
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama_pack(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVBUY_CACHE", str(tmp_path_factory.mktemp("publisher")))
        return fit_pack(llama, CALIBRATION)


@pytest.fixture
def fitted(llama_pack: Fitted) -> Fitted:
    """The tiny Llama's pack, in the store."""
    return replace(llama_pack, path=add_pack(*read_pack(llama_pack.path)))


def glm4() -> PreTrainedConfig:
    """Half of each key turns, in pairs of neighbours."""
    return transformers.Glm4Config(**COMMON, num_hidden_layers=2, partial_rotary_factor=0.5)


def smollm3() -> PreTrainedConfig:
    """Every second layer's keys do not turn."""
    return transformers.SmolLM3Config(**COMMON, num_hidden_layers=2, no_rope_layer_interval=2)


@pytest.mark.parametrize(
    "config",
    [tiny_llama, qwen3, gemma3, lfm2, deepseek_v3, glm4, smollm3],
    ids=lambda config: config.__name__,
)
def test_a_dense_artifact_holds_the_same_blocks_and_continues_bit_for_bit(
    config: Callable[[], PreTrainedConfig], save_model: SaveModel, tmp_path: Path
) -> None:
    model = load_model(str(save_model(config())))
    fit_pack(model, CALIBRATION)
    raw = precompute(TEXT[:200], tmp_path / "doc.kv.safetensors", model=model, name="doc.txt", block_size=64).artifact
    dense = convert(raw, codec="dense").artifact
    assert dense.manifest.stored_kv_bytes() < raw.manifest.kv_bytes()
    assert dense.manifest.with_codec("raw") == raw.manifest

    rows = model.tokenizer("What then?")["input_ids"]
    loaded = [load_document(Artifact.open(one.path), model) for one in (raw, dense)]
    (tokens, logits), (dense_tokens, dense_logits) = (
        greedy(model, one.cache, rows, max_new_tokens=6) for one in loaded
    )
    assert torch.equal(logits, dense_logits)
    assert tokens == dense_tokens
    again = convert(dense, tmp_path / "again.kv.safetensors", codec="raw").artifact
    assert again.path.read_bytes() == raw.path.read_bytes()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (tiny_llama, [[0, 8], [1, 9]]),
        (gemma3, [[0, 8], [1, 9]]),
        (glm4, [[0, 1], [2, 3]]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_how_keys_turn_is_found_by_trying(
    config: Callable[[], PreTrainedConfig], wanted: list[list[int]], save_model: SaveModel
) -> None:
    model = load_model(str(save_model(config())))
    layers = pack_layers(model)
    sample = sample_kv(model, cut_samples(model, CALIBRATION)[0])
    angles, rotations = find_rotations(model, layers, sample)
    for keys, values in rotations:
        assert keys.planes[:2].tolist() == wanted
        assert angles[keys.frequency[0]] == 1.0
        assert (np.diff(angles[keys.frequency]) < 0).all()
        assert not len(values.planes)


def test_a_layer_whose_keys_do_not_turn_is_found_too(save_model: SaveModel) -> None:
    model = load_model(str(save_model(smollm3())))
    sample = sample_kv(model, cut_samples(model, CALIBRATION)[0])
    _, rotations = find_rotations(model, pack_layers(model), sample)
    assert [len(keys.planes) for keys, _ in rotations] == [8, 0]


def test_latent_attention_turns_in_what_its_cache_calls_values(save_model: SaveModel) -> None:
    model = load_model(str(save_model(deepseek_v3())))
    sample = sample_kv(model, cut_samples(model, CALIBRATION)[0])
    _, rotations = find_rotations(model, pack_layers(model), sample)
    assert [(len(latent.planes), len(rotary.planes)) for latent, rotary in rotations] == [(0, 4)] * 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_have_packs_of_their_own(llama_folder: Path, fitted: Fitted, dtype: str, tmp_path: Path) -> None:
    model = load_model(str(llama_folder), dtype=dtype)
    with pytest.raises(PackError, match="for this model and dtype"):
        precompute(TEXT[:100], tmp_path / "a.kv.safetensors", model=model, name="a", codec="dense")
    other = fit_pack(model, CALIBRATION)
    made = precompute(TEXT[:100], tmp_path / "a.kv.safetensors", model=model, name="a", codec="dense").artifact
    assert made.manifest.codec_name == "dense"
    assert other.pack.facts.dtype != fitted.pack.facts.dtype
    check_contents(made)


def test_a_pack_is_found_by_its_digest_and_by_its_model(llama: Model, fitted: Fitted) -> None:
    assert find_pack(fitted.pack.digest).facts == fitted.pack.facts
    assert find_pack_for(llama.fingerprint.sha256()) == fitted.pack.digest
    assert find_pack_for("0" * 64) is None
    assert fitted.path == pack_folder() / f"{fitted.pack.digest}.pack.safetensors"


def test_the_newest_pack_of_a_model_is_taken(llama: Model, fitted: Fitted) -> None:
    newer = fit_pack(llama, [topics["debugger"][:7_000]])
    assert find_pack_for(llama.fingerprint.sha256()) == newer.pack.digest
    os.utime(fitted.path, (2**31, 2**31))
    assert [one.digest for one in list_packs()] == [fitted.pack.digest, newer.pack.digest]


def test_what_is_no_pack_is_not_listed_and_not_added(llama: Model, fitted: Fitted, tmp_path: Path) -> None:
    stray = pack_folder() / f"{'1' * 64}.pack.safetensors"
    stray.write_bytes(b"\xff" * 20)
    assert [one.digest for one in list_packs()] == [fitted.pack.digest]
    with pytest.raises(DamagedError, match="no kvbuy pack"):
        find_pack("1" * 64)


def test_a_damaged_pack_is_not_used(fitted: Fitted) -> None:
    raw = bytearray(fitted.path.read_bytes())
    raw[-1] ^= 1
    fitted.path.write_bytes(raw)
    with pytest.raises(DamagedError, match="is not the pack that its name says"):
        find_pack(fitted.pack.digest)


def test_without_its_pack_a_dense_artifact_says_where_to_get_it(
    llama: Model, fitted: Fitted, made: Precomputed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense = convert(made.artifact, codec="dense").artifact
    keep_pack.cache_clear()
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path / "another"))
    with pytest.raises(PackError, match=fitted.pack.digest[:12]) as caught:
        load_document(dense, llama)
    assert caught.value.hint is not None
    assert "kvbuy pack add" in caught.value.hint
    with pytest.raises(PackError):
        convert(dense, codec="fast")


def test_inspect_names_the_pack_and_says_whether_it_is_here(fitted: Fitted, made: Precomputed) -> None:
    dense = convert(made.artifact, codec="dense").artifact
    shown = CliRunner().invoke(app, ["inspect", str(dense.path)], env={"COLUMNS": "200"}).stdout
    assert f"{fitted.pack.digest} (here)" in shown
    fitted.path.unlink()
    shown = CliRunner().invoke(app, ["inspect", str(dense.path)], env={"COLUMNS": "200"}).stdout
    assert f"{fitted.pack.digest} (not here: kvbuy pack pull REPO, or kvbuy pack add FILE)" in shown


def test_another_model_s_pack_is_refused(
    llama: Model, fitted: Fitted, made: Precomputed, save_model: SaveModel, tmp_path: Path
) -> None:
    other = fit_pack(load_model(str(save_model(tiny_llama(), seed=1))), CALIBRATION)
    dense = convert(made.artifact, codec="dense").artifact
    codec = DenseCodec(name="dense", pack=other.pack.digest, sizes=dense.manifest.codec.sizes)  # type: ignore[union-attr]
    data = dense.path.read_bytes()[dense.header_bytes :]
    forged = write_artifact(tmp_path / "forged.kv.safetensors", dense.manifest.with_codec(codec), [data])
    with pytest.raises(DamagedError, match="belongs to another model"):
        Reader.open(forged)


def test_without_numba_the_extra_is_named(made: Precomputed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbuy.errors.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="numba") as caught:
        convert(made.artifact, codec="dense")
    assert caught.value.hint == "pip install 'kvbuy[dense]'"


def test_a_block_that_cannot_be_read_lets_nobody_wait_for_ever(
    fitted: Fitted, made: Precomputed, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = convert(made.artifact, codec="dense").artifact
    assert len(dense.manifest.blocks) > 2
    read = Artifact.read_piece

    def broken(self: Artifact, piece: object) -> memoryview:
        if getattr(piece, "name", "") == "block.1":
            raise StoreError("the disk is on fire")
        return read(self, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(Artifact, "read_piece", broken)
    with pytest.raises(StoreError, match="on fire"):
        list(Reader.open(dense).load_blocks())


def test_a_block_that_cannot_be_encoded_lets_nobody_wait_for_ever(
    fitted: Fitted, made: Precomputed, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = DenseCoder.encode_block

    def broken(self: DenseCoder, index: int, tensors: Sequence[Array]) -> Encoded:
        if index == 1:
            raise MemoryError("no room")
        return encode(self, index, tensors)

    monkeypatch.setattr(DenseCoder, "encode_block", broken)
    with pytest.raises(MemoryError, match="no room"):
        convert(made.artifact, codec="dense")


def test_blocks_nobody_wants_any_more_let_nobody_wait_for_ever(fitted: Fitted, made: Precomputed) -> None:
    blocks = Reader.open(convert(made.artifact, codec="dense").artifact).load_blocks()
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]


def test_measure_weighs_dense_as_convert_writes_it(fitted: Fitted, made: Precomputed) -> None:
    dense = convert(made.artifact, codec="dense").artifact
    for artifact in (made.artifact, dense):
        found = {codec.name: codec for codec in measure(artifact).codecs}["dense"]
        assert found.bytes == dense.manifest.stored_kv_bytes()
        assert len(found.layers) == 2
    fitted.path.write_bytes(b"nothing")
    keep_pack.cache_clear()
    assert [one.name for one in measure(made.artifact).absent] == ["dense"]


def test_a_first_layer_that_knows_positions_is_not_taken_for_one_that_does_not(llama: Model) -> None:
    sample = sample_kv(llama, cut_samples(llama, CALIBRATION)[0])
    assert depends_on_tokens_alone(sample)
    moved = sample.tensors[1] + np.arange(len(sample.token_ids), dtype=np.uint16)[:, None]
    assert not depends_on_tokens_alone(Sample(sample.token_ids, [sample.tensors[0], moved]))


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"__metadata__": []}', b'{"__metadata__": {"kvbuy_pack": "{}"}}'])
def test_a_stray_file_in_the_store_hides_no_pack(fitted: Fitted, header: bytes) -> None:
    stray = pack_folder() / f"{'1' * 64}.pack.safetensors"
    stray.write_bytes(len(header).to_bytes(8, "little") + header)
    (pack_folder() / f"{'2' * 64}.pack.safetensors").symlink_to("nowhere")
    (pack_folder() / "mine.pack.safetensors").write_bytes(fitted.path.read_bytes())
    assert [one.digest for one in list_packs()] == [fitted.pack.digest]
    with pytest.raises(DamagedError, match="no kvbuy pack"):
        read_pack(stray)


def test_a_document_too_long_for_dense_is_refused_before_the_prefill(
    llama: Model, fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbuy.codec.load.LONGEST", 99)
    monkeypatch.setattr("kvbuy.prefill.prefill", None)
    with pytest.raises(UsageError, match="at most 99 tokens, not 100"):
        precompute(TEXT[:100], tmp_path / "a.kv.safetensors", model=llama, name="a", codec="dense")


def test_a_damaged_dense_block_is_found(llama: Model, fitted: Fitted, made: Precomputed) -> None:
    dense = convert(made.artifact, codec="dense").artifact
    piece = dense.manifest.pieces()[1]
    raw = bytearray(dense.path.read_bytes())
    raw[dense.header_bytes + (piece.start + piece.end) // 2] ^= 1
    dense.path.write_bytes(raw)
    with pytest.raises(DamagedError, match="block 1"):
        load_document(dense, llama)


def test_a_dense_artifact_is_verified_exact(llama_folder: Path, fitted: Fitted, made: Precomputed) -> None:
    dense = convert(made.artifact, codec="dense").artifact
    assert verify(dense, model=str(llama_folder)).name == "exact"


def test_a_model_without_full_layers_needs_no_pack(save_model: SaveModel) -> None:
    model = load_model(str(save_model(mistral_all_sliding())))
    with pytest.raises(UsageError, match="no full-attention layers"):
        fit_pack(model, CALIBRATION)


def test_too_little_text_is_refused(llama: Model) -> None:
    with pytest.raises(DocumentError, match="too few"):
        fit_pack(llama, ["a few words"])


def test_the_default_text_is_there_and_holds_no_licence() -> None:
    texts = calibration_texts()
    assert len(texts) * LENGTH > 64 * 1024 * 4
    assert all(len(text) == LENGTH for text in texts)
    assert not any("licen" in text.lower() for text in texts)


def test_pack_fit_add_and_ls_speak_json(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION[0])
    run = CliRunner()
    done = run.invoke(app, ["pack", "fit", "--model", str(llama_folder), "--text", str(text), "--json"])
    fitted = json.loads(done.stdout)
    assert fitted["ratio"] < fitted["fast_ratio"]
    assert fitted["pays_after_tokens"] > 0
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path / "buyer"))
    assert json.loads(run.invoke(app, ["pack", "ls", "--json"]).stdout) == {"packs": []}
    added = json.loads(run.invoke(app, ["pack", "add", fitted["path"], "--json"]).stdout)
    listed = json.loads(run.invoke(app, ["pack", "ls", "--json"]).stdout)["packs"]
    assert [(one["digest"], one["path"]) for one in listed] == [(fitted["digest"], added["path"])]
    assert fitted["digest"][:12] in run.invoke(app, ["pack", "ls"]).stdout


def test_a_pack_is_pushed_to_the_hub_and_pulled_from_it(fitted: Fitted, tmp_path: Path) -> None:
    digest, name = fitted.pack.digest, fitted.path.name
    with serve_hub() as hub:

        def kvbuy(*arguments: str, cache: Path) -> "subprocess.CompletedProcess[str]":
            settings = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": OWNER}
            settings |= {"HF_HUB_DISABLE_XET": "1", "KVBUY_CACHE": str(cache)}
            command = [sys.executable, "-m", "kvbuy.cli", "pack", *arguments, "--json"]
            return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

        publisher, buyer = fitted.path.parent.parent, tmp_path / "buyer"
        pushed = kvbuy("push", "me/packs", cache=publisher)
        repository = hub.repositories["me/packs"]
        assert json.loads(pushed.stdout) == {
            "digest": digest,
            "repo": "me/packs",
            "commit": f"{hub.url}/me/packs/commit/{repository.commits[-1][0]}",
        }
        pulled = kvbuy("pull", "me/packs", "--pack", digest[:8], cache=buyer)
        assert json.loads(pulled.stdout) == {"paths": [str(buyer / "packs" / name)]}
        assert read_pack(buyer / "packs" / name)[0].facts == fitted.pack.facts
        missing = kvbuy("pull", "me/packs", "--pack", "f" * 64, cache=buyer)
        assert (missing.returncode, json.loads(missing.stdout)["kind"]) == (1, "PackError")
        repository.commit({name: b"something else"})
        broken = kvbuy("pull", "me/packs", cache=buyer)
        assert (broken.returncode, json.loads(broken.stdout)["kind"]) == (3, "DamagedError")


def test_a_hub_out_of_reach_is_said_to_be(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (["pack", "push", "me/packs"], ["pack", "pull", "me/packs"], ["pack", "pull", "no id at all!"]):
        caught = CliRunner().invoke(app, command).exception
        assert isinstance(caught, StoreError)
        assert caught.hint is not None


def test_precompute_offers_to_fit_where_somebody_is_there_to_ask(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, out = tmp_path / "doc.txt", tmp_path / "doc.kv.safetensors"
    document.write_text(TEXT[:200])
    command = ["precompute", str(document), "--model", str(llama_folder), "--codec", "dense", "--out", str(out)]
    monkeypatch.setattr("kvbuy.cli_pack.somebody_is_there", lambda: True)
    refused = CliRunner().invoke(app, command, input="n\n")
    assert isinstance(refused.exception, PackError)
    assert "Fit one now?" in refused.stderr
    assert not out.exists()
    monkeypatch.setattr("kvbuy.docstrings.calibration_texts", lambda: CALIBRATION)
    monkeypatch.setattr("kvbuy.calibrate.calibration_texts", lambda: CALIBRATION)
    taken = CliRunner().invoke(app, command, input="y\n")
    assert taken.exit_code == 0
    assert Artifact.open(out).manifest.codec_name == "dense"
