"""Reading files at their limit: in the page cache, and out of it."""

import ctypes
import os
import sys
from mmap import MAP_PRIVATE, PAGESIZE, PROT_READ, PROT_WRITE, mmap
from pathlib import Path

from kvbuy.parallel import in_order

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
    if sys.platform != "linux":
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    try:
        return count_cached(path) == 0
    except OSError:  # the file system cannot say
        return False


def count_cached(path: Path) -> int:
    """How many pages of a file (not an empty one) are in the page cache, by mincore(2): looking reads none of them.

    Raises:
        OSError: the system cannot say.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, flags=MAP_PRIVATE, prot=PROT_READ | PROT_WRITE) as mapped:
        cached = (ctypes.c_ubyte * -(-len(mapped) // PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), cached)
        del start  # it holds the mapping
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sum(page & 1 for page in cached)
