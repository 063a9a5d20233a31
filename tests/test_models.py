import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SaveModel, byte_tokenizer, tiny_llama

from kvbuy.errors import ModelError
from kvbuy.models import Model, adopt_model, find_model, load_model, processor_name
from kvbuy.resolve import resolve_model


def quiet(_: str) -> None:
    pass


def test_a_local_folder_s_label_is_its_name(llama_folder: Path) -> None:
    folder, label = resolve_model(str(llama_folder), say=quiet)
    assert (folder, label.name, label.revision) == (llama_folder, "tiny-llama", None)


def test_the_environment_names_the_default_model(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUY_MODEL", str(llama_folder))
    assert find_model().label.name == "tiny-llama"


def test_dtype_defaults_to_the_model_s_own(llama: Model, llama_folder: Path) -> None:
    assert llama.model.dtype == torch.bfloat16
    assert load_model(str(llama_folder), dtype="float32").model.dtype == torch.float32


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a model folder: it has no config\.json"):
        find_model(str(tmp_path))


def test_a_name_that_can_be_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(ModelError, match="neither a folder nor a Hub id"):
        find_model("no such: model/at/all")


def test_a_model_that_is_nowhere_is_refused_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        find_model("kvbuy/no-such-model")
    assert caught.value.hint is not None


def test_an_unknown_device_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="there is no device 'tpu9'"):
        load_model(str(llama_folder), device="tpu9")


def test_weights_that_are_not_safetensors_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="has no safetensors weights"):
        find_model(str(tmp_path))


def test_an_adopted_model_has_the_fingerprint_of_its_folder(llama: Model, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    adopted = adopt_model(AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16))
    assert adopted.fingerprint == llama.fingerprint
    assert adopted.attention == "sdpa"


def test_the_profile_names_what_decides_rounding(llama: Model) -> None:
    profile = llama.profile(64)
    assert (profile.block_size, profile.device, profile.attention) == (64, "cpu", "kvbuy_grouped")
    assert profile.processor == processor_name(torch.device("cpu"))


def test_a_sharded_model_has_a_fingerprint(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_model(str(save_model(tiny_llama())))
    model.model.save_pretrained(tmp_path, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_model(str(tmp_path)).fingerprint.config == model.fingerprint.config


def test_weights_that_lack_a_tensor_are_refused_not_made_up(llama_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama_folder, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its weights lack 1 tensors, model"):
        load_model(str(tmp_path / "model"))


def test_junk_weights_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ModelError, match="transformers cannot load the model"):
        load_model(str(tmp_path / "model"))


def test_a_model_s_own_code_is_never_run(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(str(tmp_path / "model"))


def test_a_model_from_no_folder_cannot_be_adopted() -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ModelError, match="cannot be identified"):
        adopt_model(AutoModelForCausalLM.from_config(tiny_llama(), dtype=torch.bfloat16))
