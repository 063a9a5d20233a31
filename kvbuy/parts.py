"""What manifests are made of: the strictly parsed part, its kinds of fields, the codecs' parts, a tensor's place.

It knows no rule that ties one part to another: that is `kvbuy.manifest`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\Z")]
UNSEEN = r"\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"  # what a terminal must not be sent
Label = Annotated[str, Field(min_length=1, max_length=200, pattern=rf"^[^{UNSEEN}]*\Z")]
FILE_NAME = re.compile(rf"^[^{UNSEEN}/\\:]{{1,200}}\Z")
FileName = Annotated[str, Field(min_length=1, max_length=200, pattern=rf"^[^{UNSEEN}/\\:]+\Z")]
FloatType = Literal["F32", "F16", "BF16"]
Count = Annotated[int, Field(ge=0, lt=2**48)]
Positive = Annotated[int, Field(ge=1, lt=2**48)]
CodecName = Literal["raw", "fast", "dense"]


def canonical_json(value: object) -> bytes:
    """Canonical JSON (RFC 8785) of a value without floats and with ASCII keys, as UTF-8 bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Part(BaseModel):
    """A frozen, strictly parsed piece of the manifest."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", regex_engine="python-re")

    def canonical(self) -> bytes:
        """The part as canonical JSON bytes."""
        return canonical_json(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """The hex SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.canonical()).hexdigest()


class FastCodec(Part):
    """The codec of `kvbuy.codec.fast`; `sizes` are the encoded bytes of every block, then of every state tensor."""

    name: Literal["fast"]
    sizes: tuple[Count, ...]


class DenseCodec(Part):
    """The codec of `kvbuy.codec.dense`, which decodes with the pack of this digest; `sizes` as for fast."""

    name: Literal["dense"]
    pack: Digest
    sizes: tuple[Count, ...]


def _codec_tag(value: Any) -> Any:
    """Which codec a value (parsed JSON, or a part) means to be; None where there is no such codec."""
    if isinstance(value, str):
        return "raw" if value == "raw" else None
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if name in ("fast", "dense") else None


Codec = Annotated[
    Annotated[Literal["raw"], Tag("raw")] | Annotated[FastCodec, Tag("fast")] | Annotated[DenseCodec, Tag("dense")],
    Discriminator(
        _codec_tag,
        custom_error_type="codec",
        custom_error_message='a codec must be "raw" or an object with the name "fast" or "dense"',
    ),
]


def with_sizes(codec: Codec, sizes: Sequence[int]) -> Codec:
    """A codec with the encoded sizes of its pieces."""
    return codec if codec == "raw" else codec.model_copy(update={"sizes": tuple(sizes)})


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in the file: `start` counts bytes from the beginning of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """The tensor's bytes."""
        size = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size

    @property
    def end(self) -> int:
        """The first byte after the tensor."""
        return self.start + self.size
