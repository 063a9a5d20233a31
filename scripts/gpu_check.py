"""Does kvbuy hold on this device, and what are its figures? python scripts/gpu_check.py [--model M] [--tokens N]

Needs no network: without --model it makes a seeded random model, of Qwen3-4B's shape where there is a GPU with room, a
tiny one elsewhere. Random weights change neither sizes nor times, and exactness is about bits, not about sense.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from bench import bench_blocks, bench_load, bench_reuse
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from kvbuy.models import load_model
from kvbuy.prefill import precompute
from kvbuy.render import verdict_json
from kvbuy.replay import verify
from kvbuy.resolve import LARGE_ROOM

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}


def has_room() -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2 * LARGE_ROOM


def make_model(folder: Path) -> Path:
    """A seeded random Qwen3 with a token a byte."""
    large = has_room()
    heads, dim = (8, 128) if large else (2, 32)
    shape = (QWEN3_4B if large else TINY) | {"num_key_value_heads": heads, "head_dim": dim}
    torch.manual_seed(0)
    with torch.device("cuda" if large else "cpu"):
        config = Qwen3Config(**shape, vocab_size=257, max_position_embeddings=40960, eos_token_id=256)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: at for at, symbol in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=3774 if has_room() else 600)
    parser.add_argument("--block-sizes", default="256,512,1024,2048" if has_room() else "64,128")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    text = "\n".join(topics[name] for name in sorted(topics))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.model or str(make_model(folder / "random-qwen3"))
        model = load_model(source)
        ids = model.tokenizer(text)["input_ids"][: options.tokens]
        rows = model.tokenizer("\n\nWhat then?", add_special_tokens=False)["input_ids"]
        document = model.tokenizer.decode(ids)
        made = precompute(document, folder / "doc.kv.safetensors", model=model, name="doc.txt")
        facts = {
            "profile": model.profile(512).model_dump(),
            "tokens": len(ids),
            "kv_bytes": made.artifact.manifest.kv_bytes(),
            "prefill_seconds": made.prefill_seconds,
            "load": bench_load(model, made.artifact, options.repeats),
            "reuse": bench_reuse(model, made.artifact, rows, folder, options.repeats),
            "blocks": bench_blocks(model, ids, rows, list(map(int, options.block_sizes.split(","))), options.repeats),
        }
        del model
        facts["verify"] = verdict_json(verify(made.artifact, model=source))
    print(json.dumps(facts, indent=2))
    sys.exit(facts["verify"]["verdict"] != "exact")


if __name__ == "__main__":
    main()
