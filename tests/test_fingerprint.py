"""Identity: every byte that changes the values changes the fingerprint, and no label does."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbuy.errors import ModelError
from kvbuy.fingerprint import file_sha256, fingerprint_differences, model_fingerprint, profile_differences
from kvbuy.manifest import Fingerprint, Profile

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000.0, "_name_or_path": "here", "dtype": "float32"}
TOKENIZER_CONFIG = {"eos_token": "<end>", "name_or_path": "here"}
HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # the SHA-256 of "hello"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hash memory, in a cache of the test's own."""
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a model folder holds, as far as identity goes."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"hello")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"r": 8, "base_model_name_or_path": "here"})
    (folder / "adapter_model.safetensors").write_bytes(b"hello")
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def change_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def fingerprint(folder: Path, *adapters: Path) -> Fingerprint:
    return model_fingerprint(folder, dtype="F32", adapters=adapters)


def changed_parts(one: Fingerprint, other: Fingerprint) -> list[str]:
    found = other.model_dump()
    return [part for part, value in one.model_dump().items() if value != found[part]]


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a byte of the weights": ("weights", lambda at: (at / "model.safetensors").write_bytes(b"hellp")),
    "a value of the config": ("config", lambda at: change_json(at / "config.json", rope_theta=10001.0)),
    "a new key of the config": ("config", lambda at: change_json(at / "config.json", attention_bias=True)),
    "a byte of the tokenizer": ("tokenizer", lambda at: (at / "tokenizer.json").write_text("[]")),
    "another tokenizer file": ("tokenizer", lambda at: (at / "tokenizer.model").write_text("hello")),
    "a setting of the tokenizer": ("tokenizer", lambda at: change_json(at / "tokenizer_config.json", add_bos=True)),
    "an added token": ("tokenizer", lambda at: write_json(at / "added_tokens.json", {"<end>": 256})),
    "a byte of the chat template": (
        "chat_template",
        lambda at: (at / "chat_template.jinja").write_text("{{ message }}"),
    ),
    "no chat template": ("chat_template", lambda at: (at / "chat_template.jinja").unlink()),
    "quantisation": ("quantization", lambda at: change_json(at / "config.json", quantization_config={"bits": 4})),
}


@pytest.mark.parametrize(("part", "change"), CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_changes_with(part: str, change: Callable[[Path], object], folder: Path) -> None:
    before = fingerprint(folder)
    change(folder)
    assert changed_parts(before, fingerprint(folder)) == [part]


def test_the_fingerprint_changes_with_the_dtype(folder: Path) -> None:
    assert changed_parts(fingerprint(folder), model_fingerprint(folder, dtype="BF16")) == ["dtype"]


def test_the_fingerprint_changes_with_the_quantisation_s_bits(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"bits": 4})
    before = fingerprint(folder)
    change_json(folder / "config.json", quantization_config={"bits": 8})
    assert changed_parts(before, fingerprint(folder)) == ["quantization"]


def test_an_adapter_changes_the_fingerprint(folder: Path, adapter: Path) -> None:
    with_adapter = fingerprint(folder, adapter)
    assert changed_parts(fingerprint(folder), with_adapter) == ["adapters"]
    (adapter / "adapter_model.safetensors").write_bytes(b"hellp")
    assert changed_parts(with_adapter, fingerprint(folder, adapter)) == ["adapters"]


def test_an_adapter_s_setting_changes_the_fingerprint_but_its_base_s_name_does_not(folder: Path, adapter: Path) -> None:
    before = fingerprint(folder, adapter)
    change_json(adapter / "adapter_config.json", base_model_name_or_path="elsewhere")
    assert fingerprint(folder, adapter) == before
    change_json(adapter / "adapter_config.json", r=16)
    assert changed_parts(before, fingerprint(folder, adapter)) == ["adapters"]


