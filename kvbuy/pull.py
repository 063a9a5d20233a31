"""Getting artifacts from the Hub: one commit, our own file names, every block checked before a name appears.

What is fetched in part lies in NAME.kv.safetensors.part, a file of the full size with holes: blocks that are there
match their digests, the others are fetched by whoever asks next. Torch-free.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from kvbuy.artifact import MAX_HEADER, SUFFIX, Artifact, read_manifest, refuse_unwritable
from kvbuy.errors import DamagedError, StoreError, UsageError
from kvbuy.hub import Address, Pinned, download, pin, read_range
from kvbuy.keys import KeyRing
from kvbuy.parts import FILE_NAME
from kvbuy.reader import Reader, check_contents
from kvbuy.sign import (
    SIGNATURE_SUFFIX,
    find_signers,
    judge_signatures,
    read_signatures,
    require_signature,
    signature_path,
)
from kvbuy.store import stored_spans
from kvbuy.whole import sync_folder, write_whole

PART = ".part"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Pulled:
    """An artifact that came, and its commit; `blocks` of it are here and match their digests."""

    path: Path
    commit: str
    blocks: int
    of_blocks: int


def find_remote(address: Address) -> tuple[Pinned, tuple[str, ...]]:
    """A repository at its commit, and the names of its artifacts: the one that is asked for, or all.

    Raises:
        StoreError: it cannot be reached, or has no such artifact.
    """
    pinned = pin(address.repo, address.revision)
    names = tuple(name for name in pinned.files if name.endswith(SUFFIX) and FILE_NAME.match(name))
    if address.name is None and names:
        return pinned, names
    wanted = (address.name or "").removesuffix(SUFFIX) + SUFFIX
    if wanted not in names:
        known = ", ".join(names) or "none"
        raise StoreError(f"{address.repo} has no artifact {address.name or ''}", hint=f"its artifacts: {known}")
    return pinned, (wanted,)


def open_remote(address: Address) -> Path:
    """An artifact in the Hub's own cache, its signatures beside it; its blocks are checked when they are loaded.

    Raises:
        StoreError: it cannot be had.
        UsageError: the repository has several, and none is named.
    """
    pinned, names = find_remote(address)
    if len(names) > 1:
        raise UsageError(f"{address.repo} has several artifacts", hint=f"hf://{address.repo}/{names[0]}")
    path = download(pinned, names[0])
    if (signatures := names[0].removesuffix(SUFFIX) + SIGNATURE_SUFFIX) in pinned.files:
        download(pinned, signatures)
    return path


def pull_artifact(pinned: Pinned, name: str, out: Path, *, force: bool = False, ring: KeyRing | None = None) -> Pulled:
    """Fetch an artifact to `out`: it has its name once every block has been checked.

    With a `ring`, somebody whom it trusts must have signed it.

    Raises:
        DamagedError: what came does not match its digests, twice.
        UntrustedError: nobody whom the ring trusts has signed it.
        PackError, UsageError: it cannot be decoded here, and so not be checked.
        ExistsError, StoreError: it cannot be fetched or written.
    """
    if not force and (there := _open_equal(pinned, name, out)) is not None:
        if ring is not None:
            require_signature(name, find_signers(there, ring))
        count = len(there.manifest.blocks)
        return Pulled(path=out, commit=pinned.commit, blocks=count, of_blocks=count)
    refuse_unwritable(out, force=force)
    if out.with_name(out.name + PART).exists():
        return _finish_part(pinned, name, out, force=force, ring=ring)
    for again in (False, True):
        source = download(pinned, name, again=again)
        try:
            _copy_checked(pinned, name, source, out, force=force, ring=ring)
        except DamagedError:
            if again:
                raise
            continue  # the Hub's cache may hold a damaged copy: the second time it is fetched anew
        break
    artifact = Artifact.open(out)
    count = len(artifact.manifest.blocks)
    return Pulled(path=out, commit=pinned.commit, blocks=count, of_blocks=count)


def pull_blocks(
    pinned: Pinned, name: str, out: Path, wanted: range, *, progress: Progress = lambda _, __, ___: None
) -> Pulled:
    """Fetch some blocks into `out`'s part file, with all that is small: state, tokens and text.

    Raises:
        DamagedError: what came does not match its digests.
        UsageError: there are no such blocks.
        StoreError: it cannot be fetched or written.
    """
    with _alone(out):
        return _pull_blocks(pinned, name, out, wanted, progress)


def _pull_blocks(pinned: Pinned, name: str, out: Path, wanted: range, progress: Progress) -> Pulled:
    part = out.with_name(out.name + PART)
    artifact = _open_part(pinned, name, part)
    count = len(artifact.manifest.blocks)
    if not wanted or wanted.stop > count:
        raise UsageError(f"{name} has blocks 0:{count}", hint=f"--blocks 0:{min(count, 16)}")
    if artifact.manifest.codec_name == "dense":
        wanted = range(wanted.stop)  # a block is decoded with those before it
    there = check_blocks(artifact, wanted)
    missing = [index for index in wanted if index not in there]
    spans = list(stored_spans(artifact.manifest))
    for done, index in enumerate(missing):
        progress(name, done, len(missing))
        _fetch(pinned, name, artifact, spans[index])
    here = check_blocks(artifact, wanted)
    if bad := sorted(set(wanted) - here):
        raise DamagedError(f"{name}: block {bad[0]} does not match its digest", hint="pull it again")
    return Pulled(path=part, commit=pinned.commit, blocks=len(here), of_blocks=count)


def check_blocks(artifact: Artifact, wanted: Sequence[int]) -> set[int]:
    """Which of some blocks of a part file are there and match their digests."""
    here: set[int] = set()
    reader = Reader.open(artifact)
    for index in wanted:
        try:
            reader.load_block(index)
        except DamagedError:
            reader = Reader.open(artifact)  # a coder that failed is of no more use
            if artifact.manifest.codec_name == "dense":
                break
            continue
        here.add(index)
    return here


def _open_equal(pinned: Pinned, name: str, out: Path) -> Artifact | None:
    """The artifact that is there already, where it is the one to be fetched and intact."""
    if not out.exists():
        return None
    try:
        there = Artifact.open(out)
        if there.manifest.header() != _read_header(pinned, name):
            return None
        check_contents(there)
    except DamagedError:
        return None
    return there


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While no other process fills or finishes the same part file."""
    lock = FileLock(out.with_name(f".{out.name}{PART}.lock"))
    try:
        with lock:
            yield
    except OSError as error:
        raise StoreError(f"cannot write beside {out}: {error.strerror}") from error


