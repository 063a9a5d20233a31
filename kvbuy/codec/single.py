"""numpy's matrix products on one thread: blocks are coded in parallel already, and threads that wait burn a core."""

import threading
from typing import Any, Self

from threadpoolctl import ThreadpoolController


class SingleThreaded:
    """A context, entered by any number of threads, in which BLAS has one thread; the last to leave gives it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limits: Any = None

    def __enter__(self) -> Self:
        with self._lock:
            if not self._inside:
                self._limits = ThreadpoolController().limit(limits=1, user_api="blas")
            self._inside += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


single_threaded = SingleThreaded()
