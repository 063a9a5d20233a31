"""Where the wall is: entropies of keys and values in bits a value, beside which a codec's ratio can be judged.

They bound codecs that look at one value at a time, each with tables that cost nothing. A codec that predicts a value
from others can pass them. Knows numpy arrays and floating-point layouts, not artifacts or codecs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbuy.codec.arrays import Array
from kvbuy.manifest import FloatType

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """The bits of a floating-point value: one sign, then so many of exponent and mantissa."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        """All of them."""
        return 1 + self.exponent_bits + self.mantissa_bits


LAYOUTS: dict[FloatType, Layout] = {"BF16": Layout(8, 7), "F16": Layout(5, 10), "F32": Layout(8, 23)}


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound in bits a value, and as ratios to the values' own bits: of keys, of values, of both together."""

    name: str
    key_bits: float
    value_bits: float
    bits: float
    key_ratio: float
    value_ratio: float
    ratio: float


@dataclass(frozen=True, slots=True)
class _Entropies:
    """Of one tensor over all blocks, in bits a value."""

    order0: float
    exponent: float
    sign_exponent: float


def measure_bounds(blocks: Sequence[Sequence[Array]], *, dtype: FloatType) -> tuple[Bound, ...]:
    """The bounds of an artifact's blocks, each block's tensors [heads, rows, dim] in file order; none without blocks.

    - "values": order-0 entropy of a layer's whole values; of 32-bit ones, of their exponent, the other bits raw.
    - "exponents a channel": a channel is a dim of a head of a layer; its exponents' entropy, sign and mantissa raw.
    - "signs and exponents a channel": the two jointly, the mantissa raw.
    - "Gaussian": what Gaussian values would have (`gaussian_bits`), whatever their scale.
    """
    if not blocks:
        return ()
    layout = LAYOUTS[dtype]
    found = [_entropies([block[at] for block in blocks], layout) for at in range(len(blocks[0]))]
    weights = [sum(block[at].size for block in blocks) for at in range(len(blocks[0]))]
    names = {
        "values": [one.order0 for one in found],
        "exponents a channel": [one.exponent for one in found],
        "signs and exponents a channel": [one.sign_exponent for one in found],
        "Gaussian": [gaussian_bits(dtype)] * len(found),
    }
    return tuple(_bound(name, bits, weights, layout) for name, bits in names.items())


def gaussian_bits(dtype: FloatType) -> float:
    """The entropy of a zero-mean Gaussian rounded to `dtype`, in bits a value: 10.46 in BF16, 13.46 in F16.

    A finely quantised variable has the entropy h(X) - E[log2 step] (Cover and Thomas, Elements of Information Theory,
    theorem 8.3.1). At scale 1, h(X) = log2(2 pi e) / 2, and the step is 2^(floor(log2 |x|) - mantissa bits). Another
    scale moves both terms alike, but for the scale's place inside an octave, which is worth less than 0.001 bits.
    """
    octaves = (
        at * (math.erf(2.0 ** (at + 1) / math.sqrt(2)) - math.erf(2.0**at / math.sqrt(2))) for at in range(-60, 6)
    )
    return math.log2(2 * math.pi * math.e) / 2 + LAYOUTS[dtype].mantissa_bits - sum(octaves)


def entropy_bits(counts: Counts) -> NDArray[np.float64]:
    """The entropy of each row of counts [rows, symbols], in bits a symbol.

    The plug-in estimate with the correction of Miller (1955), (seen symbols - 1) / (2 n ln 2), without which few values
    would look more compressible than they are.
    """
    total = counts.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(counts > 0, counts * np.log2(counts), 0.0).sum(axis=-1)
    seen: Counts = (counts > 0).sum(axis=-1)
    bits: NDArray[np.float64] = np.log2(total) - logs / total + (seen - 1) / (2 * total * math.log(2))
    return bits


def _entropies(tensors: Sequence[Array], layout: Layout) -> _Entropies:
    """Of one layer's keys or values, a tensor [heads, rows, dim] a block."""
    heads, _, dim = tensors[0].shape
    symbols = 1 << (1 + layout.exponent_bits)
    values = np.zeros(1 << 16, dtype=np.int64)
    channels = np.zeros(heads * dim * symbols, dtype=np.int64)
    first = (np.arange(heads)[:, None, None] * dim + np.arange(dim)) * symbols  # of each channel [heads, 1, dim]
    for tensor in tensors:
        channels += np.bincount(((tensor >> layout.mantissa_bits) + first).reshape(-1), minlength=channels.size)
        if layout.bits == 16:
            values += np.bincount(tensor.reshape(-1), minlength=values.size)
    signed = channels.reshape(heads * dim, 2, symbols // 2)
    exponents = signed.sum(axis=1)
    raw = 1 + layout.mantissa_bits
    whole = entropy_bits(values) if layout.bits == 16 else entropy_bits(exponents.sum(axis=0)) + raw
    return _Entropies(
        order0=float(whole),
        exponent=float(entropy_bits(exponents).mean()) + raw,
        sign_exponent=float(entropy_bits(signed.reshape(heads * dim, symbols)).mean()) + layout.mantissa_bits,
    )


def _bound(name: str, bits: Sequence[float], weights: Sequence[int], layout: Layout) -> Bound:
    """Mean over keys (even tensors), values (odd ones) and both, weighted by how many values they hold."""
    key, value, both = (float(np.average(bits[part], weights=weights[part])) for part in _PARTS)
    ratios = (one / layout.bits for one in (key, value, both))
    return Bound(name, key, value, both, *ratios)


_PARTS = (slice(0, None, 2), slice(1, None, 2), slice(None))
