"""Work on threads, results in order. For work that lets go of the GIL: reading, hashing, coding."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results of `work` on each item, in the items' order, a thread a core.

    Items are begun in order, and taken from `items` one ahead of the threads at most: a generator of large things
    stays cheap. The first failure ends it; what has not begun by then never does.
    """
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # From the last on, up to one that has begun: what it may wait for, an item before it, is not taken away.
            for future in reversed(waiting):
                if not future.cancel():
                    break
