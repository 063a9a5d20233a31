"""Arrays, as codecs take them: numpy's views of bytes that somebody else owns. Alone in importing numpy for it."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from kvbuy.parts import DTYPE_BYTES, Tensor

Array = np.ndarray[Any, np.dtype[Any]]  # [heads, rows, dim] of uint16 or uint32; a head's rows lie side by side


def shaped(raw: bytes | bytearray | memoryview, dtype: str, shape: Sequence[int]) -> Array:
    """A tensor's bytes as an array: extents before the last two are multiplied, missing ones are 1."""
    *lead, rows, dim = (1, 1, *shape) if len(shape) < 3 else shape
    return np.frombuffer(raw, dtype=f"<u{DTYPE_BYTES[dtype]}").reshape(prod(lead), rows, dim)


def shaped_block(raw: bytes | bytearray | memoryview, tensors: Iterable[Tensor]) -> list[Array]:
    """A block's bytes as its arrays, one behind the other."""
    view, start, arrays = memoryview(raw), 0, []
    for tensor in tensors:
        arrays.append(shaped(view[start : start + tensor.size], tensor.dtype, tensor.shape))
        start += tensor.size
    return arrays


def head_views(tensors: Iterable[Array]) -> Iterator[memoryview]:
    """The bytes of arrays in file order, a view a head."""
    for tensor in tensors:
        for head in tensor:
            yield memoryview(head).cast("B")
