"""The README's figures: .venv/bin/python scripts/bench.py DOCUMENT [--tokens 3774] [--sections reuse,load,...]

Everything is measured in one run on this machine, medians over repeats; compare ratios, not seconds. The baseline is
what a careful user writes by hand: transformers' DynamicCache through safetensors.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from kvbuy.artifact import Artifact
from kvbuy.attention import GROUPED, STOCK, grouped_attention, stock_attention
from kvbuy.bench import timing
from kvbuy.cache import empty_cache, load_artifact, reserve_cache
from kvbuy.decode import greedy
from kvbuy.document import read_document
from kvbuy.models import Model, load_model
from kvbuy.prefill import precompute, prefill
from kvbuy.replay import measure_drift, single_pass
from kvbuy.reuse import load_document

PROMPT = "\n\nQuestion: What must a distributor provide?\nAnswer:"
CPU = torch.device("cpu")
Facts = dict[str, object]


def seconds(work: Callable[[], object]) -> float:
    return timing.seconds(work, CPU)


def median(work: Callable[[], object], repeats: int) -> float:
    return timing.median_seconds(work, CPU, repeats=repeats)


def paired(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Medians of two measurements taken in turn, and the median of their ratios."""
    first(), second()
    pairs = [(first(), second()) for _ in range(repeats)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return a, b, statistics.median(x / y for x, y in pairs)


def bench_reuse(model: Model, artifact: Artifact, rows: list[int], folder: Path, repeats: int) -> Facts:
    """Load + first token, and a decode step: kvbuy against the baseline and against a resident cache."""
    loaded = load_document(artifact, model)
    tokens = loaded.cached_tokens
    tensors = {}
    for at, layer in enumerate(loaded.cache.layers):
        tensors |= {f"{at}.key": layer.keys.contiguous(), f"{at}.value": layer.values.contiguous()}
    save_file(tensors, folder / "baseline.safetensors")
    del tensors

    def baseline_load() -> DynamicCache:
        stored = load_file(folder / "baseline.safetensors", device=str(model.device))
        cache = DynamicCache(config=model.model.config)
        for at in range(len(cache.layers)):
            cache.update(stored[f"{at}.key"], stored[f"{at}.value"], at)
        return cache

    def first_token(cache: DynamicCache) -> None:
        greedy(model, cache, rows, max_new_tokens=1)

    def baseline() -> float:
        with stock_attention(model.model):
            return seconds(lambda: first_token(baseline_load()))

    def ours() -> float:
        capacity = tokens + len(rows) + 64
        cache = reserve_cache(model.model.config, artifact.manifest, capacity=capacity, device=model.device, touch=True)
        return seconds(lambda: first_token(load_document(artifact, model, cache=cache).cache))

    def fresh() -> float:
        return seconds(lambda: first_token(load_document(artifact, model, room=len(rows) + 64).cache))

    def resident() -> float:
        for layer in loaded.cache.layers:
            layer.show(tokens)
        return seconds(lambda: first_token(loaded.cache))

    def step(cache: DynamicCache, attention: str) -> float:
        model.model.set_attn_implementation(attention)
        taken = seconds(lambda: greedy(model, cache, [5], max_new_tokens=1))
        cache.crop(-1)
        return taken

    stock = baseline_load()
    reuse, base, ratio = paired(ours, baseline, repeats)
    _, kept, resident_ratio = paired(ours, resident, repeats)
    unreserved, _, fresh_ratio = paired(fresh, baseline, repeats)
    fast, slow, step_ratio = paired(lambda: step(loaded.cache, model.attention), lambda: step(stock, STOCK), repeats)
    model.model.set_attn_implementation(model.attention)
    return {
        "load_and_first_token": reuse,
        "baseline_load_and_first_token": base,
        "ratio_to_baseline": ratio,
        "load_with_allocation_and_first_token": unreserved,
        "ratio_to_baseline_with_allocation": fresh_ratio,
        "resident_first_token": kept,
        "ratio_to_resident": resident_ratio,
        "decode_step": fast,
        "stock_decode_step": slow,
        "decode_speedup": 1 / step_ratio,
    }


def bench_load(model: Model, artifact: Artifact, repeats: int) -> Facts:
    """Blocks into a cache, digests checked, against reading the same bytes into a plain buffer."""
    size = artifact.manifest.kv_bytes()
    buffer = memoryview(bytearray(size))

    def plain() -> float:
        with artifact.path.open("rb", buffering=0) as file:
            return seconds(lambda: file.readinto(buffer))

    config = model.model.config
    cache = reserve_cache(
        config, artifact.manifest, capacity=artifact.manifest.document.tokens + 64, device=model.device
    )

    def load() -> float:
        return seconds(lambda: load_artifact(artifact, cache, reuse="continue", device=model.device))

    ours, floor, ratio = paired(load, plain, repeats)
    hashes = {
        "sha256_gbps": size / 1e9 / median(lambda: hashlib.sha256(buffer).digest(), repeats),
        "blake3_gbps": size / 1e9 / median(lambda: blake3(buffer).digest(), repeats),
    }
    code = (
        "import sys,time\nfrom pathlib import Path\nimport torch\nfrom transformers import AutoConfig\n"
        "from kvbuy.artifact import Artifact\nfrom kvbuy.cache import load_artifact, reserve_cache\n"
        "a=Artifact.open(Path(sys.argv[1])); c=AutoConfig.from_pretrained(sys.argv[2]); d=torch.device(sys.argv[3])\n"
        "t=time.perf_counter(); k=reserve_cache(c,a.manifest,capacity=a.manifest.document.tokens+64,device=d)\n"
        "load_artifact(a,k,reuse='continue',device=d); print(time.perf_counter()-t)"
    )
    command = [sys.executable, "-c", code, str(artifact.path), str(config._name_or_path), model.device.type]
    cold = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    return {
        "bytes": size,
        "load": ours,
        "load_gbps": size / 1e9 / ours,
        "plain_read": floor,
        "plain_read_gbps": size / 1e9 / floor,
        "share_of_plain_read": 1 / ratio,
        "load_in_a_fresh_process": statistics.median(cold),
    } | hashes


def bench_blocks(model: Model, ids: list[int], rows: list[int], sizes: list[int], repeats: int) -> list[Facts]:
    """Prefill by block size against one single pass of plain transformers, and the drift of both reuse modes."""
    tokens, logits = single_pass(model, ids, rows, max_new_tokens=24)

    def plain() -> float:
        with stock_attention(model.model), torch.no_grad():
            cache, whole = DynamicCache(config=model.model.config), torch.tensor([ids], device=model.device)
            return seconds(lambda: model.model.base_model(input_ids=whole, cache=cache, use_cache=True))

    table = []
    for size in sizes:

        def blocks(size: int = size) -> float:
            cache = empty_cache(model.model.config, capacity=len(ids))
            return seconds(lambda: prefill(model, ids, cache, block_size=size))

        pairs = [(blocks(), plain()) for _ in range(repeats)]
        aligned = len(ids) - len(ids) % size
        cache = empty_cache(model.model.config, capacity=len(ids) + 64)
        prefill(model, ids[:aligned], cache, block_size=size)
        with stock_attention(model.model):
            align = measure_drift((tokens, logits), greedy(model, cache, [*ids[aligned:], *rows], max_new_tokens=24))
        table.append(
            {
                "block_size": size,
                "prefill": statistics.median(a for a, _ in pairs),
                "single_pass": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(a / b for a, b in pairs),
                "align_max_abs_logit_diff": align.max_abs_logit_diff,
                "align_tokens_equal": align.tokens_equal,
            }
        )
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    return table


def bench_attention(tokens: int, repeats: int) -> list[Facts]:
    """One layer of SmolLM2's shape: 9 query heads on 3 KV heads of 64 dims."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    table = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 14, 64, 128):
            torch.manual_seed(0)
            query = torch.randn(1, 9, rows, 64).to(dtype)
            key, value = (torch.randn(1, 3, tokens, 64).to(dtype) for _ in range(2))
            mask = None if rows == 1 else torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows)[None, None]
            arguments = (module, query, key, value, mask)
            stock = median(lambda: sdpa_attention_forward(*arguments, scaling=0.125), repeats)  # noqa: B023
            if rows <= 64:
                grouped = median(lambda: grouped_attention(*arguments, scaling=0.125), repeats)  # noqa: B023
            else:
                folded, masks = query.reshape(1, 3, 3 * rows, 64), mask.repeat(1, 1, 3, 1)
                sdpa = torch.nn.functional.scaled_dot_product_attention
                grouped = median(lambda: sdpa(folded, key, value, attn_mask=masks), repeats)  # noqa: B023
            table.append(
                {"dtype": str(dtype), "rows": rows, STOCK: stock, GROUPED: grouped, "speedup": stock / grouped}
            )
    return table


def peak_memory(document: Path, tokens: int) -> Facts:
    """The peak resident memory of `precompute` in a process of its own, beside weights and KV."""
    code = (
        "import resource,sys\nfrom pathlib import Path\nimport kvbuy\n"
        "m=kvbuy.load_model(); weights=sum(p.numel()*p.element_size() for p in m.model.parameters())\n"
        "text=m.tokenizer.decode(m.tokenizer(Path(sys.argv[1]).read_text())['input_ids'][:int(sys.argv[2])])\n"
        "made=kvbuy.precompute(text,Path(sys.argv[3]),model=m,name='doc.txt')\n"
        "print(weights,made.artifact.manifest.kv_bytes(),resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, str(document), str(tokens), f"{folder}/a.kv.safetensors"]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    weights, kv, peak = map(int, line.split())
    return {"weights": weights, "kv": kv, "peak": peak, "peak_beyond_weights_and_kv": peak - weights - kv}


def start_up(artifact: Path, repeats: int) -> Facts:
    """Whole processes: `kvbuy --help` and `kvbuy inspect` against `python -c "import typer"`."""

    def process(*command: str) -> Callable[[], float]:
        return lambda: seconds(lambda: subprocess.run(command, capture_output=True, check=True))

    kvbuy = str(Path(sys.executable).with_name("kvbuy"))
    typer = process(sys.executable, "-c", "import typer")
    help_, base, help_ratio = paired(process(kvbuy, "--help"), typer, repeats)
    inspect, _, inspect_ratio = paired(process(kvbuy, "inspect", str(artifact)), typer, repeats)
    return {"typer": base, "help": help_, "help_ratio": help_ratio, "inspect": inspect, "inspect_ratio": inspect_ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--tokens", type=int, default=3774)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sections", default="start,memory,attention,load,reuse,blocks")
    parser.add_argument("--block-sizes", default="64,128,256,512,1024")
    parser.add_argument("--block-repeats", type=int, default=1)
    options = parser.parse_args()
    wanted = options.sections.split(",")

    model = load_model(options.model)
    ids = model.tokenizer(read_document(str(options.document)))["input_ids"][: options.tokens]
    rows = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    facts: Facts = {"profile": model.profile(512).model_dump(), "tokens": len(ids), "prompt": len(rows)}
    facts["cpus"], facts["threads"] = os.cpu_count(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = precompute(model.tokenizer.decode(ids), folder / "doc.kv.safetensors", model=model, name="doc.txt")
        facts["prefill"] = made.prefill_seconds
        artifact = made.artifact
        sections: dict[str, Callable[[], object]] = {
            "start": lambda: start_up(artifact.path, options.repeats),
            "memory": lambda: peak_memory(options.document, options.tokens),
            "attention": lambda: bench_attention(len(ids) + len(rows), options.repeats),
            "load": lambda: bench_load(model, artifact, options.repeats),
            "reuse": lambda: bench_reuse(model, artifact, rows, folder, options.repeats),
            "blocks": lambda: bench_blocks(
                model, ids, rows, [int(size) for size in options.block_sizes.split(",")], options.block_repeats
            ),
        }
        for section in wanted:
            facts[section] = sections[section]()
            print(json.dumps({section: facts[section]}), file=sys.stderr, flush=True)
    if isinstance(reuse := facts.get("reuse"), dict):
        reuse["prefill_to_load_and_first_token"] = made.prefill_seconds / reuse["load_and_first_token"]
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
