"""Files that are written whole or not at all: to a temporary name, synced, then renamed."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvbuy.errors import StoreError

TEMPORARY = ".kvbuy-"  # how a file's name begins that is not whole yet


@contextmanager
def write_whole(path: Path, *, last_check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends, and is gone where the block fails.

    `last_check` may still refuse, by raising, just before the renaming.

    Raises:
        StoreError: the file cannot be written (no space, no permission); nothing is left behind.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        last_check()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that a folder's names are on the disk, where the system can (OSError)."""
    if os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
