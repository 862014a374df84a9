"""The memory tier against a plain list, and its budget at every moment."""

from __future__ import annotations

import threading
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ggml_mirror.cache.counters import CacheCounters
from ggml_mirror.cache.entry import Entry
from ggml_mirror.cache.ram_tier import RamTier
from ggml_mirror.cache.write_behind import WriteBehind

from .entries import GRID, entry_of

CAPACITY = 40_000


class RamTierMachine(RuleBasedStateMachine):
    """Prompts that share beginnings, so that some supersede others; the model is a list, the one used longest ago first."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = CacheCounters()
        self.tier = RamTier(CAPACITY, GRID, self.counters)
        self.model: list[Entry] = []
        self.gone = 0

    @rule(
        branch=st.integers(0, 2),
        fork=st.sampled_from([0, 64, 200]),
        n=st.sampled_from([20, 64, 130, 200, 260, 390]),
        target_bytes=st.sampled_from([10, 5_000, 19_000, 39_999]),
        first_cut=st.booleans(),
    )
    def add(self, branch: int, fork: int, n: int, target_bytes: int, first_cut: bool) -> None:
        tokens = [7] * min(fork, n) + [branch] * max(n - fork, 0)
        entry = entry_of(tokens, target_bytes=target_bytes, first_cut=n * first_cut)
        size = target_bytes + 4 * n + entry.rows.nbytes + entry.logits.nbytes
        kept = self.tier.add(entry)
        assert entry.nbytes == size and kept == (size <= CAPACITY)
        if not kept:
            return
        self.model = [old for old in self.model if old.key != entry.key]
        superseded = [
            old
            for old in self.model
            if len(old.key) < len(entry.key)
            and entry.key.startswith(old.key)
            and entry.coverage.supersedes(old.coverage, GRID)
        ]
        # They go before all others, the longest first; those that may stay are the next to go, the shortest first.
        superseded.sort(key=lambda old: len(old.key))
        others = [old for old in self.model if old not in superseded]
        going = [*reversed(superseded), *others]
        while sum(old.nbytes for old in going) + size > CAPACITY:
            del going[0]
            self.gone += 1
        self.model = [old for old in [*superseded, *others] if old in going]
        self.model.append(entry)

    @rule(index=st.integers(0, 20))
    def use(self, index: int) -> None:
        if self.model:
            entry = self.model.pop(index % len(self.model))
            self.model.append(entry)
            assert self.tier.use(entry.key)

    @rule(index=st.integers(0, 20))
    def remove(self, index: int) -> None:
        if self.model:
            self.tier.remove(self.model.pop(index % len(self.model)).key)

    @invariant()
    def same(self) -> None:
        assert [self.tier.get(old.key) for old in self.model] == self.model
        assert len(self.tier) == len(self.model)
        assert self.tier.nbytes == sum(old.nbytes for old in self.model) <= CAPACITY
        assert self.counters.evictions["ram"] == self.gone
        if self.model:
            key = self.model[0].key
            assert {entry.key for _, entry in self.tier.nearest(key)} >= {key}


RamTierMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestRamTier = RamTierMachine.TestCase


def test_too_large_and_without_a_budget() -> None:
    counters = CacheCounters()
    assert not RamTier(100, GRID, counters).add(entry_of([1, 2, 3]))
    assert counters.not_stored == {"ram_too_large": 1}
    assert not RamTier(0, GRID, counters).add(entry_of([1, 2, 3]))  # what was asked for is no event
    assert counters.not_stored == {"ram_too_large": 1}


def test_what_waits_to_be_written_is_not_given_up() -> None:
    """The giver waits for it; so memory is never beyond the budget, and nothing is lost to the disk."""
    counters, gate, written = CacheCounters(), threading.Event(), []
    writer: WriteBehind[Entry] = WriteBehind(lambda entry: gate.wait(10) and written.append(entry))
    first, second = entry_of([1] * 64, target_bytes=1000), entry_of([2] * 64, target_bytes=1000)
    tier = RamTier(first.nbytes + second.nbytes // 2, GRID, counters, writer.wait)
    assert tier.add(first)
    writer.submit(first)
    assert not tier.add(second, wait_s=0.05)
    assert counters.not_stored == {"disk_slow": 1} and tier.get(first.key) is first

    threading.Timer(0.1, gate.set).start()
    started = time.monotonic()
    assert tier.add(second, wait_s=10) and time.monotonic() - started >= 0.05
    assert written == [first] and tier.get(first.key) is None and tier.nbytes == second.nbytes
    assert writer.close()
