"""One document length: prefill, load, first token and decoding, timed, and whether reuse is exact.

What competes is measured in turn, so that a busy machine disturbs both. All in one process: `kvbuy verify` compares
with a fresh one.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvbuy.artifact import Artifact
from kvbuy.attention import stock_attention
from kvbuy.bench.files import drop_from_page_cache
from kvbuy.bench.timing import Stopwatch, read_peak, reset_peak, seconds
from kvbuy.cache import empty_cache, load_artifact, reserve_cache, rewind_cache
from kvbuy.decode import decode, greedy
from kvbuy.figures import Row
from kvbuy.flops import count_flops
from kvbuy.models import Model
from kvbuy.prefill import prefill

DECODED = 24  # tokens compared after each document, and timed
PREFILLS = 3  # repeats at most: a prefill takes long, and varies less than a load


def measure_row(model: Model, artifact: Artifact, prompt: Sequence[int], *, repeats: int, copy_gbps: float) -> Row:
    """All the figures of an artifact; `copy_gbps` is the fastest copy to where the model is."""
    manifest, ids, watch = artifact.manifest, artifact.read_tokens(), Stopwatch(model.device)
    prefill_flops = count_flops(model, rows=len(ids), cached=0, logits=False)
    reuse_flops = count_flops(model, rows=len(prompt), cached=len(ids), logits=True)
    scratch, blocks_equal, prefill_peak = _time_prefill(model, artifact, watch, repeats=min(repeats, PREFILLS))
    wanted, wanted_logits = greedy(model, scratch, prompt, max_new_tokens=DECODED)
    del scratch  # two caches at a time would be the peak

    reset_peak(model.device)
    _time_reuse(model, artifact, prompt, Stopwatch(model.device))  # warms up
    for _ in range(repeats - 1):
        _time_reuse(model, artifact, prompt, watch)
    loaded = _time_reuse(model, artifact, prompt, watch)
    reuse_peak = read_peak(model.device)
    steps = list(decode(model, loaded, prompt, max_new_tokens=DECODED))
    for before, after in pairwise(steps):
        watch.note("decode_seconds", after.at - before.at)
    logits = torch.stack([step.logits for step in steps]).cpu()

    medians = watch.medians()
    scratch_seconds = min(medians["prefill_seconds"], medians["single_pass_seconds"])
    return Row(
        tokens=len(ids),
        kv_bytes=manifest.kv_bytes(),
        file_bytes=artifact.path.stat().st_size,
        cold_load_seconds=_load_cold(artifact, loaded, model.device),
        ratio=scratch_seconds / medians["reuse_seconds"],
        floor_seconds=manifest.kv_bytes() / 1e9 / copy_gbps + medians["resident_seconds"],
        prefill_flops=prefill_flops,
        reuse_flops=reuse_flops,
        prefill_peak_bytes=prefill_peak,
        reuse_peak_bytes=reuse_peak,
        exact=blocks_equal == len(manifest.blocks) and torch.equal(logits, wanted_logits),
        blocks_equal=blocks_equal,
        blocks=len(manifest.blocks),
        tokens_equal=sum(step.token == token for step, token in zip(steps, wanted, strict=True)),
        spread=watch.spread(),
        **medians,
    )


def _time_prefill(model: Model, artifact: Artifact, watch: Stopwatch, *, repeats: int) -> tuple[Cache, int, int | None]:
    """Time a single pass and prefill in blocks.

    The last cache, how many of its blocks are the artifact's, and the peak of memory in blocks.
    """
    manifest, ids = artifact.manifest, artifact.read_tokens()
    wanted = [block.digest for block in manifest.blocks]
    whole = torch.tensor([ids], device=model.device)

    def single_pass() -> None:
        stock = DynamicCache(config=model.model.config)
        model.model.base_model(input_ids=whole, cache=stock, use_cache=True)

    def blocks(cache: Cache) -> None:
        digests = prefill(model, ids, cache, block_size=manifest.profile.block_size)
        found.append(sum(a == b for a, b in zip(digests, wanted, strict=True)))

    cache, found = None, [len(wanted)]
    for _ in range(repeats):
        cache = None  # a cache of the last round would be in this one's peak
        with stock_attention(model.model):
            watch.lap("single_pass_seconds", single_pass)
        reset_peak(model.device)
        cache = empty_cache(model.model.config, capacity=len(ids) + 2 * DECODED)
        watch.lap("prefill_seconds", partial(blocks, cache))
    assert cache is not None
    return cache, min(found), read_peak(model.device)


def _time_reuse(model: Model, artifact: Artifact, prompt: Sequence[int], watch: Stopwatch) -> Cache:
    """Time a load and the first token, on what was loaded and again on it as a resident cache; that cache, rewound."""
    tokens, device = artifact.manifest.document.tokens, model.device
    capacity = tokens + len(prompt) + 2 * DECODED
    cache = reserve_cache(model.model.config, artifact.manifest, capacity=capacity, device=device, touch=True)
    load = seconds(lambda: load_artifact(artifact, cache, reuse="continue", device=device), device)
    first = seconds(lambda: greedy(model, cache, prompt, max_new_tokens=1), device)
    watch.note("load_seconds", load)
    watch.note("first_token_seconds", first)
    watch.note("reuse_seconds", load + first)
    rewind_cache(artifact, cache, tokens=tokens, device=device)
    watch.lap("resident_seconds", lambda: greedy(model, cache, prompt, max_new_tokens=1))
    rewind_cache(artifact, cache, tokens=tokens, device=device)
    return cache


def _load_cold(artifact: Artifact, cache: Cache, device: torch.device) -> float | None:
    """One load of a file that is not in the page cache; None where it cannot be dropped from it."""
    if not drop_from_page_cache(artifact.path):
        return None
    return seconds(lambda: load_artifact(artifact, cache, reuse="continue", device=device), device)
