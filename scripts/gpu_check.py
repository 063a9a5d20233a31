"""Does kvbuy hold on this device, and what are its figures? python scripts/gpu_check.py [--model FOLDER] [--out FILE]

Bench, verify and measure. Needs no network, nor kvbuy installed: a seeded random model is made, of Qwen3-4B's shape
where there is a GPU with room, a tiny one elsewhere. Random weights change neither times nor exactness; how far their
KV compresses says nothing, so that is measured on the real model only (--model).
"""

import argparse
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

NEEDED = {"torch": "2.6", "transformers": "5.24", "safetensors": "0.6", "typer": "0.15", "rich": "13.9"}
NEEDED |= {"huggingface_hub": "2.0", "blake3": "1.0", "pydantic": "2.10", "zstandard": "0.23", "numpy": "1.26"}


def missing_packages() -> list[str]:
    """What kvbuy needs and this machine lacks, or has too old."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

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

# kvbuy need not be installed: it is beside this file. The processes that verify starts find it there too.
ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from kvbuy import render, render_bench
from kvbuy.artifact import refuse_unwritable
from kvbuy.bench import PROMPT, Plan, cut_text, run_bench
from kvbuy.bench.rows import DECODED
from kvbuy.docstrings import help_texts
from kvbuy.errors import KvbuyError, ModelError
from kvbuy.figures import parse_lengths
from kvbuy.manifest import refuse_block_size
from kvbuy.measure import measure
from kvbuy.models import load_model
from kvbuy.prefill import precompute
from kvbuy.render_measure import measure_json
from kvbuy.replay import verify
from kvbuy.resolve import LARGE_ROOM
from kvbuy.whole import write_whole

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
SPEEDS = ("name", "encode_gbps", "decode_gbps")


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


def check(source: str, lengths: tuple[int, ...], options: argparse.Namespace, *, real: bool) -> Iterator[dict]:
    """Bench, verify, measure; all that is known so far after each of them."""
    model = load_model(source)
    prompt = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    room = model.context - len(prompt) - DECODED
    fitting = tuple(length for length in lengths if length <= room) or (room,)
    text, name = help_texts(), "Python's help texts"
    facts = {"bench": None, "verify": None, "measure": None}
    found = None
    for at in sorted(set(fitting)):
        print(f"{at} tokens", file=sys.stderr, flush=True)
        plan = Plan(lengths=(at,), repeats=options.repeats, block_size=options.block_size, baselines=at == max(fitting))
        try:
            one = run_bench(model, text, plan, name=name)
        except torch.OutOfMemoryError as error:
            print(f"{at} tokens do not fit: {error}", file=sys.stderr)
            break
        found = one if found is None else one.model_copy(update={"rows": (*found.rows, *one.rows)})
        yield facts | {"bench": found.model_dump()}
    if found is None:
        raise ModelError("not even the shortest length fits into memory")
    render_bench.print_benchmark(found)
    facts["bench"] = found.model_dump()

    length = max((length for length in fitting if length <= VERIFIED), default=min(VERIFIED, room))
    [document] = cut_text(model, text, [length])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doc.kv.safetensors"
        made = precompute(document, path, model=model, name=name, block_size=options.block_size).artifact
        facts["verify"] = render.verdict_json(verify(made, model=source))
        yield facts
        weighed = measure_json(made, measure(made), ())
    # of random weights, how fast codecs are means something, and what they leave does not
    facts["measure"] = weighed if real else [{name: one[name] for name in SPEEDS} for one in weighed["codecs"]]
    yield facts


def print_summary(facts: dict[str, dict]) -> None:
    """One short table, last."""
    table = render.plain_table("model", "tokens", "prefill", "reuse", "ratio", "load GB/s", "exact", "verify")
    for name, found in facts.items():
        for row in found["bench"]["rows"]:
            scratch = min(row["prefill_seconds"], row["single_pass_seconds"])
            seconds = (render.duration(scratch), render.duration(row["reuse_seconds"]))
            load = f"{row['kv_bytes'] / row['load_seconds'] / 1e9:.3g}"
            exact = "yes" if row["exact"] else "no"
            cells = (name, str(row["tokens"]), *seconds, f"{row['ratio']:.1f}", load, exact)
            table.add_row(*cells, found["verify"]["verdict"])
    render.print_table(table)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a real model's folder or Hub id, checked too")
    parser.add_argument("--lengths", help="tokens, with commas; what a model has no room for is left out")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, choices=range(1, 101), metavar="N", default=5)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="written after each step")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    refuse_block_size(options.block_size)
    shape = choose_shape()
    lengths = parse_lengths(options.lengths) or LENGTHS[shape]
    refuse_unwritable(options.out, force=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        checked = {f"random {shape}": str(make_model(Path(folder) / f"random-{shape}", shape))}
        if options.model:
            checked[options.model] = options.model
        for name, source in checked.items():
            for found in check(source, lengths, options, real=source == options.model):
                facts[name] = found
                with write_whole(options.out) as file:
                    file.write(json.dumps({"device": device, "made": made} | facts, indent=2).encode())
    print_summary(facts)
    print(f"{device}, {made}; all figures: {options.out}")
    exact = all(row["exact"] for found in facts.values() for row in found["bench"]["rows"])
    sys.exit(not exact or any(found["verify"]["verdict"] != "exact" for found in facts.values()))


def main() -> None:
    try:
        run(read_options())
    except KvbuyError as error:
        render.print_error(error, as_json=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
