"""Prefill against reuse on this machine, over document lengths, beside its limits and what else there is.

Each length is a document of its own: a text's beginning, made an artifact. It knows how to measure, not what the
figures are worth (`kvbuy.cost`) or how they look.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import kvbuy
from kvbuy.artifact import Artifact
from kvbuy.bench.baselines import Found, measure_by_hand, measure_llama_cpp, measure_vllm
from kvbuy.bench.limits import copy_gbps, measure_limits
from kvbuy.bench.rows import DECODED, measure_row
from kvbuy.errors import DocumentError, ModelError, UsageError
from kvbuy.figures import Baseline, Benchmark, Missing, Row
from kvbuy.manifest import refuse_block_size
from kvbuy.models import Model
from kvbuy.parts import CodecName
from kvbuy.prefill import precompute

LENGTHS = (255, 512, 1024, 2048, 3774)  # the paper's range
PROMPT = "\n\nQuestion: What does the text above say?\nAnswer:"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and how often. `lengths` in tokens, None for the paper's as far as the model goes; `gguf` is for
    llama.cpp, `vllm` a Python that has vLLM.
    """

    lengths: tuple[int, ...] | None = None
    repeats: int = 5
    block_size: int = 512
    codec: CodecName = "raw"
    baselines: bool = True
    gguf: Path | None = None
    vllm: Path | None = None


@torch.no_grad()
def run_bench(
    model: Model, text: str, plan: Plan, *, name: str, progress: Progress = lambda _, __, ___: None
) -> Benchmark:
    """Measure a model on the beginnings of a text called `name`.

    `progress` is told the step, and how many are done of how many.

    Raises:
        DocumentError: the text is shorter than the longest length.
        UsageError: a length is more than the model can hold, or the codec or block size cannot be used.
        PackError: the codec needs a pack, and the model has none here.
        ModelError: something in the model's config or tokenizer cannot be counted with.
    """
    refuse_block_size(plan.block_size)
    prompt = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    lengths = choose_lengths(plan.lengths, context=model.context, room=len(prompt) + DECODED)
    texts = cut_text(model, text, lengths)
    copy = copy_gbps(model.device)
    rows: list[Row] = []
    found: Found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.kv.safetensors"
        for length, beginning in zip(lengths, texts, strict=True):
            progress(f"{length} tokens", len(rows), len(lengths))
            artifact = precompute(
                beginning, path, model=model, name=name, block_size=plan.block_size, codec=plan.codec, force=True
            ).artifact
            rows.append(measure_row(model, artifact, prompt, repeats=plan.repeats, copy_gbps=copy))
        progress("limits", len(rows), len(lengths))
        limits = measure_limits(path, device=model.device, dtype=model.model.dtype, row=rows[-1])
        if plan.baselines:
            progress("baselines", len(rows), len(lengths))
            found = _measure_baselines(model, artifact, prompt, rows[-1], plan)
    profile = model.profile(plan.block_size)
    return Benchmark(
        producer=f"kvbuy {kvbuy.__version__}",
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=model.label.name,
        fingerprint=model.fingerprint.sha256(),
        dtype=model.fingerprint.dtype,
        machine=f"{profile.device}, {profile.processor}, {torch.get_num_threads()} threads",
        software=f"torch {profile.torch}, transformers {profile.transformers}",
        document=name,
        codec=plan.codec,
        block_size=plan.block_size,
        prompt_tokens=len(prompt),
        repeats=plan.repeats,
        rows=tuple(rows),
        limits=limits,
        baselines=tuple(one for one in found if isinstance(one, Baseline)),
        missing=tuple(one for one in found if isinstance(one, Missing)),
    )


def choose_lengths(lengths: Sequence[int] | None, *, context: int, room: int) -> tuple[int, ...]:
    """The lengths in order, by default as many of the paper's as fit, or the most that fits.

    Raises:
        UsageError: one is not positive, or does not fit into the model's context with `room` tokens behind it.
    """
    most = context - room
    if lengths is None:
        return tuple(length for length in LENGTHS if length <= most) or (most,)
    if not lengths or min(lengths) < 1:
        raise UsageError("a length is at least one token", hint="--lengths 255,512,1024")
    if max(lengths) > most:
        raise UsageError(
            f"{max(lengths)} tokens, a prompt and an answer do not fit into the model's {context}",
            hint=f"it takes lengths up to {most}",
        )
    return tuple(sorted(set(lengths)))


def cut_text(model: Model, text: str, lengths: Sequence[int]) -> list[str]:
    """The text's beginnings of so many tokens each, cut where a token ends.

    Raises:
        DocumentError: it has fewer tokens than that, or a token ends inside a letter there.
        ModelError: its tokenizer is a slow one, which knows no places in a text.
    """
    try:
        ends = [end for _, end in model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    except NotImplementedError as error:
        raise ModelError(f"the tokenizer of {model.label.name} does not say where a token ends") from error
    if len(ends) < max(lengths):
        raise DocumentError(
            f"the text has {len(ends)} tokens, not {max(lengths)}", hint="name a longer one, or give --lengths"
        )
    texts = [text[: ends[length - 1]] for length in lengths]
    for length, beginning in zip(lengths, texts, strict=True):
        if (found := len(model.tokenizer(beginning)["input_ids"])) != length:
            raise DocumentError(
                f"the text cannot be cut at {length} tokens: its beginning has {found} when it stands alone",
                hint=f"take another length: --lengths {found}",
            )
    return texts


def _measure_baselines(model: Model, artifact: Artifact, prompt: Sequence[int], row: Row, plan: Plan) -> Found:
    by_hand = measure_by_hand(model, artifact, prompt, row, folder=artifact.path.parent, repeats=plan.repeats)
    return [
        *by_hand,
        measure_llama_cpp(artifact, prompt, plan.gguf, repeats=plan.repeats),
        measure_vllm(model, artifact, prompt, plan.vllm, repeats=plan.repeats),
    ]
