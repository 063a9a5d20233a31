"""The README's figures for codecs: .venv/bin/python scripts/bench_codecs.py DOCUMENT... [--tokens 3774] [--repeats 5]

In one run for each document's first tokens: every codec that is here on the same blocks, zipnn where it is installed,
and the prefill that computes the same bytes again. Speeds are megabytes of KV a second of processor time: what one core
does, whoever else uses the machine. Medians over repeats, and the range.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kvbuy.artifact import Artifact
from kvbuy.cache import empty_cache
from kvbuy.codec import Coder, Encoded
from kvbuy.codec.arrays import Array
from kvbuy.document import read_document
from kvbuy.measure import find_coders, measure_codec, read_arrays
from kvbuy.models import Model, load_model
from kvbuy.prefill import precompute, prefill

SLOW = ("raw", "zstd-3", "zstd-19")  # `kvbuy measure` has them
PREFILL_TOKENS = 1024


class Zipnn(Coder):
    """zipnn on a block's bytes, as one stream."""

    def __init__(self) -> None:
        from zipnn import ZipNN

        self._codec = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
        data = self._codec.compress(b"".join(tensor.tobytes() for tensor in tensors))
        return Encoded(data=bytes(data), tensor_bytes=tuple(float(tensor.nbytes) for tensor in tensors))

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        raw, at = self._codec.decompress(bytes(data)), 0
        for tensor in tensors:
            tensor.reshape(-1).view(np.uint8)[:] = np.frombuffer(raw, np.uint8, tensor.nbytes, at)
            at += tensor.nbytes


def spread(values: Sequence[float]) -> dict[str, float]:
    median = statistics.median(values)
    return {"median": round(median, 2), "least": round(min(values), 2), "most": round(max(values), 2)}


def processor_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def bench_prefill(model: Model, artifact: Artifact, repeats: int) -> dict[str, float]:
    """Megabytes of KV that a prefill of the document's beginning makes in a second of processor time."""
    ids = artifact.read_tokens()[:PREFILL_TOKENS]
    size = len(ids) * artifact.manifest.kv_bytes() / artifact.manifest.document.tokens / 1e6

    def run() -> None:
        prefill(model, ids, empty_cache(model.model.config, capacity=len(ids)), block_size=512)

    run()
    return spread([size / processor_seconds(run) for _ in range(repeats)])


def bench_codecs(artifact: Artifact, repeats: int) -> dict[str, object]:
    blocks = read_arrays(artifact)
    found: dict[str, list[tuple[float, float, float]]] = {}
    openers, _ = find_coders(artifact)
    if find_spec("zipnn"):
        openers["zipnn"] = Zipnn
    for _ in range(repeats):
        for name, opener in openers.items():
            if name not in SLOW:
                one = measure_codec(name, opener, blocks)
                found.setdefault(name, []).append((one.ratio, 1e3 * one.encode_gbps, 1e3 * one.decode_gbps))
    return {name: summary(runs) for name, runs in found.items()}


def summary(runs: Sequence[tuple[float, float, float]]) -> dict[str, object]:
    ratios, encode, decode = zip(*runs, strict=True)
    return {"ratio": round(ratios[0], 4), "encode": spread(encode), "decode": spread(decode)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+")
    parser.add_argument("--tokens", type=int, default=3774)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model")
    options = parser.parse_args()
    model = load_model(options.model)
    for document in options.documents:
        ids = model.tokenizer(read_document(document))["input_ids"][: options.tokens]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "doc.kv.safetensors"
            artifact = precompute(model.tokenizer.decode(ids), out, model=model, name="doc.txt").artifact
            facts = bench_codecs(artifact, options.repeats)
            facts["prefill"] = bench_prefill(model, artifact, options.repeats)
        print(json.dumps({document: facts}, indent=2), flush=True)


if __name__ == "__main__":
    main()
