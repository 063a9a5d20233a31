"""Codecs: between a block's tensors and bytes, losslessly. Knows nothing of files, manifests or torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint16] | NDArray[np.uint32]  # the bits of BF16 and F16, or of F32: [heads, rows, dim]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A coded block. `tensor_bytes`: what each tensor cost, key and value of each full layer in file order."""

    data: bytes
    tensor_bytes: tuple[float, ...]


class Coder(Protocol):
    """A lossless codec of blocks. A block is decoded with nothing but the blocks before it."""

    def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
        """Encode one block's tensors."""

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        """Decode one block into its tensors, every value of them."""
