"""Models: a loaded transformers model with its identity. Knows nothing of documents or artifacts' files."""

import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from kvbuy.attention import use_best_attention
from kvbuy.cache import DTYPES, NAMES, describe_layers, empty_cache, refuse_unfilled, state_tensors
from kvbuy.errors import DamagedError, DocumentError, MisfitError, ModelError
from kvbuy.fingerprint import fingerprint_differences, model_fingerprint, read_json
from kvbuy.manifest import Fingerprint, Layer, Manifest, ModelLabel, Profile, StateTensor
from kvbuy.resolve import Say, loading, resolve_label, resolve_model

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")

ONLY_HERE = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Model:
    """A loaded model and its identity.

    `label` is where it came from, `attention` what it runs with; `layers` and `state` describe its cache.
    """

    model: PreTrainedModel
    tokenizer: Any
    fingerprint: Fingerprint
    label: ModelLabel
    attention: str
    layers: tuple[Layer, ...]
    state: tuple[StateTensor, ...]

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def context(self) -> int:
        """The most tokens that the model was made for."""
        return context_length(self.model.config)

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
        with loading(self.label):
            return AutoTokenizer.from_pretrained(self.folder, **ONLY_HERE)

    def config(self) -> PreTrainedConfig:
        """The model's config, as transformers reads it (ModelError where it cannot)."""
        with loading(self.label):
            return AutoConfig.from_pretrained(self.folder, **ONLY_HERE)

    def load(self, device: str | None = None) -> Model:
        """Load it, on cuda, mps or cpu where no device is named.

        Raises:
            ModelError: transformers cannot load or run it here.
        """
        place = choose_device(device)
        if place.type == "cuda":
            use_deterministic_kernels()
        tokenizer = self.tokenizer()
        dtype = DTYPES[self.fingerprint.dtype]
        with loading(self.label):
            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, output_loading_info=True, **ONLY_HERE
            )
            if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
                raise ValueError(f"its weights lack {len(missing)} tensors, {missing[0]} for one")
            for adapter in self.adapters:
                model = _adapt(model, adapter)
            if model.device != place and self.fingerprint.quantization is None:
                model = model.to(place)
            model.eval()
            attention = use_best_attention(model)
            layers, state = _probe(model)
        return Model(model, tokenizer, self.fingerprint, self.label, attention, layers, state)


def find_model(
    name: str | None = None, *, adapter: str | None = None, dtype: str | None = None, say: Say = lambda _: None
) -> FoundModel:
    """Find a model by name; without one, the default that fits this machine. `say` is told what was chosen.

    `dtype` ("bfloat16", "float16", "float32") defaults to the model's own. `adapter` is a PEFT adapter's folder or id.

    Raises:
        ModelError: not found or not readable.
    """
    folder, label = resolve_model(name, say=say)
    adapters = () if not adapter else (resolve_model(adapter, say=say)[0],)
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
    folder, label = resolve_model(name, say=say) if name else resolve_label(manifest.model, say=say)
    adapters = () if not adapter else (resolve_model(adapter, say=say)[0],)
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


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens that a model was made for."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else 2**31


def adopt_model(model: PreTrainedModel, tokenizer: Any = None) -> Model:
    """Identify a transformers model that the caller loaded, from the folder or Hub snapshot it came from.

    Its attention is left as it is. Weights changed in memory since cannot be seen.
    """
    name, commit = str(model.config._name_or_path), getattr(model.config, "_commit_hash", None)
    if not name or getattr(model, "_hf_peft_config_loaded", False) or model.dtype not in NAMES:
        raise ModelError(
            "this model cannot be identified: it comes from no folder, or has adapters or another dtype",
            hint="load it with kvbuy.load_model",
        )
    folder, label = resolve_model(
        f"{name}@{commit}" if commit and not Path(name).is_dir() else name, say=lambda _: None
    )
    fingerprint = model_fingerprint(folder, dtype=NAMES[model.dtype])
    layers, state = _probe(model)
    return Model(model, tokenizer, fingerprint, label, model.config._attn_implementation, layers, state)


def refuse_misfit(manifest: Manifest, fingerprint: Fingerprint) -> None:
    """Raise MisfitError where the artifact's fingerprint is not this one."""
    if differences := fingerprint_differences(manifest.fingerprint, fingerprint):
        raise MisfitError(
            f"the artifact was made with another model than this one ({manifest.model.name})",
            differences=differences,
            hint="give --model the one it was made with, or precompute the document with yours",
        )


def refuse_foreign_shapes(manifest: Manifest, model: Model) -> None:
    """Raise DamagedError where an artifact's layers or state are not of the kinds and sizes that the model makes."""
    if manifest.layers != model.layers:
        raise DamagedError("the artifact's layers are not those that this model makes")
    wanted = {(tensor.layer, tensor.name): (tensor.dtype, *_free_rows(tensor)) for tensor in model.state}
    found = {(tensor.layer, tensor.name): (tensor.dtype, *_free_rows(tensor)) for tensor in manifest.state}
    if wanted != found:
        raise DamagedError("the artifact's state is not that which this model makes")


def refuse_too_long(model: Model, tokens: int, *, extra: int) -> None:
    """Raise DocumentError where a document of `tokens` and `extra` tokens after it exceed the model's context."""
    if tokens + extra > model.context:
        raise DocumentError(
            f"{tokens} tokens and {extra} that come after them do not fit into the {model.context} tokens of context "
            f"that {model.label.name} has",
            hint="split the document, take a model with a longer context, or generate fewer tokens",
        )


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


def _adapt(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a PEFT adapter's layers in it. (Its own `load_adapter` refuses all but the newest PEFT.)"""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in yesterday's words
        adapted: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    return adapted


def _dtype(folder: Path, wanted: str | None) -> torch.dtype:
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    name = wanted or config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or dtype not in NAMES:
        raise ModelError(f"kvbuy runs models in bfloat16, float16 or float32, not {name}", hint="give --dtype")
    return dtype


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[tuple[Layer, ...], tuple[StateTensor, ...]]:
    """Run one token: what the model's cache is made of. (And its kernels are warm for the first question.)"""
    cache = empty_cache(model.config, capacity=1)
    model.base_model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), cache=cache)
    refuse_unfilled(cache, model_type=model.config.model_type)
    return describe_layers(cache), tuple(described for described, _ in state_tensors(cache))


def _free_rows(tensor: StateTensor) -> tuple[int, ...]:
    """The shape, without the rows of a window: they grow with the document."""
    return (tensor.shape[0], *tensor.shape[2:]) if tensor.name in ("key", "value") else tensor.shape


def use_deterministic_kernels() -> None:
    """Let CUDA give equal bits for equal work; a kernel that cannot is named in a warning."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the process's first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    # else each stage of a load would be written twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_device(wanted: str | None) -> torch.device:
    """The device that is wanted, or the first there is of cuda, mps and cpu (ModelError where there is none such)."""
    if wanted is None:
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(wanted)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("kvbuy runs on cuda, mps and cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"there is no device {wanted!r} here: {error}", hint="give --device cpu") from error
    return device
