"""Where things live on this machine: artifacts in folders, kvbuy's own cache. Knows names and times, not contents."""

import os
from pathlib import Path
from typing import get_args

from kvbuy.artifact import SUFFIX
from kvbuy.errors import PackError, StoreError, UsageError
from kvbuy.hub import ADDRESS, parse_address
from kvbuy.parts import Codec, CodecName, DenseCodec

PACK_SUFFIX = ".pack.safetensors"


def cache_folder() -> Path:
    """kvbuy's cache: `KVBUY_CACHE`, or `kvbuy` in the user's cache folder."""
    if folder := os.environ.get("KVBUY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvbuy"


def pack_folder() -> Path:
    """Where packs live."""
    return cache_folder() / "packs"


def pack_path(digest: str) -> Path:
    """Where the pack of a digest is, if it is here."""
    return pack_folder() / f"{digest}{PACK_SUFFIX}"


def refuse_missing_pack(codec: Codec) -> None:
    """Raise PackError where an artifact of this codec cannot be decoded because its pack is not here."""
    if isinstance(codec, DenseCodec) and not pack_path(codec.pack).is_file():
        raise PackError(
            f"the artifact is decoded with the pack {codec.pack}, which is not here",
            hint=f"whoever published it has it: kvbuy pack pull USER/NAME --pack {codec.pack[:12]}, "
            "or kvbuy pack add FILE",
        )


def find_artifact(name: str | Path | None, *, folder: Path | None = None) -> Path:
    """The artifact that `name` means: the file itself, one on the Hub, or the newest in the folder where none is named.

    Raises:
        StoreError: none is named, and the folder holds none; or the Hub does not give it.
        UsageError: the address on the Hub names none, or several.
    """
    if isinstance(name, str) and name.startswith(ADDRESS):
        from kvbuy.pull import open_remote

        return open_remote(parse_address(name))
    if name is not None and not os.path.isdir(name):  # unlike Path.is_dir, it takes any name for an answer
        return Path(name)
    where = Path(name) if name else folder or Path()
    found = [path for path in where.glob(f"*{SUFFIX}") if path.is_file()]
    if not found:
        raise StoreError(f"there is no artifact in {where.resolve()}", hint="make one: kvbuy precompute doc.txt")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def name_artifacts(documents: list[str], out: Path | None) -> list[Path]:
    """Where the artifacts of documents go: beside each other in `out` or here, or one to the file `out`.

    Raises:
        UsageError: two documents would get the same name, or many documents one file.
    """
    if out is not None and out.name.endswith(SUFFIX):
        if len(documents) > 1:
            raise UsageError(f"{len(documents)} documents cannot all become {out}", hint="give --out a folder")
        return [out]
    if out is not None and not out.is_dir() and (out.suffix or out.exists()):
        raise UsageError(f"--out {out} is neither a folder nor a name ending in {SUFFIX}", hint=f"--out NAME{SUFFIX}")
    paths = [(out or Path()) / f"{_label(document)}{SUFFIX}" for document in documents]
    for at, path in enumerate(paths):
        if path in paths[:at]:
            first = documents[paths.index(path)]
            raise UsageError(f"{first} and {documents[at]} would both become {path}", hint="precompute them apart")
    return paths


def refuse_name(out: Path) -> None:
    """Raise UsageError where a name is not an artifact's: one that does not end in the suffix is not found again."""
    if not out.name.endswith(SUFFIX):
        raise UsageError(f"--out {out} does not end in {SUFFIX}", hint=f"--out {out.name}{SUFFIX}")


def name_converted(path: Path, codec: CodecName) -> Path:
    """Where an artifact converted to a codec goes: beside it, NAME.CODEC; NAME is without an earlier codec's."""
    name = path.name.removesuffix(SUFFIX)
    for earlier in get_args(CodecName):
        name = name.removesuffix(f".{earlier}") or name
    return path.with_name(f"{name}.{codec}{SUFFIX}")


def make_folder(folder: Path) -> None:
    """Make a folder where there is none (StoreError)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}", hint="give --out another one") from error


def _label(document: str) -> str:
    return "stdin" if document == "-" else Path(document).stem or Path(document).name
