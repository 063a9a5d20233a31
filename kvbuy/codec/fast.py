"""The codec `fast`: lossless, at the speed of memory. It splits each number where its bits stop being noise.

In a tensor of a KV cache the signs and the low mantissa bits are noise, the exponents are not: those of one channel
lie close together. So every 16-bit word is cut in two bytes, and only one of them is compressed:

    word (BF16, F16, the upper half of an F32)      s e e e e e e e  e m m m m m m m
    upper byte: bits 7 to 14                          e e e e e e e  e
    lower byte: bit 15, then bits 0 to 6            s                  m m m m m m m

(For BF16 and F32 the upper byte is the exponent; for F16 it is the exponent and three bits of the mantissa.)

The bytes of an encoded piece, a block or a state tensor; all integers are little-endian:

1. A piece as long as what it decodes to is what it decodes to: the tensors' bytes in file order. (Noise never grows.)
   Any other piece MUST be shorter, and is laid out as follows.
2. First a table: for each tensor in file order the length of its frame, 4 bytes each.
3. Then tensor after tensor. Where the length in the table is 0, the tensor's bytes as they are. Else
   a. the frame: one Zstandard frame (RFC 8878) of that length, of the upper bytes in the order [heads, dim, rows].
      (Channel by channel: neighbours are alike.) It MUST NOT state its content's size, a checksum or a dictionary,
      MUST NOT need a window of more than 128 KiB, and MUST be shorter than the upper bytes;
   b. the lower bytes, in the order of the tensor, [heads, rows, dim];
   c. for F32: the numbers' lower 16 bits, 2 bytes each, in the order of the tensor.
4. Nothing follows.

A tensor that has other than three dimensions (recurrent state) is taken as [the others multiplied, rows, dim].
"""

import struct
from collections.abc import Sequence

import numpy as np
import zstandard

from kvbuy.codec import Coder, Encoded
from kvbuy.codec.arrays import Array
from kvbuy.errors import DamagedError

WINDOW_LOG = 17
# Measured on bfloat16 KV of SmolLM2: the entropy stage does all the work, and matches of fewer than 7 bytes cost more
# than they save (0.667 of the size against 0.684 at zstd's own level 1).
SETTINGS = {"min_match": 7, "hash_log": 7, "window_log": WINDOW_LOG, "write_content_size": 0}
AT_ONCE = 2**17  # words that are merged at once: about a megabyte of a core's cache


class FastCoder(Coder):
    """A coder of independent blocks (`kvbuy.codec.Coder`)."""

    def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
        """Encode one block's tensors."""
        return encode_tensors(tensors)

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        """Fill one block's tensors (DamagedError where `data` cannot be theirs)."""
        decode_tensors(data, tensors)


def encode_tensors(tensors: Sequence[Array]) -> Encoded:
    """Encode arrays [heads, rows, dim] of uint16 or uint32 as one piece."""
    parameters = zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, **SETTINGS)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    lengths, parts, costs = [], [], []
    for tensor in tensors:
        frame, rest = _encode(compressor, tensor)
        lengths.append(len(frame))
        parts += [frame, *rest]
        costs.append(4.0 + len(frame) + sum(map(len, rest)))
    sizes = [float(tensor.nbytes) for tensor in tensors]
    if sum(costs) >= sum(sizes):
        return Encoded(data=b"".join(tensor.tobytes() for tensor in tensors), tensor_bytes=tuple(sizes))
    return Encoded(data=b"".join([struct.pack(f"<{len(lengths)}I", *lengths), *parts]), tensor_bytes=tuple(costs))


