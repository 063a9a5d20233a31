"""The manifest: everything an artifact says about itself, and the format law.

Format law, version 1 (MUST and MAY as in RFC 2119):

 1. An artifact is one safetensors file. Its `__metadata__` MUST hold exactly three keys: `format` = "pt", `kvbuy` = the
    manifest, `kvbuy_id` = the lower-case hex SHA-256 of the manifest's UTF-8 bytes, which is the artifact's id.
    (Any safetensors reader can open the file; one that knows kvbuy can check it.)
 2. The manifest MUST be canonical JSON (RFC 8785) and hold integers, strings, booleans, null, arrays and objects only.
    (No floats, so that every language writes the same bytes.) A reader MUST refuse a manifest that it would not have
    written itself: other spacing or order, a duplicate or unknown key, an unknown version, codec or layer kind.
 3. The file's header MUST be the one that the manifest implies, byte for byte: tensor names, dtypes, shapes, order and
    offsets all follow from it. (So no header bit is free, and names can hold no surprises.) It is padded with spaces
    to a multiple of 64 bytes. Tensors MUST fill the rest without hole or overlap.
 4. Tensors come in this order: block after block, in each layer after layer, `block.B.layer.L.key` and `.value` of
    shape [heads, rows, dim]; then `state.L.NAME`; then `tokens` (I32, the document's token ids) and `text` (U8, the
    UTF-8 text that was tokenised). (Block-major: a prefix of the document is a prefix of the file.)
 5. A block holds `profile.block_size` consecutive tokens; only the last MAY be shorter. Its `digest` is the BLAKE3-256
    of its decoded tensors' bytes in file order; `tokens`, `text` and state tensors have digests of the same kind.
    (BLAKE3, because SHA-256 would be the bottleneck of loading: README, "Measured".)
 6. A block's `id` is SHA-256("kvbuy block 1\\0" + parent id + SHA-256(fingerprint) + SHA-256(profile) + token ids as
    little-endian int32); the first parent is 32 zero bytes. (Equal prefixes of different documents have equal ids.)
 7. Layers whose `kind` is "full" live in the blocks. "sliding" and "recurrent" layers live in `state`, as they stand
    at the document's end; a sliding layer MAY keep up to block_size - 1 rows more, for aligned reuse.
 8. `codec` is "raw", or an object with the `name` of a codec ("fast", "dense") and `sizes`: the encoded bytes of every
    block and then of every state tensor. The file's tensors then are `block.B` (U8, [size]), `state.L.NAME` (U8,
    [size]), `tokens` and `text`. No size MAY exceed the decoded one by more than 0.1% and 64 bytes, or be less than
    half of it (a 64th for a block in "dense"). (So that a small manifest implies a small file, and a small file small
    memory.) State tensors MUST be coded as in "fast" whatever the name is; "dense" names the
    `pack` that it needs. Ids, digests and receipt are of decoded bytes: coding anew changes nothing but `codec`.
    (What a codec's bytes mean is law too: `kvbuy.codec.fast`, `kvbuy.codec.dense`.)
 9. Nothing in a file chooses a class, a path or code. Labels (`model`, `document.name`) are not identity.

This module knows nothing of files, tensors in memory, or torch.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kvbuy.errors import DamagedError, UsageError
from kvbuy.parts import DTYPE_BYTES, UNSEEN, Codec, CodecName, Count, Digest, FileName, Label, Part, Positive
from kvbuy.parts import FloatType as FloatType
from kvbuy.parts import Tensor as Tensor
from kvbuy.parts import canonical_json as canonical_json

FORMAT_VERSION = 1
HEADER_ALIGNMENT = 64
LARGEST_BLOCK = 2**20
FIRST_PARENT = "0" * 64
PIECE_ROOM = 64
DENSEST = 64


class Fingerprint(Part):
    """All that changes the values: two models with equal fingerprints compute the same KV, up to rounding."""

    weights: Digest
    config: Digest
    tokenizer: Digest
    chat_template: Digest | None
    dtype: FloatType
    quantization: Digest | None
    adapters: tuple[Digest, ...]


class Profile(Part):
    """All that changes the rounding: on equal profiles equal fingerprints give equal bits.

    The number of threads is not here: it was measured not to change a bit (1 to 16 threads).
    """

    block_size: Annotated[int, Field(ge=16, le=LARGEST_BLOCK, multiple_of=16)]
    attention: Label
    torch: Label
    transformers: Label
    device: Label
    processor: Label


class ModelLabel(Part):
    """Where the publisher had the model from: a label to find it by, never its identity."""

    name: Label
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}\Z")] | None


class Document(Part):
    """The document: its label, and the text that was tokenised (with `chat`, the rendered head of the template)."""

    name: FileName
    chat: bool
    text_bytes: Positive
    text_digest: Digest
    tokens: Positive
    tokens_digest: Digest


class FullLayer(Part):
    """A full-attention layer: its keys and values live in the blocks."""

    kind: Literal["full"]
    heads: Positive
    key_dim: Positive
    value_dim: Positive


class SlidingLayer(Part):
    """A sliding-window layer: the rows that continuing needs live in the state."""

    kind: Literal["sliding"]
    window: Annotated[int, Field(ge=2, lt=2**48)]


class RecurrentLayer(Part):
    """A recurrent or convolution layer: its state at the document's end."""

    kind: Literal["recurrent"]


