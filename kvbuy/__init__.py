"""kvbuy: a document's KV cache, computed once, verified, and loaded instead of prefilled.

    import kvbuy

    model = kvbuy.load_model()
    made = kvbuy.precompute(text, Path("doc.kv.safetensors"), model=model, name="doc.txt")
    answer = kvbuy.generate(made.artifact, "What does it say?", model=model)
    verdict = kvbuy.verify(made.artifact)

Names are loaded when they are first used: `import kvbuy` costs nothing, and only what runs a model imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvbuy.artifact import Artifact as Artifact
    from kvbuy.decode import Sampling as Sampling
    from kvbuy.errors import KvbuyError as KvbuyError
    from kvbuy.manifest import Manifest as Manifest
    from kvbuy.models import Model as Model
    from kvbuy.models import load_model as load_model
    from kvbuy.prefill import precompute as precompute
    from kvbuy.recode import convert as convert
    from kvbuy.replay import verify as verify
    from kvbuy.reuse import Conversation as Conversation
    from kvbuy.reuse import generate as generate
    from kvbuy.reuse import load as load
    from kvbuy.verdict import Verdict as Verdict

_HOMES = {
    "Artifact": "artifact",
    "Conversation": "reuse",
    "KvbuyError": "errors",
    "Manifest": "manifest",
    "Model": "models",
    "Sampling": "decode",
    "Verdict": "verdict",
    "convert": "recode",
    "generate": "reuse",
    "load": "reuse",
    "load_model": "models",
    "precompute": "prefill",
    "verify": "replay",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvbuy' has no attribute {name!r}")
    value = getattr(import_module(f"kvbuy.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
