"""An artifact as a file on disk: written whole or not at all, read strictly, every byte under a digest.

It moves bytes between a file and buffers that the caller owns. It does not know what a cache or a model is.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self

from blake3 import blake3

from kvbuy.errors import DamagedError, ExistsError, StoreError
from kvbuy.manifest import Manifest, StateTensor, Tensor, parse_manifest
from kvbuy.whole import write_whole

SUFFIX = ".kv.safetensors"
MAX_HEADER = 100_000_000  # what safetensors itself accepts
MIN_ENTRY = 60  # bytes that a tensor takes in a header at least
HEADER_START = b'{"__metadata__":{"format":"pt","kvbuy":'
BATCH = 8  # views a system call: about a megabyte, which stays in a core's cache until it is hashed

Buffer = bytes | bytearray | memoryview


def content_digest(buffers: Iterable[Buffer]) -> str:
    """The hex BLAKE3-256 of the buffers' bytes, in order."""
    hasher = blake3()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact: its manifest has been parsed, its contents not yet read."""

    path: Path
    manifest: Manifest
    id: str
    header_bytes: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the header.

        Raises:
            StoreError: there is no such file, or it cannot be read.
            DamagedError: it is no artifact, or breaks the format law.
        """
        try:
            return cls._open(path)
        except DamagedError as error:
            error.message = f"{path.name}: {error.message}"
            error.hint = error.hint or "fetch it again, or make it: kvbuy precompute DOCUMENT"
            raise

    @classmethod
    def _open(cls, path: Path) -> Self:
        try:
            with path.open("rb") as file:
                header = _read_header(file)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise StoreError(f"there is no artifact {path}", hint="make one: kvbuy precompute doc.txt") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        manifest = read_manifest(header)
        too_few = len(header) < manifest.count_tensors() * MIN_ENTRY  # looked at before a long header is built
        if too_few or manifest.header() != header:
            raise DamagedError("the file's header is not the one its manifest implies")
        if size != len(header) + manifest.data_bytes():
            wanted = len(header) + manifest.data_bytes()
            raise DamagedError(f"it has {size} bytes, its manifest implies {wanted}")
        return cls(path=path, manifest=manifest, id=manifest.sha256(), header_bytes=len(header))

    def read_block(self, index: int, views: Sequence[memoryview]) -> None:
        """Read one block of a raw artifact into `views`, which together have its size, and check its digest.

        Raises:
            DamagedError: the bytes do not match the digest.
        """
        start, _ = self.manifest.block_span(index)
        self._read_checked(f"block {index}", start, views, digest=self.manifest.blocks[index].digest)

    def read_state(self, stored: StateTensor, tensor: Tensor, view: memoryview) -> None:
        """Read one of a raw `manifest.state`, lying at its one of `manifest.state_tensors()`, and check its digest.

        Raises:
            DamagedError: the bytes do not match the digest.
        """
        self._read_checked(tensor.name, tensor.start, [view], digest=stored.digest)

    def read_piece(self, piece: Tensor) -> memoryview:
        """Read one of a coded `manifest.pieces()`: encoded bytes, which have no digest of their own."""
        raw = memoryview(bytearray(piece.size))
        self._read(piece.start, [raw], seen=lambda _: None)
        return raw

    def read_tokens(self) -> tuple[int, ...]:
        """The document's token ids, digest checked (DamagedError)."""
        raw = self.read_side("tokens")
        return struct.unpack(f"<{len(raw) // 4}i", raw)

    def read_text(self) -> str:
        """The text that was tokenised, digest checked (DamagedError)."""
        try:
            return self.read_side("text").decode()
        except UnicodeDecodeError:
            raise DamagedError(f"{self.path.name}: the stored text is not UTF-8") from None

    def read_side(self, name: Literal["tokens", "text"]) -> bytes:
        """The bytes of the document's token ids (little-endian int32) or text, digest checked (DamagedError)."""
        document, (tokens, text) = self.manifest.document, self.manifest.side_tensors()
        tensor, digest = (tokens, document.tokens_digest) if name == "tokens" else (text, document.text_digest)
        raw = bytearray(tensor.size)
        self._read_checked(tensor.name, tensor.start, [memoryview(raw)], digest=digest)
        return bytes(raw)

    def _read_checked(self, what: str, start: int, views: Sequence[memoryview], *, digest: str) -> None:
        hasher = blake3()
        self._read(start, views, seen=hasher.update)
        if hasher.hexdigest() != digest:
            raise DamagedError(f"{self.path.name}: {what} does not match its digest", hint="fetch it again")

    def _read(self, start: int, views: Sequence[memoryview], *, seen: Callable[[memoryview], object]) -> None:
        """Fill the views from `start` on, and show each to `seen` while its bytes are still in the core's cache."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.header_bytes + start)
                for at in range(0, len(views), BATCH):
                    batch = views[at : at + BATCH]
                    _fill(file, batch)
                    for view in batch:
                        seen(view)
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error.strerror}") from error


def write_artifact(path: Path, manifest: Manifest, buffers: Iterable[Buffer], *, force: bool = False) -> Artifact:
    """Write an artifact: to a temporary name, synced, then renamed. `buffers` are the data section, in file order.

    Raises:
        ExistsError: the file is there and `force` is not set.
        StoreError: the file cannot be written (no space, no permission); nothing is left behind.
    """
    refuse_unwritable(path, force=force)
    header = manifest.header()
    written = 0
    with write_whole(path, last_check=lambda: refuse_unwritable(path, force=force)) as file:
        file.write(header)
        for buffer in buffers:
            written += file.write(buffer)
        if written != manifest.data_bytes():
            raise AssertionError(f"{written} bytes written, the manifest implies {manifest.data_bytes()}")
    return Artifact(path=path, manifest=manifest, id=manifest.sha256(), header_bytes=len(header))


def refuse_unwritable(path: Path, *, force: bool) -> None:
    """Say now rather than after a long prefill that `path` cannot be written.

    Raises:
        ExistsError: it is there, and `force` is not set.
        StoreError: its folder is missing or read-only.
    """
    if not path.parent.is_dir():
        raise StoreError(f"there is no folder {path.parent}", hint=f"make it: mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise StoreError(f"the folder {path.parent} cannot be written", hint="give --out another one")
    if path.is_dir():
        raise StoreError(f"{path} is a folder", hint="give --out another name")
    if path.exists() and not force:
        raise ExistsError(f"{path} is there already", hint="give --force to replace it, or --out for another name")


def _read_header(file: BinaryIO) -> bytes:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= MAX_HEADER:
        raise DamagedError("this is not a safetensors file: its header length makes no sense")
    if 8 + length > os.fstat(file.fileno()).st_size:  # before that much memory is taken
        raise DamagedError("the file is cut off inside its header", hint="fetch it again")
    return prefix + file.read(length)


def read_manifest(header: bytes) -> Manifest:
    """The manifest of a file's header, by the format law (DamagedError); the rest of the header is not looked at."""
    return parse_manifest(_manifest_bytes(header))


def _manifest_bytes(header: bytes) -> bytes:
    """The manifest inside a header, found without trusting anything else in it."""
    if header.startswith(HEADER_START, 8):  # the law fixes how a header begins: nothing else of it is parsed
        try:
            manifest, _ = json.JSONDecoder().raw_decode(header[8 + len(HEADER_START) :].decode())
            if isinstance(manifest, str):
                return manifest.encode()
        except (ValueError, RecursionError):
            pass  # refused below, as whatever else is no manifest
    raise DamagedError("this safetensors file is no kvbuy artifact: it holds no manifest")


def _fill(file: BinaryIO, views: Sequence[memoryview]) -> None:
    """Fill the views from the file's position on: in one system call where there is one, else view by view."""
    if hasattr(os, "readv"):
        count = os.readv(file.fileno(), views)
        if count == sum(map(len, views)):
            return
        file.seek(-count, os.SEEK_CUR)
    for view in views:
        while len(view) > 0:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise DamagedError("the file ended early: it changed while it was read", hint="fetch it again")
            view = view[count:]
