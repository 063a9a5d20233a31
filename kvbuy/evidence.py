"""What an audit found, as a small file that a third party can run again, and the verdict that follows from it.

Torch-free: `kvbuy.audit` computes. On the profile that the artifact was made on bits decide. On another one they
differ in honest artifacts too, and no tolerance separates these from int8 for every pair of profiles; so the distance
is held against an envelope that was measured for this very pair, on an artifact that one trusts
(`kvbuy.audit.calibrate`).
"""

import hashlib
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
from pydantic import Field

import kvbuy
from kvbuy.artifact import Artifact
from kvbuy.codec.arrays import Array
from kvbuy.errors import DamagedError, StoreError, UsageError
from kvbuy.manifest import Fingerprint, Profile
from kvbuy.parts import Count, Digest, FileName, FloatType, Label, Part, Positive
from kvbuy.places import cache_folder
from kvbuy.plausible import Plausibility, as_floats, describe
from kvbuy.records import parse_record, read_limited
from kvbuy.whole import write_whole

AuditVerdict = Literal["exact", "consistent", "inconsistent", "unknown profile"]
EXIT_CODES: dict[AuditVerdict, int] = {"exact": 0, "consistent": 0, "inconsistent": 3, "unknown profile": 3}
MARGIN = 1.5  # an honest block may be so many times as far off as the farthest of the envelope
LARGEST = 1e9  # a relative error of nothing's vector
MAX_FILE = 100_000_000

Error = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
P = TypeVar("P", bound=Part)


class Residual(Part):
    """Of one tensor of a block: |claimed - computed| / |computed| of its vectors, their mean and the worst."""

    mean: Error
    worst: Error


class BlockEvidence(Part):
    """A block that was computed again: its digest as claimed and as computed, and how far each tensor is off."""

    index: Count
    claimed: Digest
    computed: Digest
    residuals: tuple[Residual, ...]

    @property
    def equal(self) -> bool:
        """Whether every bit is equal."""
        return self.claimed == self.computed


class Envelope(Part):
    """How far honest blocks of one profile are from another's bits: the farthest of each tensor, over all blocks."""

    format: Literal["kvbuy envelope"] = "kvbuy envelope"
    version: Literal[1] = 1
    made_from: Digest
    tensors: tuple[Residual, ...]

    @classmethod
    def around(cls, blocks: Sequence[Sequence[Residual]], *, made_from: str) -> Self:
        """The envelope of an artifact's blocks, each block's tensors in file order."""
        tensors = tuple(
            Residual(mean=max(one.mean for one in tensor), worst=max(one.worst for one in tensor))
            for tensor in zip(*blocks, strict=True)
        )
        return cls(made_from=made_from, tensors=tensors)

    def holds(self, block: BlockEvidence) -> bool:
        """Whether a block is inside, with the margin."""
        return len(block.residuals) == len(self.tensors) and all(
            found.mean <= MARGIN * most.mean and found.worst <= MARGIN * most.worst
            for found, most in zip(block.residuals, self.tensors, strict=True)
        )


class Evidence(Part):
    """An audit: what was looked at, by whom, what was found, and what it means."""

    format: Literal["kvbuy evidence"] = "kvbuy evidence"
    version: Literal[1] = 1
    producer: Label
    made: Label
    artifact: Digest
    name: FileName
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    of_blocks: Positive
    blocks: Annotated[tuple[BlockEvidence, ...], Field(min_length=1)]
    profile: Profile
    differences: tuple[str, ...]
    envelope: Envelope | None
    implausible: tuple[str, ...]
    verdict: AuditVerdict
    failed_blocks: tuple[Count, ...]

    def agrees(self, other: Self) -> bool:
        """Whether another run found the same: the verdict, and on an equal profile every digest."""
        if self.profile == other.profile and self.blocks != other.blocks:
            return False
        return (self.artifact, self.verdict, self.failed_blocks) == (other.artifact, other.verdict, other.failed_blocks)


def choose_blocks(count: int, wanted: int, *, seed: int) -> list[int]:
    """`wanted` of `count` blocks (all, where that is fewer), in order; equal seeds choose equal ones."""
    return sorted(random.Random(seed).sample(range(count), k=min(wanted, count)))


