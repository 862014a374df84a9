"""Whose turn it is: a model answers one request at a time, in the order in which they came."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from .errors import RequestError
from .request import ServedRequest


class Turns:
    """A queue for one place. Used from one event loop.

    Args:
        max_waiting: requests that may wait; a further one is refused.
        interrupt: one that comes ends the stream that is running (llama_cpp.server's ``interrupt_requests``).
    """

    def __init__(self, max_waiting: int, *, interrupt: bool = False) -> None:
        self.max_waiting = max_waiting
        self.interrupt = interrupt
        self.running: ServedRequest | None = None
        self._waiting: deque[tuple[ServedRequest, anyio.Event]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, request: ServedRequest) -> AsyncIterator[None]:
        """Wait for the turn and have it.

        Raises:
            RequestError: too many wait already, or it was cancelled.
        """
        entered = time.perf_counter()
        await self._enter(request)
        request.queue_s = time.perf_counter() - entered
        try:
            request.check()
            yield
        finally:
            self._leave()

    async def _enter(self, request: ServedRequest) -> None:
        if self.running is None:
            self.running = request
            return
        if len(self._waiting) >= self.max_waiting:
            raise RequestError(
                f"{len(self._waiting)} requests wait already (--max-queue)",
                status=503,
                code="queue_full",
                retry_after=1,
            )
        if self.interrupt and self.running.stream:
            self.running.interrupt()
        place = (request, anyio.Event())
        self._waiting.append(place)
        request.on_cancel = place[1].set
        try:
            await place[1].wait()
        except BaseException:
            if place in self._waiting:
                self._waiting.remove(place)
            elif self.running is request:
                self._leave()
            raise
        finally:
            request.on_cancel = None
        if self.running is not request:
            self._waiting.remove(place)
            request.check()

    def cancel_all(self, why: RequestError) -> None:
        """The one whose turn it is, and those that wait."""
        for request in [one for one, _ in self._waiting] + [self.running] * (self.running is not None):
            if request is not None:
                request.cancel(why)

    def _leave(self) -> None:
        self.running = None
        if self._waiting:
            self.running, event = self._waiting.popleft()
            event.set()
