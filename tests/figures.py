"""A bench run made by hand, for tests of what reads one."""

from typing import Any

from kvbuy.figures import Benchmark

FINGERPRINT = "0" * 64


def row(tokens: int, *, prefill: float, load: float, first: float, **changes: Any) -> dict[str, Any]:
    """The figures of one length, the times given and the rest in proportion."""
    return {
        "tokens": tokens,
        "kv_bytes": 1000 * tokens,
        "file_bytes": 1010 * tokens,
        "prefill_seconds": prefill,
        "single_pass_seconds": 1.1 * prefill,
        "load_seconds": load,
        "cold_load_seconds": None,
        "first_token_seconds": first,
        "reuse_seconds": load + first,
        "resident_seconds": 0.9 * first,
        "decode_seconds": first / 4,
        "ratio": prefill / (load + first),
        "floor_seconds": first,
        "prefill_flops": {"linear": 1000 * tokens, "attention": tokens**2},
        "reuse_flops": {"linear": 10_000, "attention": 10 * tokens},
        "prefill_peak_bytes": 2_000_000,
        "reuse_peak_bytes": None,
        "exact": True,
        "blocks_equal": 2,
        "blocks": 2,
        "tokens_equal": 24,
        "spread": {"load_seconds": (0.9 * load, 1.2 * load)},
    } | changes


def benchmark(**changes: Any) -> Benchmark:
    """Two lengths on a CPU."""
    fields: dict[str, Any] = {
        "producer": "kvbuy 0.1.0",
        "made": "2026-11-24T12:00:00Z",
        "model": "tiny",
        "fingerprint": FINGERPRINT,
        "dtype": "BF16",
        "machine": "cpu, x86_64, 2 threads",
        "software": "torch 2, transformers 5",
        "document": "doc.txt",
        "codec": "raw",
        "block_size": 512,
        "prompt_tokens": 14,
        "repeats": 5,
        "rows": [row(1000, prefill=4.0, load=0.1, first=0.1), row(2000, prefill=10.0, load=0.15, first=0.1)],
        "limits": {
            "memcpy_gbps": 8.0,
            "read_gbps": 5.0,
            "host_to_device_gbps": None,
            "matmul_tflops": 0.1,
            "load_gbps": 2.5,
            "load_share": 0.5,
        },
        "baselines": [
            {
                "name": "transformers, torch.save",
                "note": "DynamicCache, stock attention",
                "tokens": 2000,
                "bytes": 2_000_000,
                "prefill_seconds": 11.0,
                "load_seconds": 0.2,
                "reuse_seconds": 0.4,
            }
        ],
        "missing": [{"name": "vLLM, prefix cache", "hint": "--vllm PYTHON"}],
    }
    return Benchmark.model_validate(fields | changes)


WEIGHTS = {
    "artifact": "doc.kv.safetensors",
    "document": "doc.txt",
    "model": "tiny",
    "fingerprint": FINGERPRINT,
    "dtype": "BF16",
    "made": "2026-11-24T12:00:00Z",
    "tokens": 2000,
    "kv_bytes": 2_000_000,
    "codecs": [
        {
            "name": name,
            "lossless": True,
            "bytes": int(2_000_000 * ratio),
            "ratio": ratio,
            "encode_gbps": 1.0,
            "decode_gbps": 2.0,
            "sampled": False,
            "layers": [{"layer": at, "key_ratio": ratio, "value_ratio": ratio + 0.01} for at in range(3)],
        }
        for name, ratio in (("raw", 1.0), ("fast", 0.66))
    ],
}
