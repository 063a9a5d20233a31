"""Whether KV looks computed at all: two checks that need no model, only the numbers.

Lattice: whoever sells int8 or fp8 as bfloat16 has multiplied few different codes by a scale, so that values over their
scale lie on a grid. Their phases on that grid then agree; those of computed values do not. Entropy: computed values
take about what a Gaussian's would (`kvbuy.bounds`); far less means codes, copies or constants. Neither proves that KV
is right, and a careful cheat passes both: `kvbuy.audit` computes blocks again. Knows numpy, not artifacts or torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbuy.bounds import gaussian_bits, measure_bounds
from kvbuy.codec.arrays import Array
from kvbuy.manifest import FloatType

Values = NDArray[np.float32]

ROWS = 64  # of a block, the first ones: enough to see a grid
LEAST_ROWS = 16  # that differ: a token that comes again brings back its values, and says nothing new
LEAST_PHASES = 200
COHERENT = 0.3  # mean squared agreement of phases, above which it is a grid; SmolLM2's KV of the GPL has 0.043 at most
LEAST_VALUES = 20_000  # fewer say nothing about entropy
FAR_BELOW = 0.9  # of the Gaussian's bits
INT8_LEVELS, FP8_E4M3, FP8_STEPS = 127, 448.0, 8.0
SMALL = 16.0  # codes up to here: beyond, the rounding of the product blurs the grid


@dataclass(frozen=True, slots=True)
class Lattice:
    """A grid on which a block's values lie: of which encoding, scaled over what, and how well phases agree (0 to 1)."""

    block: int
    encoding: str
    scaled_over: str
    coherence: float


@dataclass(frozen=True, slots=True)
class Plausibility:
    """What the numbers say of themselves; `bits` are the entropy of a value (None: too few), beside the Gaussian's."""

    lattices: tuple[Lattice, ...]
    bits: float | None
    gaussian: float

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.lattices and (self.bits is None or self.bits >= FAR_BELOW * self.gaussian)


def judge_numbers(blocks: Sequence[Sequence[Array]], *, dtype: FloatType) -> Plausibility:
    """Look at an artifact's blocks, each block's tensors [heads, rows, dim] in file order."""
    bounds = measure_bounds(blocks, dtype=dtype) if sum(x.size for block in blocks for x in block) else ()
    enough = sum(tensor.size for block in blocks for tensor in block) >= LEAST_VALUES
    whole = [bound.bits for bound in bounds if bound.name == "values"]
    return Plausibility(
        lattices=tuple(found for at, block in enumerate(blocks) for found in find_lattices(block, at, dtype=dtype)),
        bits=whole[0] if whole and enough else None,
        gaussian=gaussian_bits(dtype),
    )


def find_lattices(tensors: Sequence[Array], block: int, *, dtype: FloatType) -> Iterator[Lattice]:
    """The grids of a block, the clearest of each encoding over all its tensors."""
    best: dict[str, Lattice] = {}
    for tensor in tensors:
        values = as_floats(tensor, dtype)
        for encoding, over, coherence in _coherences(values):
            if coherence > max(COHERENT, best[encoding].coherence if encoding in best else 0.0):
                best[encoding] = Lattice(block, encoding, over, round(coherence, 3))
    yield from best.values()


def as_floats(tensor: Array, dtype: FloatType) -> Values:
    """The numbers whose bits a tensor holds."""
    match dtype:
        case "BF16":
            return (tensor.astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return tensor.view(np.float16).astype(np.float32)
        case "F32":
            return tensor.view(np.float32)


def _coherences(values: Values) -> Iterator[tuple[str, str, float]]:
    """Agreement of phases for each encoding and each way to scale: a token's vector, a channel, a head."""
    few = values[:, _distinct_rows(values[:, :ROWS])]
    if few.shape[1] < LEAST_ROWS:
        return
    scales = {"a vector": (2,), "a channel": (1,), "a head": (1, 2)}
    for over, axes in scales.items():
        most = np.abs(few if axes == (2,) else values).max(axis=axes, keepdims=True)
        low, high = (pick(few if axes == (2,) else values, axis=axes, keepdims=True) for pick in (np.min, np.max))
        grouped = 2 if axes == (2,) else 1
        with np.errstate(divide="ignore", invalid="ignore"):
            yield "int8", over, _agreement(few / (most / INT8_LEVELS), axis=grouped)
            yield "int8 with zero point", over, _agreement(few / ((high - low) / (2 * INT8_LEVELS + 1)), axis=grouped)
            yield "fp8", over, _agreement(_mantissas(few / (most / FP8_E4M3)), axis=grouped)
    yield "fp8", "nothing", _agreement(_mantissas(few), axis=1)


def _distinct_rows(values: Values) -> NDArray[np.intp]:
    """The rows [heads, rows, dim] that no earlier one is equal to, in any head."""
    seen: set[bytes] = set()
    found = []
    for at in range(values.shape[1]):
        heads = {values[head, at].tobytes() for head in range(values.shape[0])}
        if not heads & seen:
            found.append(at)
        seen |= heads
    return np.array(found, dtype=np.intp)


def _mantissas(values: Values) -> Values:
    """Mantissas in steps of fp8's, on a scale where a step is 1: between 8 and 16."""
    mantissa, _ = np.frexp(np.abs(values))  # in [0.5, 1)
    return np.where(mantissa > 0, mantissa * 2 * FP8_STEPS, np.nan).astype(np.float32)


def _agreement(codes: Values, *, axis: int) -> float:
    """How far codes agree modulo 1 along an axis: the mean over groups of |mean phase|^2, unbiased.

    Codes below a half are left out: they are 0 on any grid. 0 is what random phases give, 1 what a grid gives.
    """
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(codes) & (np.abs(codes) >= 0.5) & (np.abs(codes) <= SMALL)
    count = usable.sum(axis=axis)
    phases = np.where(usable, np.exp(2j * np.pi * np.where(usable, codes, 0.0)), 0.0).sum(axis=axis)
    enough = count >= 3
    if count[enough].sum() < LEAST_PHASES:
        return 0.0
    n = count[enough].astype(np.float64)
    squared = (np.abs(phases[enough]) ** 2 - n) / (n * (n - 1))
    return float(max(0.0, squared.mean()))


def describe(found: Plausibility) -> Iterable[str]:
    """What speaks against it, in words."""
    for lattice in found.lattices:
        yield (
            f"block {lattice.block}: values lie on a grid, as of {lattice.encoding} scaled over {lattice.scaled_over} "
            f"(phases agree to {lattice.coherence:.2f})"
        )
    if found.bits is not None and found.bits < FAR_BELOW * found.gaussian:
        yield f"a value has {found.bits:.2f} bits of entropy, a computed one about {found.gaussian:.2f}"
