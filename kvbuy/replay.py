"""Verification: is an artifact intact, does it fit, is it exact, and how far does reuse drift from a single pass?"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvbuy.artifact import Artifact
from kvbuy.attention import stock_attention
from kvbuy.cache import DTYPES, Reuse, refuse_foreign_layers
from kvbuy.decode import greedy
from kvbuy.document import encode_prompt
from kvbuy.errors import DamagedError, DocumentError, MisfitError, UsageError
from kvbuy.fingerprint import profile_differences
from kvbuy.manifest import Receipt
from kvbuy.models import Model, find_model_for, refuse_foreign_shapes
from kvbuy.prefill import logits_digest
from kvbuy.reader import check_contents
from kvbuy.reuse import load_document, reuse_attention
from kvbuy.scratch import Request, Scratch, run_from_scratch
from kvbuy.verdict import Damaged, Drift, Exact, Exactness, Inexact, Misfit, Replayed, Verdict, Wrong

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@torch.no_grad()
def verify(
    artifact: Artifact | Path | str,
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 24,
    quick: bool = False,
    say: Say = lambda _: None,
    progress: Progress = lambda _, __, ___: None,
) -> Verdict:
    """Verify an artifact; the prefill from scratch runs in a fresh process.

    `prompt` defaults to the receipt's. `quick` stops at the receipt. `say` is told the model that was chosen,
    `progress` the step, its tokens done, and how many there are (0: unknown).

    Raises:
        StoreError, ModelError: the artifact or its model cannot be found: nothing was verified.
        DocumentError, UsageError: the prompt cannot be used.
    """
    if quick and prompt is not None:
        raise UsageError("a quick verification replays the receipt's own prompt", hint="leave out --prompt or --quick")
    try:
        opened = artifact if isinstance(artifact, Artifact) else Artifact.open(Path(artifact))
        check_contents(opened)
    except DamagedError as error:
        return Damaged(reason=error.message)
    try:
        found = find_model_for(opened.manifest, model, adapter=adapter, say=say)
    except MisfitError as error:
        return Misfit(differences=error.differences)
    manifest, tokenizer = opened.manifest, found.tokenizer()
    if reason := find_contradiction(opened, tokenizer):
        return Wrong(reason=reason, exact=None, drift={})
    try:
        refuse_foreign_layers(found.config(), manifest)
        if quick:
            return _judge_receipt(opened, found.load(device))
    except DamagedError as error:
        return Wrong(reason=error.message, exact=None, drift={})
    rows = manifest.receipt.prompt_tokens if prompt is None else _prompt_rows(opened, tokenizer, prompt)
    request = Request(
        model=str(found.folder),
        adapter=str(found.adapters[0]) if found.adapters else None,
        device=device,
        dtype=str(DTYPES[manifest.fingerprint.dtype]).removeprefix("torch."),
        block_size=manifest.profile.block_size,
        document=opened.read_tokens(),
        prompt=rows,
        max_new_tokens=max_new_tokens,
    )
    say("computing it from scratch in a fresh process")
    scratch = run_from_scratch(request, progress=lambda done: progress("from scratch", done, manifest.document.tokens))
    loaded = found.load(device)  # only now: one model in memory at a time
    try:
        refuse_foreign_shapes(manifest, loaded)
    except DamagedError as error:
        return Wrong(reason=error.message, exact=None, drift={})
    return _judge(opened, loaded, scratch, rows, progress)


def _judge(
    artifact: Artifact, model: Model, scratch: Scratch, rows: Sequence[int], progress: Progress
) -> Exact | Inexact | Wrong:
    length = len(scratch.result.tokens)
    tokens, logits = _reuse(artifact, model, rows, reuse="continue", max_new_tokens=length)
    exact = measure_exactness(artifact, scratch, tokens, logits, receipt_equal=replay_receipt(artifact, model))
    progress("single pass", 0, 0)
    reference = single_pass(model, artifact.read_tokens(), rows, max_new_tokens=length)
    drift = {"continue": measure_drift(reference, (tokens, logits))}
    progress("aligned reuse", 0, 0)
    with suppress(UsageError):  # a recurrent model with a short last block has no aligned reuse: it is left out
        drift["align"] = measure_drift(reference, _reuse(artifact, model, rows, reuse="align", max_new_tokens=length))
    profile = profile_differences(artifact.manifest.profile, model.profile(artifact.manifest.profile.block_size))
    if exact.holds:
        return Exact(exact=exact, drift=drift)
    if profile:
        return Inexact(profile=profile, exact=exact, drift=drift)
    only_receipt = replace(exact, receipt_equal=True).holds
    what = "the receipt comes out differently" if only_receipt else "a prefill from scratch gives other bits"
    return Wrong(reason=f"on this very profile {what}", exact=exact, drift=drift)


def _judge_receipt(artifact: Artifact, model: Model) -> Replayed | Inexact | Wrong:
    if replay_receipt(artifact, model):
        return Replayed(tokens=len(artifact.manifest.receipt.tokens))
    profile = profile_differences(artifact.manifest.profile, model.profile(artifact.manifest.profile.block_size))
    if profile:
        return Inexact(profile=profile, exact=None, drift={})
    return Wrong(reason="on this very profile the receipt comes out differently", exact=None, drift={})


def replay_receipt(artifact: Artifact, model: Model) -> bool:
    """Whether continuing from the artifact gives its receipt, bit for bit (errors: `kvbuy.reuse.load`)."""
    receipt: Receipt = artifact.manifest.receipt
    count = len(receipt.tokens)
    tokens, logits = _reuse(artifact, model, receipt.prompt_tokens, reuse="continue", max_new_tokens=count)
    return tuple(tokens) == receipt.tokens and logits_digest(logits) == receipt.logits


def measure_exactness(
    artifact: Artifact, scratch: Scratch, tokens: Sequence[int], logits: torch.Tensor, *, receipt_equal: bool
) -> Exactness:
    """Compare an artifact and its continuation ([tokens, vocabulary] logits) with a run from scratch."""
    blocks = [block.digest for block in artifact.manifest.blocks]
    state = [tensor.digest for tensor in artifact.manifest.state]
    wanted = scratch.result.tokens
    return Exactness(
        blocks_equal=_count_equal(blocks, scratch.result.blocks),
        blocks=len(blocks),
        state_equal=_count_equal(state, scratch.result.state),
        state=len(state),
        tokens_equal=_count_equal(wanted, tokens),
        tokens=len(wanted),
        logits_equal=torch.equal(logits, scratch.logits),
        max_abs_logit_diff=_shared_difference(wanted, tokens, scratch.logits, logits),
        receipt_equal=receipt_equal,
    )


def single_pass(
    model: Model, document: Sequence[int], rows: Sequence[int], *, max_new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """The paper's reference: one prefill over document and prompt by plain transformers with stock attention."""
    with stock_attention(model.model):
        cache = DynamicCache(config=model.model.config)
        return greedy(model, cache, [*document, *rows], max_new_tokens=max_new_tokens)


