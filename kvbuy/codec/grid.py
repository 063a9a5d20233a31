"""The grid: what a float means to the integer arithmetic of `dense`. Knows no model, no stream.

A float of any format is an ordered integer, its **code**: `s >= 0` for the bit patterns of positive floats in order,
and `-1 - b` for the negative float with magnitude bits `b`. Codes and floats have the same order; -0 is -1, NaNs lie
outside the infinities, so every bit pattern is a code. A code's **cell** is the interval of reals that round to it.
Cells meet in **edges**: halfway between neighbours, or at the code itself where a format is cut off rather than
rounded.

Values and edges are 32-bit integers in fixed point. `origin` says which: it is the exponent field at which a mantissa
with one bit more than the format's is taken as it stands; above it is shifted left, below it right. Magnitudes stay
below 2**29: greater floats are taken for the greatest below. Both maps are monotone, which is all that the coder
needs; what is finer than the fixed point shares its edges.

float32 is cut into its upper 16 bits, which are coded like a bfloat16, and its lower 16, which are noise and stay raw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

from kvbuy.codec.compiled import inlined
from kvbuy.manifest import FloatType

Codes = npt.NDArray[np.int32]
Halves = npt.NDArray[np.uint16]  # bit patterns: of 16-bit floats, or the upper halves of float32

narrow = cast(Callable[[Any], int], np.int32)  # compiled integers grow to 64 bits, which are slow, unless cut at once


class Format(NamedTuple):
    """A 16-bit grid: mantissa bits, 1 where cells are centred on their code (0: they begin there), exponent bias.

    `zone` is how many octaves below the scale of a residual the codes get too fine for 16-bit probabilities.
    """

    mantissa: int
    centred: int
    bias: int
    zone: int


@dataclass(frozen=True, slots=True)
class Grid:
    """How tensors of a dtype become codes: its format, and how many low bits of each number stay raw."""

    format: Format
    raw_bits: int


GRIDS: dict[FloatType, Grid] = {
    "BF16": Grid(Format(mantissa=7, centred=1, bias=127, zone=6), raw_bits=0),
    "F16": Grid(Format(mantissa=10, centred=1, bias=15, zone=3), raw_bits=0),
    "F32": Grid(Format(mantissa=7, centred=0, bias=127, zone=6), raw_bits=16),
}


def _shift(name: str) -> Callable[[int, int], int]:
    """A shift by less than 32 of a number of 32 bits, in 32 bits: one instruction, also for vectors."""

    def shift(_context: Any, _number: Any, _by: Any) -> Any:
        def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            number, by = arguments
            return getattr(builder, name)(number, builder.and_(by, by.type(31)))

        return numba.int32(numba.int32, numba.int32), build

    shift.__name__ = name
    return cast(Callable[[int, int], int], intrinsic(shift))


def _bits(_context: Any, number: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return numba.int32(number), build


shifted_up, shifted_down = _shift("shl"), _shift("ashr")  # down rounds towards minus infinity
float_bits = cast(Callable[[Any], int], intrinsic(_bits))  # a float32's bit pattern


@inlined
def lesser(one: int, other: int) -> int:
    """The lesser of two numbers of 32 bits."""
    a, b = narrow(one), narrow(other)
    return a if a < b else b


@inlined
def greater(one: int, other: int) -> int:
    """The greater of two numbers of 32 bits."""
    a, b = narrow(one), narrow(other)
    return a if a > b else b


@inlined
def clip(number: int, low: int, high: int) -> int:
    """The nearest number in [low, high]; all are of 32 bits."""
    return lesser(greater(number, low), high)


@inlined
def to_code(bits: int) -> int:
    """The code of a 16-bit pattern."""
    return narrow(bits) if narrow(bits) < 32768 else narrow(32767 - narrow(bits))


@inlined
def to_bits(code: int) -> int:
    """The 16-bit pattern of a code."""
    return narrow(code) if narrow(code) >= 0 else narrow(32767 - narrow(code))


@inlined
def magnitude(half_code: int, form: Format, origin: int) -> int:
    """The fixed point of a magnitude code with one mantissa bit more than the format has."""
    bits = form.mantissa + 1
    top = narrow(origin + 28 - bits)  # the field of the greatest magnitudes: their mantissa ends below bit 29
    half = lesser(half_code, greater(narrow(shifted_up(narrow(top + 1), bits) - 1), 0))
    field = greater(shifted_down(half, bits), 1)
    mantissa = narrow(half - shifted_up(narrow(field - 1), bits))
    return shifted_down(shifted_up(mantissa, narrow(28 - bits)), clip(narrow(top - field), 0, 31))


@inlined
def edge(code: int, form: Format, origin: int) -> int:
    """The lower edge of a code's cell; the upper one is the next code's lower edge."""
    short = narrow(code)
    size = magnitude(greater(narrow(2 * greater(short, narrow(-short)) - form.centred), 0), form, origin)
    return size if short >= 0 else narrow(-size)


@inlined
def rank(code: int) -> int:
    """A code's magnitude, as if it were positive: 0 for the two codes at zero."""
    short = narrow(code)
    return short if short >= 0 else narrow(-1 - short)


@inlined
def centre(code: int, form: Format, origin: int) -> int:
    """The middle of a code's cell: the value that prediction works with."""
    size = magnitude(narrow(2 * rank(code) + 1 - form.centred), form, origin)
    return size if narrow(code) >= 0 else narrow(-size)
