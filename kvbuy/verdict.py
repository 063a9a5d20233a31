"""Verdicts: what verification can say about an artifact, as a closed set of values.

The words mean one thing each: intact (every digest matches), fits (the fingerprint matches), exact (the same bits as a
prefill from scratch in a fresh process), drift (distance to one single pass). Torch-free: `kvbuy.replay` measures.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Exactness:
    """Reuse against a prefill from scratch on the same schedule: blocks and state compared by digest, logits by bits.

    `max_abs_logit_diff` covers the steps up to and with the first token that differs.
    """

    blocks_equal: int
    blocks: int
    state_equal: int
    state: int
    tokens_equal: int
    tokens: int
    logits_equal: bool
    max_abs_logit_diff: float
    receipt_equal: bool

    @property
    def holds(self) -> bool:
        """Whether every bit is equal."""
        return (
            self.blocks_equal == self.blocks
            and self.state_equal == self.state
            and self.tokens_equal == self.tokens
            and self.logits_equal
            and self.receipt_equal
        )


@dataclass(frozen=True, slots=True)
class Drift:
    """One mode of reuse against a single pass over document and prompt by plain transformers with stock attention.

    Logit difference and KL (nats, single pass against reuse, the largest step's) cover the steps up to and with the
    first token that differs; `first_divergence` is that step's index, or None.
    """

    max_abs_logit_diff: float
    kl: float
    tokens_equal: int
    tokens: int
    first_divergence: int | None


@dataclass(frozen=True, slots=True)
class Exact:
    """Intact, fits, and every bit is what a prefill from scratch gives."""

    name: ClassVar[str] = "exact"
    exit_code: ClassVar[int] = 0
    exact: Exactness
    drift: dict[str, Drift]


@dataclass(frozen=True, slots=True)
class Replayed:
    """Intact, fits, and the publisher's receipt comes out bit for bit; the blocks were not computed again."""

    name: ClassVar[str] = "replayed"
    exit_code: ClassVar[int] = 0
    tokens: int


@dataclass(frozen=True, slots=True)
class Inexact:
    """Intact and fits, but made on another profile, and bits differ. `exact` is None where only the receipt ran."""

    name: ClassVar[str] = "inexact"
    exit_code: ClassVar[int] = 3
    profile: tuple[str, ...]
    exact: Exactness | None
    drift: dict[str, Drift]


@dataclass(frozen=True, slots=True)
class Wrong:
    """Intact and fits, made on this very profile, and bits differ: not that document's KV under this model."""

    name: ClassVar[str] = "wrong"
    exit_code: ClassVar[int] = 3
    reason: str
    exact: Exactness | None
    drift: dict[str, Drift]


@dataclass(frozen=True, slots=True)
class Damaged:
    """Not intact."""

    name: ClassVar[str] = "damaged"
    exit_code: ClassVar[int] = 3
    reason: str


@dataclass(frozen=True, slots=True)
class Misfit:
    """Intact, but of another model."""

    name: ClassVar[str] = "misfit"
    exit_code: ClassVar[int] = 4
    differences: tuple[str, ...]


Verdict = Exact | Replayed | Inexact | Wrong | Damaged | Misfit
