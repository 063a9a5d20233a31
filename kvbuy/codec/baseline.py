"""The paper's baselines: a block's bytes as they are, and zstd on them. Coders to measure against, not to ship with."""

import struct
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import zstandard

from kvbuy.codec import Coder, Encoded
from kvbuy.codec.arrays import Array

LEVELS = (1, 3, 19)


class Raw(Coder):
    """Bytes as computed: its speeds are those of copying memory."""

    def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
        """The tensors' bytes, one after the other."""
        return Encoded(data=b"".join(map(_bytes, tensors)), tensor_bytes=tuple(float(x.nbytes) for x in tensors))

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        """Copy the bytes back."""
        at = 0
        for tensor in tensors:
            _bytes(tensor)[:] = data[at : at + tensor.nbytes]
            at += tensor.nbytes


class Zstd(Coder):
    """Zstandard on raw bytes: the frames' lengths as little-endian uint32, then a frame a tensor."""

    def __init__(self, level: int) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
        """Compress each tensor."""
        frames = [self._compressor.compress(_bytes(tensor)) for tensor in tensors]
        lengths = struct.pack(f"<{len(frames)}I", *map(len, frames))
        return Encoded(data=b"".join([lengths, *frames]), tensor_bytes=tuple(4.0 + len(frame) for frame in frames))

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        """Decompress each frame into its tensor."""
        at = 4 * len(tensors)
        for length, tensor in zip(struct.unpack_from(f"<{len(tensors)}I", data), tensors, strict=True):
            with self._decompressor.stream_reader(data[at : at + length]) as reader:
                reader.readinto(_bytes(tensor))
            at += length


def baselines() -> dict[str, Callable[[], Coder]]:
    """What opens the baselines' coders, by name."""
    return {"raw": Raw} | {f"zstd-{level}": partial(Zstd, level) for level in LEVELS}


def _bytes(tensor: Array) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(np.uint8).data
