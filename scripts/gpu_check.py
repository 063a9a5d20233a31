"""Does kvbuy hold on this device, and what are its figures? python scripts/gpu_check.py [--model FOLDER] [--out FILE]

Bench, verify and, with --model, measure. Needs no network: a seeded random model is made, of Qwen3-4B's shape where
there is a GPU with room, a tiny one elsewhere. Random weights change neither times nor exactness; how far their KV
compresses says nothing, so that is measured on the real model only.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

NEEDED = {"torch": "2.6", "transformers": "5.24", "safetensors": "0.6", "typer": "0.15", "rich": "13.9"}
NEEDED |= {"huggingface_hub": "2.0", "blake3": "1.0", "pydantic": "2.10", "zstandard": "0.23", "numpy": "1.26"}


def missing_packages() -> list[str]:
    """What kvbuy needs and this machine lacks, or has too old."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split("+")[0].split(".")[:2])

    found = []
    for name, least in NEEDED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}>={least}")
            continue
        if number(version) < number(least):
            found.append(f"{name}>={least} (here is {version})")
    return found


if lacking := missing_packages():
    print(f"missing: {', '.join(lacking)}; carry their wheels: pip install --no-index --no-deps", file=sys.stderr)
    sys.exit(1)

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from kvbuy import render, render_bench
from kvbuy.bench import PROMPT, Plan, cut_text, run_bench
from kvbuy.bench.rows import DECODED
from kvbuy.docstrings import help_texts
from kvbuy.measure import measure
from kvbuy.models import Model, load_model
from kvbuy.prefill import precompute
from kvbuy.render_measure import measure_json
from kvbuy.replay import verify
from kvbuy.resolve import LARGE_ROOM

SHAPES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
LENGTHS = {"tiny": (64, 255, 600), "qwen3-4b": (255, 512, 1024, 2048, 3774, 8192, 16384, 32768)}
VERIFIED = 3774  # tokens at most: verification prefills three times more


def choose_shape() -> str:
    large = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2 * LARGE_ROOM
    return "qwen3-4b" if large else "tiny"


def make_model(folder: Path, shape: str) -> Path:
    """A seeded random Qwen3 with a token a byte."""
    torch.manual_seed(0)
    with torch.device("cuda" if shape == "qwen3-4b" else "cpu"):
        config = Qwen3Config(**SHAPES[shape], max_position_embeddings=40960, eos_token_id=256)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: at for at, symbol in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def check(model: Model, source: str, lengths: tuple[int, ...], options: argparse.Namespace, *, real: bool) -> dict:
    """Bench, verify and, for real weights, measure."""
    room = model.context - len(model.tokenizer(PROMPT)["input_ids"]) - DECODED
    lengths = tuple(length for length in lengths if length <= room)
    plan = Plan(lengths=lengths, repeats=options.repeats, block_size=options.block_size)
    text, name = help_texts(), "Python's help texts"
    found = run_bench(model, text, plan, name=name, progress=lambda *at: print(*at, file=sys.stderr, flush=True))
    render_bench.print_benchmark(found)
    longest = max(length for length in lengths if length <= VERIFIED)
    [document] = cut_text(model, text, [longest])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doc.kv.safetensors"
        made = precompute(document, path, model=model, name=name, block_size=options.block_size).artifact
        verdict = render.verdict_json(verify(made, model=source))
        weights = measure_json(made, measure(made), ()) if real else None
    return {"bench": found.model_dump(), "verify": verdict, "measure": weights}


def print_summary(facts: dict[str, dict]) -> None:
    """One short table, last."""
    table = render.plain_table("model", "tokens", "prefill", "reuse", "ratio", "load GB/s", "exact", "verify")
    for name, found in facts.items():
        for row in found["bench"]["rows"]:
            seconds = (render.duration(row["prefill_seconds"]), render.duration(row["reuse_seconds"]))
            load = f"{row['kv_bytes'] / row['load_seconds'] / 1e9:.1f}"
            exact = "yes" if row["exact"] else "no"
            cells = (name, str(row["tokens"]), *seconds, f"{row['ratio']:.1f}", load, exact)
            table.add_row(*cells, found["verify"]["verdict"])
    render.print_table(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a real model's folder or Hub id, checked too")
    parser.add_argument("--lengths", help="tokens, with commas")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    options = parser.parse_args()
    shape = choose_shape()
    lengths = tuple(map(int, options.lengths.split(","))) if options.lengths else LENGTHS[shape]
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        source = str(make_model(Path(folder) / f"random-{shape}", shape))
        facts[f"random {shape}"] = check(load_model(source), source, lengths, options, real=False)
    if options.model:
        facts[options.model] = check(load_model(options.model), options.model, lengths, options, real=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    options.out.write_text(json.dumps({"device": device, "made": made} | facts, indent=2), encoding="utf-8")
    print_summary(facts)
    print(f"{device}, {made}; all figures: {options.out}")
    sys.exit(any(found["verify"]["verdict"] != "exact" for found in facts.values()))


if __name__ == "__main__":
    main()