def _finish_part(pinned: Pinned, name: str, out: Path, *, force: bool, ring: KeyRing | None) -> Pulled:
    """Fetch what a part file lacks, and give it its name."""
    part = out.with_name(out.name + PART)
    with _alone(out):
        count = len(_open_part(pinned, name, part).manifest.blocks)
        done = _pull_blocks(pinned, name, out, range(count), lambda _, __, ___: None)
        artifact = Artifact.open(part)
        check_contents(artifact)
        _take_place(pinned, name, artifact, out, force=force, ring=ring)
        try:
            os.replace(part, out)
            sync_folder(out.parent)
        except OSError as error:
            raise StoreError(f"cannot write {out}: {error.strerror}") from error
    return Pulled(path=out, commit=done.commit, blocks=done.blocks, of_blocks=done.of_blocks)


def _open_part(pinned: Pinned, name: str, part: Path) -> Artifact:
    """A part file of this very artifact, made where there is none."""
    header = _read_header(pinned, name)
    if part.exists():
        with suppress(DamagedError), part.open("rb") as file:
            if file.read(len(header)) == header:
                return Artifact.open(part)
    with write_whole(part) as file:
        file.write(header)
        file.truncate(len(header) + read_manifest(header).data_bytes())
    artifact = Artifact.open(part)
    blocks = len(artifact.manifest.blocks)
    for span in list(stored_spans(artifact.manifest))[blocks:]:
        _fetch(pinned, name, artifact, span)
    artifact.read_tokens()
    artifact.read_text()
    return artifact


def _read_header(pinned: Pinned, name: str) -> bytes:
    length = int.from_bytes(read_range(pinned, name, 0, 8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise DamagedError(f"{name} is not a safetensors file: its header length makes no sense")
    return read_range(pinned, name, 0, 8 + length)


def _fetch(pinned: Pinned, name: str, artifact: Artifact, span: tuple[int, int]) -> None:
    start, size = artifact.header_bytes + span[0], span[1]
    data = read_range(pinned, name, start, size) if size else b""
    if len(data) != size:
        raise StoreError(f"{name} was cut short on its way", hint="pull it again: what came is kept")
    try:
        with artifact.path.open("r+b") as file:
            file.seek(start)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot write {artifact.path}: {error.strerror}", hint="what came is kept") from error


def _copy_checked(pinned: Pinned, name: str, source: Path, out: Path, *, force: bool, ring: KeyRing | None) -> None:
    def check() -> None:
        artifact = Artifact.open(Path(file.name))
        check_contents(artifact)
        _take_place(pinned, name, artifact, out, force=force, ring=ring)

    with write_whole(out, last_check=check) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)


def _take_place(pinned: Pinned, name: str, artifact: Artifact, out: Path, *, force: bool, ring: KeyRing | None) -> None:
    """Just before an artifact gets its name: its signatures come first, so that nobody sees it without them."""
    refuse_unwritable(out, force=force)
    signatures = name.removesuffix(SUFFIX) + SIGNATURE_SUFFIX
    raw = read_signatures(download(pinned, signatures)) if signatures in pinned.files else None
    signers = () if raw is None else judge_signatures(raw, artifact, ring or KeyRing.here())
    if ring is not None:
        require_signature(out.name, signers)
    beside = signature_path(out)
    if raw is None or not signers:
        beside.unlink(missing_ok=True)  # of what `out` was before
        return
    with write_whole(beside) as file:
        file.write(raw)


def parse_blocks(text: str | None) -> range | None:
    """Blocks such as "0:16" (UsageError: that is none)."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UsageError(f"--blocks {text} names no blocks", hint="--blocks 0:16")
    return range(int(first), int(last))
