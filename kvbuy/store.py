"""A folder of artifacts in which equal pieces are kept once and a crash loses nothing.

`objects/DIGEST` holds a piece's bytes under their BLAKE3-256: a header, a block as stored, a state tensor, tokens,
text. Equal prefixes of different documents have equal blocks, and so one object. `entries/ID.json` says which pieces
make an artifact; it is written last and removed first, so that an entry's objects are always there. Objects never
change. Many processes may put, get and check at once; collecting garbage waits until none does.
"""

import os
import random
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from blake3 import blake3
from filelock import ReadWriteLock, Timeout
from pydantic import ValidationError

from kvbuy.artifact import SUFFIX, Artifact, refuse_unwritable
from kvbuy.errors import DamagedError, ExistsError, StoreError, UsageError
from kvbuy.manifest import Manifest
from kvbuy.parts import Count, Digest, FileName, Part
from kvbuy.places import cache_folder
from kvbuy.reader import check_contents
from kvbuy.sign import read_signatures, signature_path
from kvbuy.whole import TEMPORARY, sync_folder, write_whole

CHUNK = 2**20
PATIENCE = 600.0  # seconds to wait for another process


class Piece(Part):
    """Some bytes of an artifact's file, and their digest."""

    digest: Digest
    size: Count


class Entry(Part):
    """An artifact of the store: its file is its pieces one after the other. `digest` is over the rest of the entry."""

    format: Literal["kvbuy entry"] = "kvbuy entry"
    version: Literal[1] = 1
    id: Digest
    name: FileName
    pieces: tuple[Piece, ...]
    signatures: Piece | None
    digest: Digest

    @property
    def bytes(self) -> int:
        """What the artifact's file has."""
        return sum(piece.size for piece in self.pieces)

    def needed(self) -> tuple[Piece, ...]:
        """Every object that the entry needs."""
        return self.pieces if self.signatures is None else (*self.pieces, self.signatures)


@dataclass(frozen=True, slots=True)
class Freed:
    """What collecting garbage removed: objects that no entry needs, and what crashed writers left."""

    objects: int
    temporaries: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found. `damaged` and `missing` name objects, `unreadable` entries; `read` of `objects` were read."""

    entries: int
    objects: int
    read: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    unreadable: tuple[str, ...]
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with what was looked at."""
        return not (self.damaged or self.missing or self.unreadable)


