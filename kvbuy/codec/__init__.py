"""Codecs: how a block's tensors become fewer bytes, and exactly the same tensors again.

A coder is opened once for an artifact and used block by block; it never sees a file. It gets a block's key and value
tensors in file order as numpy arrays [heads, rows, dim] of unsigned integers (uint16 for BF16 and F16, uint32 for F32),
because a codec is about bits, not numbers. Whether what it decodes is right is for the block's digest to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

from kvbuy.errors import UsageError
from kvbuy.manifest import Fingerprint, Manifest
from kvbuy.parts import Codec, CodecName, DenseCodec, FastCodec

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

    def abandon(self) -> None:
        """A block will never be decoded: blocks that wait for it raise instead of waiting for ever."""
        return  # in most codecs none waits


def open_coder(manifest: Manifest, tokens: Sequence[int]) -> Coder:
    """The coder of a coded artifact; `tokens` are the document's token ids.

    Raises:
        UsageError: the artifact is raw, or the codec needs an extra that is not installed.
        PackError: the pack that decodes it is not here.
        DamagedError: its pack belongs to another model.
    """
    match manifest.codec:
        case "raw":
            raise UsageError("a raw artifact has no coder")
        case FastCodec():
            from kvbuy.codec.fast import FastCoder

            return FastCoder()
        case DenseCodec(pack=digest):
            from kvbuy.codec.load import open_dense

            return open_dense(manifest, tokens, digest=digest)
        case codec:
            assert_never(codec)


def plan_codec(name: CodecName, fingerprint: Fingerprint, *, tokens: int) -> Codec:
    """The codec that a name means for a model and a document's length, its sizes not yet known.

    Raises:
        UsageError: it needs an extra that is not installed, or cannot code so many tokens.
        PackError: it needs a pack, and the model has none here.
        DamagedError: the model's newest pack is no good.
    """
    match name:
        case "raw":
            return "raw"
        case "fast":
            return FastCodec(name="fast", sizes=())
        case "dense":
            from kvbuy.codec.load import plan_dense

            return DenseCodec(name="dense", pack=plan_dense(fingerprint, tokens=tokens), sizes=())
        case _:
            assert_never(name)
