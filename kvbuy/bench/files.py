"""Reading files at their limit: in the page cache, and out of it."""

import os
from pathlib import Path

from kvbuy.parallel import in_order

PAGE = 4096
PIECE = 8 * 2**20


def read_into(path: Path, buffer: memoryview) -> None:
    """Read a file's first bytes into a buffer of theirs, on as many threads as a load has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        for _ in in_order(lambda start: _read_piece(handle, buffer, start), range(0, len(buffer), PIECE)):
            pass
    finally:
        os.close(handle)


def _read_piece(handle: int, buffer: memoryview, start: int) -> None:
    end = min(start + PIECE, len(buffer))
    while start < end and (read := os.preadv(handle, [buffer[start:end]], start)):
        start += read


def drop_from_page_cache(path: Path) -> bool:
    """Make the system forget a file's contents; whether it did (no privilege needed, not every file system can)."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(handle).st_size
        return not any(is_cached(handle, size * part // 8) for part in range(8))
    finally:
        os.close(handle)


def is_cached(handle: int, offset: int) -> bool:
    """Whether a page can be read without waiting for the disk."""
    try:
        return os.preadv(handle, [bytearray(PAGE)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # the file system cannot say
        return True
