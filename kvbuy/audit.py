"""Audit: is an artifact really that document's KV under that model, for the price of a few blocks?

Blocks chosen at random, all layers of them, are computed again from the claimed blocks before them and compared bit for
bit. A cheat has to be inconsistent somewhere: KV of another history, even with all later blocks computed from it in
earnest, differs in the block where the histories part. The choice comes from the buyer's seed, made once the artifact's
digest is fixed. What it found is an evidence file that anybody can run again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kvbuy.artifact import Artifact
from kvbuy.cache import block_arrays, block_digest, fill_rows, load_artifact, reserve_cache, rewind_cache
from kvbuy.errors import DamagedError, ExistsError, UsageError
from kvbuy.evidence import (
    BlockEvidence,
    Envelope,
    Evidence,
    choose_blocks,
    envelope_path,
    judge,
    measure_residual,
    read_envelope,
    write_envelope,
)
from kvbuy.fingerprint import profile_differences
from kvbuy.manifest import FullLayer
from kvbuy.models import Model, refuse_foreign_shapes, refuse_misfit
from kvbuy.plausible import describe, judge_numbers
from kvbuy.reader import Reader, check_contents
from kvbuy.replay import find_contradiction

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def audit(
    artifact: Artifact,
    model: Model,
    *,
    blocks: int,
    seed: int,
    progress: Progress = lambda _, __, ___: None,
) -> Evidence:
    """Compute `blocks` of an artifact's blocks again, chosen by `seed`, and judge.

    Raises:
        DamagedError: a digest does not match: nothing was audited.
        MisfitError: it was made with another model.
        UsageError: no block is to be looked at; or the model keeps state beside its blocks, which only a prefill from
            the start can give.
    """
    if blocks < 1:
        raise UsageError("an audit looks at one block at least", hint="--blocks 1")
    manifest = artifact.manifest
    if not all(isinstance(layer, FullLayer) for layer in manifest.layers):
        raise UsageError(
            "a model with sliding windows or recurrent state cannot start in the middle of a document",
            hint=f"kvbuy verify {artifact.path.name} computes all of it again",
        )
    _refuse_others(artifact, model)
    numbers = judge_numbers(list(Reader.open(artifact).load_blocks()), dtype=manifest.fingerprint.dtype)
    chosen = choose_blocks(len(manifest.blocks), blocks, seed=seed)
    found = _recompute(artifact, model, chosen, progress)
    profile = model.profile(manifest.profile.block_size)
    differences = profile_differences(manifest.profile, profile)
    return judge(
        artifact,
        found,
        seed=seed,
        profile=profile,
        differences=differences,
        numbers=numbers,
        envelope=read_envelope(manifest.fingerprint, manifest.profile, profile) if differences else None,
    )


@torch.no_grad()
def calibrate(
    artifact: Artifact, model: Model, *, force: bool = False, progress: Progress = lambda _, __, ___: None
) -> tuple[Envelope, Path]:
    """Measure how far an artifact that one trusts, made on another profile, is from this one's bits: all its blocks.

    Audits of other artifacts of that profile compare with it from now on.

    Raises:
        UsageError: it was made on this very profile, where bits are compared; or its numbers are no computed ones.
        ExistsError: that pair of profiles was measured already, and `force` is not set.
        DamagedError, MisfitError, StoreError: as for `audit`.
    """
    manifest = artifact.manifest
    profile = model.profile(manifest.profile.block_size)
    if not profile_differences(manifest.profile, profile):
        raise UsageError("the artifact was made on this very profile: bits are compared", hint="kvbuy audit")
    path = envelope_path(manifest.fingerprint, manifest.profile, profile)
    if path.exists() and not force:
        raise ExistsError("that pair of profiles was measured already", hint="give --force to measure it anew")
    _refuse_others(artifact, model)
    numbers = judge_numbers(list(Reader.open(artifact).load_blocks()), dtype=manifest.fingerprint.dtype)
    if not numbers.holds:
        raise UsageError(f"this is no honest artifact: {'; '.join(describe(numbers))}")
    found = _recompute(artifact, model, range(len(manifest.blocks)), progress)
    envelope = Envelope.around([block.residuals for block in found], made_from=artifact.id)
    write_envelope(path, envelope)
    return envelope, path


def _refuse_others(artifact: Artifact, model: Model) -> None:
    """Say that an artifact is damaged, of another model, or that its tokens are those of another text than it shows."""
    check_contents(artifact)
    refuse_misfit(artifact.manifest, model.fingerprint)
    if reason := find_contradiction(artifact, model.tokenizer):
        raise DamagedError(f"{artifact.path.name}: {reason}", hint="it is not what it says: do not use it")
    refuse_foreign_shapes(artifact.manifest, model)


def _recompute(
    artifact: Artifact, model: Model, chosen: Sequence[int], progress: Progress
) -> tuple[BlockEvidence, ...]:
    """Compute blocks again, each from the claimed ones before it, and compare."""
    manifest = artifact.manifest
    tokens, device = artifact.read_tokens(), model.device
    cache = reserve_cache(model.model.config, manifest, capacity=len(tokens), device=device)
    load_artifact(artifact, cache, reuse="continue", device=device)
    found = []
    for done, index in enumerate(chosen):
        progress("blocks", done, len(chosen))
        start = manifest.block_start(index)
        end = start + manifest.blocks[index].tokens
        claimed = [array.copy() for array in block_arrays(cache, start, end)]
        rewind_cache(artifact, cache, tokens=start, device=device)
        rows = torch.tensor([tokens[start:end]], device=device)
        model.model.base_model(input_ids=rows, cache=cache, use_cache=True)
        computed = block_arrays(cache, start, end)
        pairs = zip(claimed, computed, strict=True)
        found.append(
            BlockEvidence(
                index=index,
                claimed=manifest.blocks[index].digest,
                computed=block_digest(cache, start, end),
                residuals=tuple(measure_residual(a, b, manifest.fingerprint.dtype) for a, b in pairs),
            )
        )
        fill_rows(cache, claimed, start)  # the blocks after it are computed from what is claimed
    progress("blocks", len(chosen), len(chosen))
    return tuple(found)