Layer = Annotated[FullLayer | SlidingLayer | RecurrentLayer, Field(discriminator="kind")]


class Block(Part):
    """A run of document tokens."""

    tokens: Positive
    id: Digest
    digest: Digest


class StateTensor(Part):
    """One tensor of a layer's state at the document's end."""

    layer: Count
    name: Annotated[str, Field(pattern=r"^(key|value|(conv|recurrent)\.[0-9]{1,2})\Z")]
    dtype: FloatType
    shape: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)]
    digest: Digest


class Receipt(Part):
    """What the publisher's own continuation gave: replayable for the price of its tokens, without prefill.

    `prompt_tokens` are the rows that were run after the document, `tokens` the greedy continuation, `logits` the
    SHA-256 of the logits' bits [len(tokens), vocabulary] as little-endian float32.
    """

    prompt: Annotated[str, Field(max_length=10_000)]
    prompt_tokens: Annotated[tuple[Count, ...], Field(min_length=1, max_length=1_000)]
    tokens: Annotated[tuple[Count, ...], Field(min_length=1, max_length=64)]
    logits: Digest


class Manifest(Part):
    """The manifest of an artifact. Its bytes are `canonical()`, and `sha256()` of them is the artifact's id."""

    format: Literal["kvbuy"]
    version: Literal[1]
    producer: Label
    created: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z")]
    model: ModelLabel
    fingerprint: Fingerprint
    profile: Profile
    document: Document
    codec: Codec
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=10_000)]
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]
    state: tuple[StateTensor, ...]
    receipt: Receipt

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        sizes = [block.tokens for block in self.blocks]
        full = self.profile.block_size
        if any(size != full for size in sizes[:-1]) or sizes[-1] > full:
            raise ValueError(f"every block but the last must hold {full} tokens")
        if sum(sizes) != self.document.tokens:
            raise ValueError(f"blocks hold {sum(sizes)} tokens, the document {self.document.tokens}")
        return self

    @model_validator(mode="after")
    def _check_state(self) -> Self:
        stored: dict[int, list[StateTensor]] = {}
        keys = [(tensor.layer, tensor.name) for tensor in self.state]
        if keys != sorted(set(keys)):
            raise ValueError("state tensors must be unique and sorted by layer and name")
        for tensor in self.state:
            if tensor.layer >= len(self.layers):
                raise ValueError(f"state tensor of layer {tensor.layer}, but there are {len(self.layers)} layers")
            if (tensor.name in ("key", "value")) != (self.layers[tensor.layer].kind == "sliding"):
                raise ValueError(f"layer {tensor.layer} ({self.layers[tensor.layer].kind}) cannot hold {tensor.name!r}")
            stored.setdefault(tensor.layer, []).append(tensor)
        for index, layer in enumerate(self.layers):
            held = {tensor.name: tensor.shape for tensor in stored.get(index, [])}
            if layer.kind == "sliding":
                self._check_window(index, layer, held)
            elif bool(held) != (layer.kind == "recurrent"):
                raise ValueError(f"layer {index} ({layer.kind}) holds state {sorted(held)}")
        return self

    def _check_window(self, index: int, layer: SlidingLayer, held: dict[str, tuple[int, ...]]) -> None:
        rows = window_rows(self.document.tokens, self.profile.block_size, layer.window)
        if set(held) != {"key", "value"} or any(len(shape) != 3 or shape[1] != rows for shape in held.values()):
            raise ValueError(f"layer {index} must hold key and value with {rows} rows each")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.codec != "raw":
            decoded = self.decoded_sizes()
            if len(self.codec.sizes) != len(decoded):
                raise ValueError(f"{len(self.codec.sizes)} sizes for {len(decoded)} blocks and state tensors")
            for index, (size, full) in enumerate(zip(self.codec.sizes, decoded, strict=True)):
                if bool(size) != bool(full):
                    raise ValueError("a piece has no bytes just where it decodes to none")
                dense = self.codec.name == "dense" and index < len(self.blocks)
                least, most = -(-full // (DENSEST if dense else 2)), full + full // 1000 + PIECE_ROOM
                if not least <= size <= most:
                    raise ValueError(f"encoded piece {index} has {size} bytes, it may have {least} to {most}")
        return self

    @property
    def codec_name(self) -> CodecName:
        """The codec's name, "raw" for none."""
        return "raw" if self.codec == "raw" else self.codec.name

    def with_codec(self, codec: Codec) -> Self:
        """The manifest of the same contents in another codec."""
        return type(self)(**dict(self) | {"codec": codec})

    def block_start(self, index: int) -> int:
        """The position of a block's first token."""
        return index * self.profile.block_size

    def block_span(self, index: int) -> tuple[int, int]:
        """Where one block lies among the decoded bytes: its first byte and the byte after its last."""
        numbers = sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self._full_layers().values())
        row_bytes = numbers * DTYPE_BYTES[self.fingerprint.dtype]
        start = self.block_start(index)
        return start * row_bytes, (start + self.blocks[index].tokens) * row_bytes

    def block_tensors(self, index: int) -> list[Tensor]:
        """The tensors of one block as decoded, in file order."""
        start, _ = self.block_span(index)
        tensors = []
        for at, layer in self._full_layers().items():
            for part, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
                shape = (layer.heads, self.blocks[index].tokens, dim)
                tensors.append(Tensor(f"block.{index}.layer.{at}.{part}", self.fingerprint.dtype, shape, start))
                start = tensors[-1].end
        return tensors

    def state_tensors(self) -> list[Tensor]:
        """The tensors of the state as decoded, in the order of `state`."""
        _, start = self.block_span(len(self.blocks) - 1)
        tensors = []
        for tensor in self.state:
            tensors.append(Tensor(f"state.{tensor.layer}.{tensor.name}", tensor.dtype, tensor.shape, start))
            start = tensors[-1].end
        return tensors

    def side_tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors `tokens` and `text`."""
        tokens = Tensor("tokens", "I32", (self.document.tokens,), self.stored_kv_bytes())
        return tokens, Tensor("text", "U8", (self.document.text_bytes,), tokens.end)

    def pieces(self) -> list[Tensor]:
        """A coded artifact's encoded blocks and then state tensors, in file order; none in a raw one."""
        names = [f"block.{index}" for index in range(len(self.blocks))]
        names += [f"state.{tensor.layer}.{tensor.name}" for tensor in self.state]
        start, pieces = 0, []
        for name, size in zip(names, self.codec.sizes, strict=True) if self.codec != "raw" else ():
            pieces.append(Tensor(name, "U8", (size,), start))
            start += size
        return pieces

    def decoded_sizes(self) -> list[int]:
        """The decoded bytes of every block and then of every state tensor, in file order."""
        spans = (self.block_span(index) for index in range(len(self.blocks)))
        return [end - start for start, end in spans] + [tensor.size for tensor in self.state_tensors()]

    def count_tensors(self) -> int:
        """How many tensors the file has."""
        a_block = 2 * len(self._full_layers()) if self.codec == "raw" else 1
        return a_block * len(self.blocks) + len(self.state) + 2

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the file, in file order."""
        if self.codec == "raw":
            for index in range(len(self.blocks)):
                yield from self.block_tensors(index)
            yield from self.state_tensors()
        yield from self.pieces()
        yield from self.side_tensors()

    def header(self) -> bytes:
        """The file's safetensors header: length, JSON, padding."""
        entries: dict[str, Any] = {
            "__metadata__": {"format": "pt", "kvbuy": self.canonical().decode(), "kvbuy_id": self.sha256()}
        }
        for tensor in self.tensors():
            offsets = [tensor.start, tensor.end]
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def data_bytes(self) -> int:
        """The bytes after the header."""
        return self.side_tensors()[-1].end

    def stored_kv_bytes(self) -> int:
        """The bytes that keys, values and state take in the file."""
        return self.kv_bytes() if self.codec == "raw" else sum(self.codec.sizes)

    def kv_bytes(self) -> int:
        """The bytes of keys, values and state, decoded."""
        state = self.state_tensors()
        return state[-1].end if state else self.block_span(len(self.blocks) - 1)[1]

    def _full_layers(self) -> dict[int, FullLayer]:
        return {at: layer for at, layer in enumerate(self.layers) if isinstance(layer, FullLayer)}