def decode_tensors(data: memoryview, tensors: Sequence[Array]) -> None:
    """Fill arrays [heads, rows, dim] of uint16 or uint32, whose heads may be strided, from a piece.

    Raises:
        DamagedError: no such arrays were encoded to these bytes.
    """
    size, table = sum(tensor.nbytes for tensor in tensors), 4 * len(tensors)
    if len(data) == size:
        lengths = [0] * len(tensors)
        table = 0
    elif table <= len(data) < size:
        lengths = list(struct.unpack(f"<{len(tensors)}I", data[:table]))
    else:
        raise DamagedError(f"{len(data)} bytes cannot encode {size}")
    ends = [_size(tensor, length) for tensor, length in zip(tensors, lengths, strict=True)]
    if table + sum(ends) != len(data):
        raise DamagedError("the table of lengths does not fill its piece")
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**WINDOW_LOG)
    start = table
    for tensor, length, count in zip(tensors, lengths, ends, strict=True):
        piece = data[start : start + count]
        if length:
            _decode(decompressor, piece[:length], piece[length:], tensor)
        else:
            np.copyto(tensor, np.frombuffer(piece, tensor.dtype).reshape(tensor.shape))
        start += count


def _size(tensor: Array, length: int) -> int:
    """The bytes of a tensor in a piece, given its frame's length."""
    if length >= max(tensor.size, 1):
        raise DamagedError("a frame is not shorter than what it encodes")
    return tensor.nbytes - tensor.size + length if length else tensor.nbytes


def _encode(compressor: zstandard.ZstdCompressor, tensor: Array) -> tuple[bytes, list[bytes]]:
    """A tensor's frame and the bytes that follow it; an empty frame where compressing does not help."""
    words: Array = tensor if tensor.itemsize == 2 else (tensor >> 16).astype(np.uint16)
    upper = (words >> 7).astype(np.uint8)
    frame = compressor.compress(np.ascontiguousarray(upper.transpose(0, 2, 1)).data)
    if len(frame) >= tensor.size:
        return b"", [tensor.tobytes()]
    lower, signs = words.astype(np.uint8), (words >> 8).astype(np.uint8)
    lower &= 0x7F
    signs &= 0x80
    lower |= signs
    halves = [] if tensor.itemsize == 2 else [tensor.astype(np.uint16).tobytes()]
    return frame, [lower.tobytes(), *halves]


def _decode(decompressor: zstandard.ZstdDecompressor, frame: memoryview, rest: memoryview, tensor: Array) -> None:
    heads, rows, dim = tensor.shape
    upper = np.frombuffer(_decompress(decompressor, frame, tensor.size), np.uint8).reshape(heads, dim, rows)
    lower = np.frombuffer(rest[: tensor.size], np.int8).reshape(tensor.shape)
    step = max(1, AT_ONCE // (rows * dim))
    for at in range(0, heads, step):
        part = slice(at, at + step)
        if tensor.itemsize == 2:
            _merge(upper[part], lower[part], tensor[part])
        else:
            words = np.empty((len(tensor[part]), rows, dim), np.uint16)
            _merge(upper[part], lower[part], words)
            np.copyto(tensor[part], words)
            tensor[part] <<= 16
            tensor[part] |= np.frombuffer(rest[tensor.size :], np.uint16).reshape(tensor.shape)[part]


def _merge(upper: Array, lower: Array, words: Array) -> None:
    """Fill uint16 words [heads, rows, dim] from upper bytes [heads, dim, rows] and lower bytes (int8)."""
    np.copyto(words, np.ascontiguousarray(upper.transpose(0, 2, 1)))
    words <<= 7
    signed = lower.astype(np.int16)  # the cast copies the sign into bits 7 to 15
    signed &= np.int16(0x807F - 0x10000)
    words |= signed.view(np.uint16)


def _decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, size: int) -> bytes:
    """The content of a frame, which must have just this size."""
    try:
        header = zstandard.get_frame_parameters(frame)
        if header.content_size != zstandard.CONTENTSIZE_UNKNOWN or header.dict_id or header.has_checksum:
            raise DamagedError("a frame states what it must not")
        content = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedError(f"a frame cannot be decompressed: {error}") from error
    if len(content) != size:
        raise DamagedError(f"a frame holds {len(content)} bytes instead of {size}")
    return content
