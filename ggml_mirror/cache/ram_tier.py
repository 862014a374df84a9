"""The memory tier of a prefix cache: entries under a budget of bytes.

When there is no room, entries that a longer one supersedes go first, then those used longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from ..prompt_grid import PromptGrid
from .counters import CacheCounters
from .entry import Entry
from .prefix_index import PrefixIndex


class RamTier:
    """Entries in memory.

    Args:
        capacity_bytes: what they may take together, at any time.
        written: waits up to some seconds until an entry may be given up: False, it may not yet.
    """

    def __init__(
        self,
        capacity_bytes: int,
        grid: PromptGrid,
        counters: CacheCounters,
        written: Callable[[Entry, float], bool] = lambda entry, wait_s: True,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._grid, self._counters, self._written = grid, counters, written
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # the one used longest ago first
        self._index: PrefixIndex[Entry] = PrefixIndex()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def nearest(self, key: bytes) -> Iterator[tuple[int, Entry]]:
        """As :meth:`PrefixIndex.nearest`."""
        return self._index.nearest(key)

    def use(self, key: bytes) -> bool:
        """An entry was used: it goes last. False: there is none."""
        if key not in self._entries:
            return False
        self._entries.move_to_end(key)
        return True

    def add(self, entry: Entry, wait_s: float = 0.0) -> bool:
        """Take an entry, at the expense of others; False: it does not fit, and nothing was changed.

        An entry that still has to be written is not given up: the giver waits for it instead, up to ``wait_s`` seconds. So what waits is
        within the budget, too.
        """
        if entry.nbytes > self.capacity_bytes:
            if self.capacity_bytes:
                self._counters.not_stored["ram_too_large"] += 1
            return False
        same = self._entries.get(entry.key)
        victims = self._to_go(entry, same)
        if not all(self._written(old, wait_s) for old in victims):
            self._counters.not_stored["disk_slow"] += 1
            return False
        for old in victims:
            self.remove(old.key)
            self._counters.evictions["ram"] += old is not same
        for old in self._superseded(entry):
            self._entries.move_to_end(old.key, last=False)
        self._entries[entry.key] = entry
        self._index.add(entry.key, entry)
        self.nbytes += entry.nbytes
        return True

    def _to_go(self, entry: Entry, same: Entry | None) -> list[Entry]:
        """What has to be removed for a new entry, that of the same tokens (``same``) in any case."""
        victims = [] if same is None else [same]
        free = self.capacity_bytes - self.nbytes + sum(old.nbytes for old in victims)
        for old in [*self._superseded(entry), *self._entries.values()]:
            if free >= entry.nbytes:
                break
            if not any(old is victim for victim in victims):
                victims.append(old)
                free += old.nbytes
        return victims

    def _superseded(self, entry: Entry) -> list[Entry]:
        found = self._index.prefixes(entry.key)
        return [old for old in found if entry.coverage.supersedes(old.coverage, self._grid)]

    def remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._index.remove(key)
            self.nbytes -= entry.nbytes

    def clear(self) -> None:
        for key in list(self._entries):
            self.remove(key)
