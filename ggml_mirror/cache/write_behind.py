"""A thread that writes what it is given, in order, while the giver goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger("ggml_mirror.cache.prefix_cache")


class WriteBehind(Generic[T]):
    """Calls ``write`` for each item, one at a time. The items are told apart by identity.

    The thread is a daemon: an interpreter that ends without :meth:`close` loses what waits, and is not held up by it.
    """

    def __init__(self, write: Callable[[T], None]) -> None:
        self._write = write
        self._waiting: deque[T] = deque()  # the first one is being written
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, item: T) -> None:
        with self._changed:
            if self._ended:
                raise RuntimeError("this writer is closed")
            self._waiting.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ggml-mirror-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, item: T, timeout: float) -> bool:
        """Wait until an item is written, or was never given; False: it still waits."""
        with self._changed:
            return self._changed.wait_for(lambda: all(item is not other for other in self._waiting), timeout)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written; False: something still waits."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Write what waits, then end. False: something was still waiting; it is not written."""
        deadline = None if timeout is None else time.monotonic() + timeout
        written = self.flush(timeout)
        with self._changed:
            self._ended = True
            while len(self._waiting) > 1:
                self._waiting.pop()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return written

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                item = self._waiting[0]
            try:
                self._write(item)
            except Exception:
                log.exception("a cached sequence was not written")
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
            del item  # it may be large, and the next one may be long in coming
