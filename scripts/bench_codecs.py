"""The README's figures for codecs: .venv/bin/python scripts/bench_codecs.py ARTIFACT... [--repeats 5]

In one run for each artifact: every codec that is here on the same blocks, zipnn where it is installed, and the prefill
that computes the same bytes again. Speeds are megabytes of KV a second of processor time: what one core does, whoever
else uses the machine. Medians over repeats, and the range.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kvbuy.artifact import Artifact
from kvbuy.cache import empty_cache
from kvbuy.codec import Coder, Encoded
from kvbuy.codec.arrays import Array
from kvbuy.measure import find_coders, measure_codec, read_arrays
from kvbuy.models import find_model_for
from kvbuy.prefill import prefill

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


def bench_prefill(artifact: Artifact, repeats: int) -> dict[str, float]:
    """Megabytes of KV that a prefill of the document's beginning makes in a second of processor time."""
    model = find_model_for(artifact.manifest).load("cpu")
    ids = artifact.read_tokens()[:PREFILL_TOKENS]
    size = len(ids) * artifact.manifest.kv_bytes() / artifact.manifest.document.tokens / 1e6

    def run() -> None:
        prefill(model, ids, empty_cache(model.model.config, capacity=len(ids)), block_size=512)

    run()
    return spread([size / processor_seconds(run) for _ in range(repeats)])


def bench_codecs(artifact: Artifact, repeats: int) -> dict[str, object]:
    blocks = read_arrays(artifact)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(repeats):
        coders, _ = find_coders(artifact)  # fresh ones: what dense has learned is of one pass over the blocks
        if find_spec("zipnn"):
            coders["zipnn"] = Zipnn()
        for name, coder in coders.items():
            if name not in SLOW:
                one = measure_codec(name, coder, blocks)
                found.setdefault(name, []).append((one.ratio, 1e3 * one.encode_gbps, 1e3 * one.decode_gbps))
    return {name: summary(runs) for name, runs in found.items()}


def summary(runs: Sequence[tuple[float, float, float]]) -> dict[str, object]:
    ratios, encode, decode = zip(*runs, strict=True)
    return {"ratio": round(ratios[0], 4), "encode": spread(encode), "decode": spread(decode)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for path in arguments.artifacts:
        artifact = Artifact.open(path)
        facts = bench_codecs(artifact, arguments.repeats)
        facts["prefill"] = bench_prefill(artifact, arguments.repeats)
        print(json.dumps({path.name: facts}, indent=2))


if __name__ == "__main__":
    main()