def refuse_foreign_evidence(evidence: Evidence, artifact: Artifact) -> None:
    """Say that evidence cannot be run again on an artifact.

    Raises:
        UsageError: it is of another artifact.
        DamagedError: its blocks are not those that its seed chooses.
    """
    if evidence.artifact != artifact.id:
        raise UsageError(
            f"the evidence is of {evidence.name}, id {evidence.artifact[:12]}, not of {artifact.path.name}",
            hint="name the artifact that it is of: kvbuy audit ARTIFACT --replay FILE",
        )
    chosen = choose_blocks(len(artifact.manifest.blocks), len(evidence.blocks), seed=evidence.seed)
    if [one.index for one in evidence.blocks] != chosen:
        raise DamagedError("the evidence's blocks are not those that its seed chooses", hint="do not believe it")


def judge(
    artifact: Artifact,
    blocks: tuple[BlockEvidence, ...],
    *,
    seed: int,
    profile: Profile,
    differences: tuple[str, ...],
    numbers: Plausibility,
    envelope: Envelope | None,
) -> Evidence:
    """What blocks computed on `profile` say of an artifact; `differences` are that profile's to the artifact's.

    An envelope that was made from this very artifact says nothing of it, and is not looked at.
    """
    if envelope is not None and envelope.made_from == artifact.id:
        envelope = None
    unequal = [block for block in blocks if not block.equal]
    outside = [block for block in unequal if not (differences and envelope and envelope.holds(block))]
    verdict: AuditVerdict
    if not numbers.holds or (outside and (envelope or not differences)):
        verdict = "inconsistent"
    elif not unequal:
        verdict = "exact"
    else:
        verdict = "unknown profile" if envelope is None else "consistent"
    failed = {lattice.block for lattice in numbers.lattices}
    failed |= {block.index for block in outside} if verdict == "inconsistent" else set()
    return Evidence(
        producer=f"kvbuy {kvbuy.__version__}",
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        artifact=artifact.id,
        name=artifact.path.name,
        seed=seed,
        of_blocks=len(artifact.manifest.blocks),
        blocks=blocks,
        profile=profile,
        differences=differences,
        envelope=envelope,
        implausible=tuple(describe(numbers)),
        verdict=verdict,
        failed_blocks=tuple(sorted(failed)),
    )


def measure_residual(claimed: Array, computed: Array, dtype: FloatType) -> Residual:
    """How far a tensor [heads, rows, dim] is from the computed one."""
    wanted, found = as_floats(computed, dtype).astype(np.float64), as_floats(claimed, dtype).astype(np.float64)
    with np.errstate(all="ignore"):
        error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    error = np.clip(np.nan_to_num(np.where(np.all(found == wanted, axis=-1), 0.0, error), nan=LARGEST), 0.0, LARGEST)
    return Residual(mean=float(error.mean()), worst=float(error.max()))


def survival(buyers: int, *, blocks: int, bad: int, checked: int) -> float:
    """The chance that a bad artifact survives buyers who each check some of its blocks, chosen apart.

    One check of k of n blocks misses all m bad ones with probability C(n - m, k) / C(n, k).
    """
    from math import comb

    return float((comb(blocks - bad, checked) / comb(blocks, checked)) ** buyers)


def read_evidence(path: Path) -> Evidence:
    """An evidence file (StoreError, DamagedError)."""
    return _read(Evidence, path)


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write an evidence file (StoreError)."""
    with write_whole(path) as file:
        file.write(evidence.model_dump_json(indent=1).encode())


def read_envelope(fingerprint: Fingerprint, made_on: Profile, here: Profile) -> Envelope | None:
    """What was measured here for a model and a pair of profiles, if anything."""
    path = envelope_path(fingerprint, made_on, here)
    return _read(Envelope, path) if path.exists() else None


def write_envelope(path: Path, envelope: Envelope) -> None:
    """Keep an envelope (StoreError)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make {path.parent}: {error.strerror}", hint="set KVBUY_CACHE") from error
    with write_whole(path) as file:
        file.write(envelope.model_dump_json(indent=1).encode())


def envelope_path(fingerprint: Fingerprint, made_on: Profile, here: Profile) -> Path:
    """Where the envelope of a model and a pair of profiles is kept."""
    pair = "".join(part.sha256() for part in (fingerprint, made_on, here))
    return cache_folder() / "envelopes" / f"{hashlib.sha256(pair.encode()).hexdigest()}.json"


def _read(kind: type[P], path: Path) -> P:
    return parse_record(kind, read_limited(path, limit=MAX_FILE), name=path.name)
