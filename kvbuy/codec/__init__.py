"""Codecs: how a block's tensors become fewer bytes, and exactly the same tensors again.

A coder is opened once for an artifact and used block by block; it never sees a file. It gets a block's key and value
tensors in file order as numpy arrays [heads, rows, dim] of unsigned integers (uint16 for BF16 and F16, uint32 for F32),
because a codec is about bits, not numbers. Whether what it decodes is right is for the block's digest to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

from kvbuy.errors import UsageError
from kvbuy.manifest import Manifest
from kvbuy.parts import Codec, CodecName, FastCodec

if TYPE_CHECKING:
    from kvbuy.codec.arrays import Array as Array


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded block, and how many of its bytes each of its tensors costs."""

    data: bytes
    tensor_bytes: tuple[float, ...]


class Coder(Protocol):
    """Encodes and decodes an artifact's blocks: from several threads at once, submitted in the blocks' order."""

    def encode_block(self, index: int, tensors: "Sequence[Array]") -> Encoded:
        """Encode one block's tensors."""
        ...

    def decode_block(self, index: int, data: memoryview, tensors: "Sequence[Array]") -> None:
        """Fill one block's tensors (DamagedError where `data` cannot be theirs)."""
        ...


def open_coder(manifest: Manifest, tokens: Sequence[int]) -> Coder:
    """The coder of a coded artifact; `tokens` are the document's token ids.

    Raises:
        UsageError: the artifact is raw, or this kvbuy lacks its codec.
    """
    match manifest.codec_name:
        case "raw":
            raise UsageError("a raw artifact has no coder")
        case "fast":
            from kvbuy.codec.fast import FastCoder

            return FastCoder()
        case "dense":
            raise UsageError("this kvbuy cannot read the codec dense")
        case name:
            assert_never(name)


def codec_part(name: CodecName, sizes: Sequence[int]) -> Codec:
    """The manifest's `codec` for a codec's name and its encoded sizes.

    Raises:
        UsageError: this kvbuy cannot write the codec.
    """
    match name:
        case "raw":
            return "raw"
        case "fast":
            return FastCodec(name="fast", sizes=tuple(sizes))
        case "dense":
            raise UsageError("this kvbuy cannot write the codec dense", hint="take fast")
        case _:
            assert_never(name)