def test_a_template_inside_the_tokenizer_s_settings_is_the_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    before = fingerprint(folder)
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    assert before.chat_template is None
    assert changed_parts(before, fingerprint(folder)) == ["chat_template"]


LABELS: dict[str, Callable[[Path], object]] = {
    "the name in the config": lambda at: change_json(at / "config.json", _name_or_path="elsewhere"),
    "the version of transformers": lambda at: change_json(at / "config.json", transformers_version="9.9"),
    "the dtype it was saved in": lambda at: change_json(at / "config.json", dtype="bfloat16", torch_dtype="bfloat16"),
    "the name in the tokenizer": lambda at: change_json(at / "tokenizer_config.json", name_or_path="elsewhere"),
    "the order of the config's keys": lambda at: write_json(at / "config.json", dict(reversed(CONFIG.items()))),
    "a file beside the model": lambda at: (at / "README.md").write_text("hello"),
}


@pytest.mark.parametrize("change", LABELS.values(), ids=LABELS)
def test_the_fingerprint_does_not_change_with(change: Callable[[Path], object], folder: Path) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) == before


def test_a_renamed_and_a_copied_folder_have_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    copied = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(copied) == before
    assert fingerprint(folder.rename(tmp_path / "renamed")) == before


def split_weights(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"hello")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {f"{name}.w": name for name in names}})


@pytest.mark.parametrize(
    "names",
    [("one.safetensors", "two.safetensors"), ("one/w.safetensors", "two/w.safetensors")],
    ids=["flat", "folders"],
)
@pytest.mark.parametrize("at", [0, 1])
def test_every_file_of_split_weights_counts(names: tuple[str, str], at: int, folder: Path) -> None:
    split_weights(folder, *names)
    before = fingerprint(folder)
    (folder / names[at]).write_bytes(b"hellp")
    assert changed_parts(before, fingerprint(folder)) == ["weights"]


def test_a_config_that_holds_infinity_has_a_fingerprint(folder: Path) -> None:
    """As Mamba 2's `time_step_limit` does on the Hub."""
    before = fingerprint(folder)
    change_json(folder / "config.json", time_step_limit=[0.0, float("inf")])
    assert changed_parts(before, fingerprint(folder)) == ["config"]


def hub_file(cache: Path, raw: bytes, *, blob: str) -> Path:
    """A file as the Hub's cache keeps it: a name in a snapshot that links to a blob."""
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / blob).write_bytes(raw)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    path = cache / "snapshots" / "abc" / "model.safetensors"
    path.symlink_to(Path("../../blobs") / blob)
    return path


def test_a_blob_of_the_hub_s_cache_is_named_not_hashed(tmp_path: Path, memory: Path) -> None:
    path = hub_file(tmp_path / "hub", b"not hashed, so the bytes do not matter here", blob=HELLO)
    assert file_sha256(path) == HELLO
    assert not memory.exists()


def test_a_blob_named_by_its_git_hash_is_hashed(tmp_path: Path) -> None:
    path = hub_file(tmp_path / "hub", b"hello", blob="b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0")
    assert file_sha256(path) == HELLO