def refuse_block_size(block_size: int) -> None:
    """Raise UsageError where a block cannot have so many tokens."""
    if not 16 <= block_size <= LARGEST_BLOCK or block_size % 16:
        raise UsageError(
            f"a block holds a multiple of 16 tokens, at most {LARGEST_BLOCK}; not {block_size}",
            hint="leave --block-size out for 512",
        )


def as_label(name: str) -> str:
    """A name as a label that a manifest may hold: what it must not hold becomes "_"."""
    return re.sub(rf"[{UNSEEN}/\\:]", "_", name)[:200] or "_"


def parse_manifest(raw: bytes) -> Manifest:
    """Parse a manifest by the format law.

    Raises:
        DamagedError: it breaks the law; the message says where.
    """
    version = re.search(rb'"version":([0-9]{1,9})(?![0-9])', raw)
    if version is not None and int(version[1]) > FORMAT_VERSION:
        raise DamagedError(
            f"the artifact has format version {int(version[1])}, this kvbuy reads up to {FORMAT_VERSION}",
            hint="upgrade it: pip install -U kvbuy",
        )
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "manifest"
        reason = re.sub(f"[{UNSEEN}]", "?", f"{where[:80]}: {first['msg'][:200]}")
        raise DamagedError(f"the manifest breaks the format law at {reason}") from error
    if manifest.canonical() != raw:
        raise DamagedError("the manifest is not canonical JSON (spacing, order or a duplicate key)")
    return manifest


def chain_blocks(
    token_ids: Sequence[int], *, fingerprint: Fingerprint, profile: Profile, digests: Sequence[str]
) -> tuple[Block, ...]:
    """The blocks of a document: token ids cut at the profile's block size, each id chained to the one before.

    `digests` are the blocks' content digests, one a block. The id's formula is rule 6 of the format law.
    """
    identity = bytes.fromhex(fingerprint.sha256()) + bytes.fromhex(profile.sha256())
    parent = FIRST_PARENT
    blocks = []
    for index, digest in enumerate(digests):
        ids = token_ids[index * profile.block_size : (index + 1) * profile.block_size]
        tokens = struct.pack(f"<{len(ids)}i", *ids)
        parent = hashlib.sha256(b"kvbuy block 1\0" + bytes.fromhex(parent) + identity + tokens).hexdigest()
        blocks.append(Block(tokens=len(ids), id=parent, digest=digest))
    return tuple(blocks)


def window_rows(tokens: int, block_size: int, window: int) -> int:
    """Rows a sliding-window layer keeps: window - 1 before the last full block's end, and all rows after it."""
    aligned = tokens // block_size * block_size
    return tokens - max(0, aligned - window + 1)