class Store:
    """A content-addressed folder of artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects, self.entries_folder = folder / "objects", folder / "entries"

    @classmethod
    def here(cls) -> Self:
        """`KVBUY_STORE`, or `store` in kvbuy's cache."""
        folder = os.environ.get("KVBUY_STORE")
        return cls(Path(folder).expanduser() if folder else cache_folder() / "store")

    def put(self, artifact: Artifact) -> Entry:
        """Keep an artifact, with the signatures beside it, or those that it was kept with. What is damaged is mended.

        Raises:
            DamagedError: it is not intact.
            PackError, UsageError: it cannot be decoded here, and so not be checked.
            StoreError: the store cannot be written; what was kept before is as it was.
        """
        artifact = Artifact.open(artifact.path)  # it may have changed since
        check_contents(artifact)
        with self._sharing():
            pieces = tuple(self._keep(_read_span(artifact.path, start, size)) for start, size in _spans(artifact))
            signatures = signature_path(artifact.path)
            signed = (
                self._keep([read_signatures(signatures)]) if signatures.exists() else self._signatures_of(artifact.id)
            )
            entry = _sealed(id=artifact.id, name=artifact.path.name, pieces=pieces, signatures=signed)
            with write_whole(self._entry_path(entry.id)) as file:
                file.write(entry.canonical())
        return entry

    def get(self, entry: Entry, out: Path, *, force: bool = False) -> Artifact:
        """Write an artifact as a file again, its signatures beside it, every byte checked.

        Raises:
            DamagedError: an object is missing or damaged; nothing is written.
            ExistsError, StoreError: `out` cannot be written.
        """
        refuse_unwritable(out, force=force)
        beside = signature_path(out)
        with self._sharing():
            if entry.signatures is not None:
                if beside.exists() and not force:
                    raise ExistsError(f"{beside} is there already", hint="give --force to replace it")
                signed = b"".join(self._load(entry.signatures))
            with write_whole(out, last_check=lambda: refuse_unwritable(out, force=force)) as file:
                for piece in entry.pieces:
                    for chunk in self._load(piece):
                        file.write(chunk)
                file.flush()
                made = Artifact.open(Path(file.name))
                if made.id != entry.id:
                    raise DamagedError(f"the store's pieces of {entry.name} make another artifact")
                check_contents(made)
                if entry.signatures is None:
                    beside.unlink(missing_ok=True)  # of what `out` was before
            if entry.signatures is not None:
                with write_whole(beside) as file:
                    file.write(signed)
        return Artifact.open(out)

    def entries(self) -> tuple[Entry, ...]:
        """All that is kept and can be read, by name; `check` names what cannot."""
        return self._read_entries()[0]

    def find(self, name: str) -> Entry:
        """The entry of this name, or whose id begins so.

        Raises:
            UsageError: there is none, or more than one.
        """
        found = [entry for entry in self.entries() if entry.id.startswith(name) or _same_name(entry.name, name)]
        if len(found) != 1:
            raise UsageError(
                f"{len(found)} artifacts of the store are called {name!r}", hint="kvbuy store ls shows ids"
            )
        return found[0]

    def find_id(self, name: str) -> str:
        """The id of the entry of this name, or that begins so, be it readable or not (errors: `find`)."""
        damaged = [one for one in self._read_entries()[1] if name and one.startswith(name)]
        return damaged[0] if len(damaged) == 1 else self.find(name).id

    def remove(self, artifact_id: str) -> None:
        """Keep an artifact no more, be its entry readable or not; its objects stay until `collect` (StoreError)."""
        with self._writing():
            self._entry_path(artifact_id).unlink(missing_ok=True)
            sync_folder(self.entries_folder)

    def collect(self) -> Freed:
        """Remove the objects that no entry needs, and what crashed writers left.

        Raises:
            DamagedError: an entry is not readable: what it needs cannot be known, so nothing is removed.
            StoreError: another process uses the store for longer than it is patient, or it cannot be written.
        """
        with self._alone():
            sync_folder(self.entries_folder)  # no removed entry may come back once its objects are gone
            entries, unreadable = self._read_entries()
            if unreadable:
                hint = f"put its artifact in again, or give it up: kvbuy store rm {unreadable[0][:12]}"
                raise DamagedError(f"the store's entry {unreadable[0][:12]} cannot be read", hint=hint)
            needed = {piece.digest for entry in entries for piece in entry.needed()}
            stray = [path for path in self._object_files() if path.name not in needed]
            folders = (self.objects, self.entries_folder)
            temporaries = [path for folder in folders for path in folder.glob(f"{TEMPORARY}*")]
            freed = sum(path.stat().st_size for path in (*stray, *temporaries))
            for path in (*stray, *temporaries):
                path.unlink()
        return Freed(objects=len(stray), temporaries=len(temporaries), bytes=freed)

    def check(self, *, sample: float = 1.0, max_seconds: float | None = None, seed: int = 0) -> Checked:
        """Look whether everything that entries need is there, and read a random sample of it."""
        started = time.monotonic()
        with self._sharing():
            readable, unreadable = self._read_entries()
            needed = {piece.digest: piece for entry in readable for piece in entry.needed()}
            missing = sorted(digest for digest in needed if not (self.objects / digest).is_file())
            here = sorted(set(needed) - set(missing))
            chosen = random.Random(seed).sample(here, k=-int(-sample * len(here) // 1))
            read, damaged = 0, []
            for digest in chosen:
                if max_seconds is not None and time.monotonic() - started > max_seconds:
                    break
                read += 1
                if not self._is_whole(needed[digest]):
                    damaged.append(digest)
        return Checked(
            entries=len(readable) + len(unreadable),
            objects=len(needed),
            read=read,
            damaged=tuple(damaged),
            missing=tuple(missing),
            unreadable=unreadable,
            seconds=time.monotonic() - started,
        )

    def _read_entries(self) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
        """The entries that can be read, by name, and the ids of those that cannot; one removed meanwhile is neither."""
        readable, unreadable = [], []
        for path in sorted(self.entries_folder.glob("*.json")):
            try:
                readable.append(_read_entry(path))
            except FileNotFoundError:
                continue
            except DamagedError:
                unreadable.append(path.stem)
        return tuple(sorted(readable, key=lambda entry: (entry.name, entry.id))), tuple(unreadable)

    def _signatures_of(self, artifact_id: str) -> Piece | None:
        found = [entry for entry in self.entries() if entry.id == artifact_id]
        return found[0].signatures if found else None

    def _keep(self, chunks: Iterable[bytes]) -> Piece:
        """Write an object, unless it is there and whole: a damaged one is replaced."""
        held = b"".join(chunks)
        piece = Piece(digest=blake3(held).hexdigest(), size=len(held))
        if not self._is_whole(piece):
            with write_whole(self.objects / piece.digest) as file:
                file.write(held)
        return piece

    def _is_whole(self, piece: Piece) -> bool:
        try:
            for _ in self._load(piece):
                pass
        except DamagedError:
            return False
        return True

    def _load(self, piece: Piece) -> Iterator[bytes]:
        """An object's bytes in chunks, which may be used only once the last has come: then the digest matched."""
        hasher, size = blake3(), 0
        try:
            with (self.objects / piece.digest).open("rb") as file:
                while chunk := file.read(CHUNK):
                    hasher.update(chunk)
                    size += len(chunk)
                    yield chunk
        except OSError as error:
            raise DamagedError(f"the store's object {piece.digest[:12]} cannot be read: {error.strerror}") from error
        if (hasher.hexdigest(), size) != (piece.digest, piece.size):
            raise DamagedError(f"the store's object {piece.digest[:12]} is damaged", hint="put its artifact in again")

    def _entry_path(self, artifact_id: str) -> Path:
        return self.entries_folder / f"{artifact_id}.json"

    def _object_files(self) -> list[Path]:
        return [path for path in self.objects.glob("*") if not path.name.startswith(TEMPORARY)]

    @cached_property
    def _lock(self) -> ReadWriteLock:
        for folder in (self.objects, self.entries_folder):
            folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder)
        return ReadWriteLock(self.folder / "lock", timeout=PATIENCE)

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        """While others may put, get and check, but not collect."""
        with self._writing(), self._lock.read_lock():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While nobody else uses the store."""
        with self._writing(), self._lock.write_lock():
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what is wrong with the store's folder in our words."""
        try:
            yield
        except Timeout as error:
            raise StoreError(f"the store {self.folder} is in use by another process", hint="try again") from error
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the store {self.folder} cannot be used: {error}", hint="set KVBUY_STORE") from error


def _spans(artifact: Artifact) -> Iterator[tuple[int, int]]:
    """Start and size of an artifact's pieces in its file: header, blocks, state, tokens, text."""
    yield 0, artifact.header_bytes
    for start, size in stored_spans(artifact.manifest):
        yield artifact.header_bytes + start, size


def stored_spans(manifest: Manifest) -> Iterator[tuple[int, int]]:
    """Start and size of what lies behind the header: every block, every state tensor, tokens, text."""
    if manifest.codec == "raw":
        for index in range(len(manifest.blocks)):
            start, end = manifest.block_span(index)
            yield start, end - start
        yield from ((tensor.start, tensor.size) for tensor in manifest.state_tensors())
    yield from ((tensor.start, tensor.size) for tensor in (*manifest.pieces(), *manifest.side_tensors()))


def _read_span(path: Path, start: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while size > 0:
            chunk = file.read(min(CHUNK, size))
            if not chunk:
                raise DamagedError(f"{path.name} ended early: it changed while it was read")
            size -= len(chunk)
            yield chunk


def _sealed(**facts: Any) -> Entry:
    """An entry with its digest."""
    unsealed = Entry(**facts, digest="0" * 64)
    return unsealed.model_copy(update={"digest": unsealed.sha256()})


def _read_entry(path: Path) -> Entry:
    try:
        raw = path.read_bytes()
        entry = Entry.model_validate_json(raw)
    except FileNotFoundError:
        raise
    except (OSError, ValidationError) as error:
        raise DamagedError(f"the store's entry {path.stem[:12]} cannot be read", hint="kvbuy store check") from error
    honest = entry.model_copy(update={"digest": "0" * 64}).sha256() == entry.digest
    if not honest or entry.id != path.stem or entry.canonical() != raw:
        raise DamagedError(f"the store's entry {path.stem[:12]} is damaged", hint="kvbuy store check")
    return entry


def parse_share(text: str) -> float:
    """A share such as "5%" or "0.05" (UsageError: it is none)."""
    number = text.removesuffix("%")
    try:
        share = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--sample {text} is no share", hint="--sample 5%")
    return share


def _same_name(name: str, wanted: str) -> bool:
    return wanted in (name, name.removesuffix(SUFFIX))
