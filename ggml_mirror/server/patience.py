"""How long clients are waited for: for a request to arrive, and for an answer to be taken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

#: Seconds that clients have once the server shuts down.
LAST_SECONDS = 10.0


class Patience:
    """A limit on every wait for a client, which can be shortened while they wait. Used from one event loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._waits: set[anyio.CancelScope] = set()

    @contextmanager
    def wait(self) -> Iterator[anyio.CancelScope]:
        """The body is cancelled when the time is up; ``cancelled_caught`` of the scope then tells."""
        with anyio.move_on_after(self.seconds) as scope:
            self._waits.add(scope)
            try:
                yield scope
            finally:
                self._waits.discard(scope)

    def shorten(self, seconds: float = LAST_SECONDS) -> None:
        """From now on no wait takes longer, those that have begun included."""
        self.seconds = min(self.seconds, seconds)
        latest = asyncio.get_running_loop().time() + seconds
        for scope in self._waits:
            scope.deadline = min(scope.deadline, latest)
