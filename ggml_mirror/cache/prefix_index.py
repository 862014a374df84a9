"""Token sequences in lexicographic order: what shares most with a prompt stands next to where the prompt would stand."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

_BYTES = 4  # of a token in a key


def token_key(tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> bytes:
    """Token ids as bytes that sort as the ids do: four each, the highest first."""
    return np.asarray(tokens, np.int32).astype(">u4").tobytes()


def key_tokens(key: bytes) -> npt.NDArray[np.int32]:
    """The ids of a key, int32 ``[n]``."""
    return np.frombuffer(key, ">u4").astype(np.int32)


def key_length(key: bytes) -> int:
    """Tokens in a key."""
    return len(key) // _BYTES


def shared_length(a: bytes, b: bytes) -> int:
    """Tokens that two keys share at their beginning."""
    n = min(len(a), len(b)) // _BYTES
    differ = np.frombuffer(a, np.uint32, n) != np.frombuffer(b, np.uint32, n)
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


class PrefixIndex(Generic[T]):
    """Values by token key, found by shared prefix: a binary search and a walk outwards from there.

    Example:
        >>> index = PrefixIndex[str]()
        >>> index.add(token_key([1, 2, 3]), "a")
        >>> index.add(token_key([1, 5]), "b")
        >>> list(index.nearest(token_key([1, 2, 9])))
        [(2, 'a'), (1, 'b')]
    """

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._values: dict[bytes, T] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def get(self, key: bytes) -> T | None:
        return self._values.get(key)

    def values(self) -> list[T]:
        return list(self._values.values())

    def add(self, key: bytes, value: T) -> None:
        """Add a value, or replace that of the same tokens."""
        if key not in self._values:
            bisect.insort(self._keys, key)
        self._values[key] = value

    def remove(self, key: bytes) -> None:
        if self._values.pop(key, None) is not None:
            del self._keys[bisect.bisect_left(self._keys, key)]

    def nearest(self, key: bytes) -> Iterator[tuple[int, T]]:
        """(tokens shared, value) of all that share any, those that share most first. The index must not change meanwhile."""
        right = bisect.bisect_left(self._keys, key)
        left = right - 1
        shared_left, shared_right = self._shared(left, key), self._shared(right, key)
        while shared_left or shared_right:
            # The longer of two sequences that share as much stands right of the shorter: the left neighbour is the cheaper one.
            if shared_left >= shared_right:
                yield shared_left, self._values[self._keys[left]]
                left -= 1
                shared_left = self._shared(left, key)
            else:
                yield shared_right, self._values[self._keys[right]]
                right += 1
                shared_right = self._shared(right, key)

    def prefixes(self, key: bytes) -> list[T]:
        """Values whose tokens are the beginning of ``key``, but not all of it."""
        found = []
        # A sequence sorts behind each of its beginnings.
        at = bisect.bisect_left(self._keys, key) - 1
        while shared := self._shared(at, key):
            if shared == key_length(self._keys[at]):
                found.append(self._values[self._keys[at]])
            at -= 1
        return found

    def _shared(self, at: int, key: bytes) -> int:
        return shared_length(self._keys[at], key) if 0 <= at < len(self._keys) else 0