def test_a_model_in_the_hub_s_cache_has_the_fingerprint_of_its_copy(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(hub_file(tmp_path / "hub", b"hello", blob=HELLO))
    assert fingerprint(folder) == before


def test_a_file_is_hashed_once_and_remembered(tmp_path: Path, memory: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"hello")
    assert file_sha256(path) == HELLO
    (key,) = json.loads(memory.read_text())
    write_json(memory, {key: "0" * 64})
    assert file_sha256(path) == "0" * 64


@pytest.mark.parametrize(("raw", "later"), [(b"hello!", 0), (b"hellp", 1)], ids=["another size", "another time"])
def test_a_changed_file_is_hashed_anew(raw: bytes, later: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"hello")
    before, time = file_sha256(path), path.stat().st_mtime_ns
    path.write_bytes(raw)
    os.utime(path, ns=(time, time + later))
    assert before == HELLO != file_sha256(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_broken_memory_is_ignored_and_replaced(raw: bytes, tmp_path: Path, memory: Path) -> None:
    memory.parent.mkdir()
    memory.write_bytes(raw)
    (tmp_path / "weights").write_bytes(b"hello")
    assert file_sha256(tmp_path / "weights") == HELLO
    assert list(json.loads(memory.read_text()).values()) == [HELLO]
    assert list(memory.parent.iterdir()) == [memory]


def test_a_memory_that_cannot_be_written_costs_only_the_hashing(tmp_path: Path, memory: Path) -> None:
    memory.parent.write_text("a file where the cache's folder should be")
    (tmp_path / "weights").write_bytes(b"hello")
    assert file_sha256(tmp_path / "weights") == HELLO


def test_a_model_without_safetensors_is_refused_with_the_advice_to_convert(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="the model 'model' has no safetensors weights") as caught:
        fingerprint(folder)
    assert caught.value.hint == "convert it once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model folder: it has no config\.json") as caught:
        fingerprint(tmp_path)
    assert caught.value.hint == "give --model a folder saved with save_pretrained, or a Hub id"


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "the model 'model' has no tokenizer"),
    "a config that is no JSON": (lambda at: (at / "config.json").write_text("{"), r"cannot read config\.json of"),
    "a config that is no object": (lambda at: write_json(at / "config.json", []), r"config\.json .* is no JSON object"),
    "a missing part": (
        lambda at: write_json(at / "model.safetensors.index.json", {"weight_map": {"w": "gone.safetensors"}}),
        r"cannot read gone\.safetensors of the model: No such file",
    ),
    "an index without its map": (lambda at: write_json(at / "model.safetensors.index.json", {}), "index"),
    "an index with a list": (lambda at: write_json(at / "model.safetensors.index.json", {"weight_map": []}), "index"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_is_refused(change: Callable[[Path], object], message: str, folder: Path) -> None:
    change(folder)
    if (folder / "model.safetensors.index.json").exists():
        (folder / "model.safetensors").unlink(missing_ok=True)  # which would be taken first
    with pytest.raises(ModelError, match=message):
        fingerprint(folder)


def test_an_adapter_without_weights_is_refused(folder: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the adapter 'adapter' has no adapter_model\.safetensors"):
        fingerprint(folder, adapter)


def test_differences_name_the_parts(folder: Path, adapter: Path) -> None:
    wanted = fingerprint(folder)
    found = model_fingerprint(folder, dtype="BF16", adapters=[adapter])
    found = found.model_copy(update={"weights": "0" * 64, "chat_template": None})
    assert fingerprint_differences(wanted, found) == (
        f"weights: artifact {wanted.weights[:12]}..., here 000000000000...",
        f"chat template: artifact {str(wanted.chat_template)[:12]}..., here none",
        "dtype: artifact F32, here BF16",
        f"adapters: artifact none, here {found.adapters[0][:12]}...",
    )


def test_equal_fingerprints_have_no_differences(folder: Path) -> None:
    assert fingerprint_differences(fingerprint(folder), fingerprint(folder)) == ()


def test_profile_differences_name_the_parts() -> None:
    wanted = Profile(block_size=512, attention="sdpa", torch="2.14", transformers="5.23", device="cpu", processor="x86")
    found = wanted.model_copy(update={"block_size": 256, "device": "cuda"})
    assert profile_differences(wanted, found) == (
        "block size: artifact 512, here 256",
        "device: artifact cpu, here cuda",
    )


def test_the_single_file_counts_where_an_index_lies_beside_it(folder: Path) -> None:
    """As transformers looks for it: what is hashed is what runs."""
    before = fingerprint(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": "other.safetensors"}})
    (folder / "other.safetensors").write_bytes(b"other")
    assert fingerprint(folder) == before


def test_an_adapter_inside_a_model_folder_is_refused(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ModelError, match="holds an adapter too"):
        fingerprint(folder)
