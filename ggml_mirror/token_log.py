"""Which tokens a mirror's rows are of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: A token that nobody has told: it equals none.
UNKNOWN = -1


class TokenLog:
    """Token ids by position, from 0 on."""

    def __init__(self, tokens: npt.NDArray[np.int32]) -> None:
        self._ids = np.array(tokens, np.int32)
        self._count = len(tokens)

    def put(self, start: int, tokens: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """The sequence goes on with ``tokens`` from position ``start``; what was known from there on is forgotten."""
        end = start + len(tokens)
        if end > len(self._ids):
            grown = np.empty(max(end, 2 * len(self._ids)), np.int32)
            grown[: self._count] = self._ids[: self._count]
            self._ids = grown
        self._ids[self._count : start] = UNKNOWN
        self._ids[start:end] = tokens
        self._count = end

    def first_difference(self, tokens: npt.NDArray[np.int32]) -> int:
        """The first position at which ``tokens`` are other ones, or not known; their number if there is none."""
        n = min(self._count, len(tokens))
        same = self._ids[:n] == tokens[:n]
        return n if same.all() else int(same.argmin())
