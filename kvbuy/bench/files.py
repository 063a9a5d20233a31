"""Reading files at their limit: in the page cache, and out of it."""

import os
from pathlib import Path

PAGE = 4096


def read_into(path: Path, buffer: memoryview) -> None:
    """Read a file's first bytes into a buffer of theirs, unbuffered, as fast as the system gives them."""
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(buffer) and (read := file.readinto(buffer[done:])):
            done += read


def drop_from_page_cache(path: Path) -> bool:
    """Make the system forget a file's contents; whether it did (no privilege needed, not every file system can)."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(handle).st_size
        return not any(_is_cached(handle, size * part // 8) for part in range(8))
    finally:
        os.close(handle)


def _is_cached(handle: int, offset: int) -> bool:
    """Whether a page can be read without waiting for the disk."""
    try:
        return os.preadv(handle, [bytearray(PAGE)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # the file system cannot say
        return True