def measure_drift(reference: tuple[list[int], torch.Tensor], found: tuple[list[int], torch.Tensor]) -> Drift:
    """The distance of a greedy continuation (tokens, logits [tokens, vocabulary]) from the reference's."""
    (tokens, logits), (other_tokens, other_logits) = reference, found
    steps = _shared_steps(tokens, other_tokens)
    log_p = logits[:steps].double().log_softmax(-1)
    log_q = other_logits[:steps].double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).max().item()
    return Drift(
        max_abs_logit_diff=_shared_difference(tokens, other_tokens, logits, other_logits),
        kl=max(0.0, divergence),
        tokens_equal=_count_equal(tokens, other_tokens),
        tokens=len(tokens),
        first_divergence=None if tokens == other_tokens else steps - 1,
    )


def _reuse(
    artifact: Artifact, model: Model, rows: Sequence[int], *, reuse: Reuse, max_new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    loaded = load_document(artifact, model, reuse=reuse, room=len(rows) + max_new_tokens)
    pending = [*loaded.pending_ids, *rows]
    with reuse_attention(model, reuse):
        return greedy(model, loaded.cache, pending, max_new_tokens=max_new_tokens)


def _prompt_rows(artifact: Artifact, tokenizer: Any, prompt: str) -> tuple[int, ...]:
    chat = artifact.manifest.document.chat
    return encode_prompt(tokenizer, prompt, document_text=artifact.read_text(), chat=chat)


def find_contradiction(artifact: Artifact, tokenizer: Any) -> str | None:
    """What an artifact says of itself that its own tokenizer denies: token ids of other texts than it shows."""
    chat, receipt = artifact.manifest.document.chat, artifact.manifest.receipt
    if tuple(tokenizer(artifact.read_text(), add_special_tokens=not chat)["input_ids"]) != artifact.read_tokens():
        return "its token ids are not those of its text"
    with suppress(DocumentError):
        if _prompt_rows(artifact, tokenizer, receipt.prompt) == receipt.prompt_tokens:
            return None
    return "its receipt's token ids are not those of its prompt"


def _shared_steps(tokens: Sequence[int], others: Sequence[int]) -> int:
    """The steps that both continuations took from the same context: up to and with the first difference."""
    for at, (token, other) in enumerate(zip(tokens, others, strict=True)):
        if token != other:
            return at + 1
    return len(tokens)


def _shared_difference(
    tokens: Sequence[int], others: Sequence[int], logits: torch.Tensor, other_logits: torch.Tensor
) -> float:
    steps = _shared_steps(tokens, others)
    return (logits[:steps] - other_logits[:steps]).abs().max().item()


def _count_equal(wanted: Sequence[object], found: Sequence[object]) -> int:
    return sum(a == b for a, b in zip(wanted, found, strict=False))
