"""The mirror against a dictionary, over long random histories: nothing stale is read, nothing valid is lost."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ggml_mirror import FeatureMirror, Snapshot
from ggml_mirror.errors import StaleRowError, ViewError

from .places import Place
from .reference import Floats
from .ring_oracle import N_EMBD, OracleRing, exact_rows

MIN_STEPS = 10_000

#: dtype x cap x taps. Caps: one slot, small and odd, a prime beside the block size, aligned to it.
CONFIGS = [(dtype, cap, taps) for dtype in ("f32", "q8_0") for cap, taps in ((1, 1), (1, 2), (7, 3), (31, 1), (32, 2))]

#: Where a history plays: at the start, beyond 32 bits, beyond 53.
ORIGINS = (0, 0, 0, 2**32 - 3, 2**61 + 5)


class RingMachine(RuleBasedStateMachine):
    """Subclassed per place; ``ran`` counts what was executed over all examples."""

    place: Place
    ran: Counter[str]

    saved = Bundle("saved")

    @initialize(config=st.sampled_from(CONFIGS), origin=st.sampled_from(ORIGINS))
    def make(self, config: tuple[str, int, int], origin: int) -> None:
        self.dtype, self.cap, self.taps = config
        self.origin, self.written = origin, 0
        self.oracle = OracleRing(self.cap, self.taps)
        self.mirror = self._new()

    def _new(self) -> FeatureMirror:
        return self.place.mirror(taps=self.taps, n_embd=N_EMBD, cap=self.cap, dtype=self.dtype)

    def teardown(self) -> None:
        if hasattr(self, "mirror"):
            self.mirror.close()

    # ------------------------------------------------------------------ drawing

    def _head(self) -> int:
        return max((p for p, _ in self.oracle.slots.values()), default=self.origin - 1) + 1

    def _position(self, data: st.DataObject) -> int:
        """Near the head, most often: that is where overwriting, gaps and partial rows happen."""
        base = data.draw(st.sampled_from([self._head(), self._head(), self.origin]), "base")
        return max(base + data.draw(st.integers(-2 * self.cap - 2, self.cap + 2), "offset"), 0)

    def _count(self, data: st.DataObject) -> int:
        return data.draw(st.one_of(st.integers(0, min(self.cap, 4)), st.integers(0, 3 * self.cap)), "count")

    def _rows(self, n: int, width: int) -> Floats:
        self.written += 1
        return exact_rows(self.written, n, width)

    def _write(self, tap: int | None, start: int, count: int) -> None:
        if tap is None:
            rows = self._rows(count, self.taps * N_EMBD)
            self.mirror.write_rows(start=start, rows=rows)
        else:
            rows = self._rows(count, N_EMBD)
            self.mirror.write(tap=tap, start=start, rows=rows)
        self.oracle.write(tap, start, rows)

    # ------------------------------------------------------------------ writing

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.ran["append"] += 1
        self._write(None, self._head(), self._count(data))

    @rule(data=st.data())
    def write_rows(self, data: st.DataObject) -> None:
        self.ran["write_rows"] += 1
        self._write(None, self._position(data), self._count(data))

    @rule(data=st.data())
    def write_one_tap(self, data: st.DataObject) -> None:
        self.ran["write"] += 1
        self._write(data.draw(st.integers(0, self.taps - 1), "tap"), self._position(data), self._count(data))

    @rule(data=st.data())
    def write_every_tap(self, data: st.DataObject) -> None:
        """As an evaluation does: each tap in turn, in any order, over the same positions."""
        self.ran["write every tap"] += 1
        start, count = self._position(data), self._count(data)
        for tap in data.draw(st.permutations(range(self.taps)), "order"):
            self._write(tap, start, count)

    # --------------------------------------------------------------- forgetting

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        self.ran["truncate"] += 1
        start = self._position(data)
        self.mirror.truncate(start)
        self.oracle.truncate(start)

    @rule(sure=st.integers(0, 9))
    def clear(self, sure: int) -> None:
        self.ran["clear"] += 1
        if sure == 0:  # rarely: a ring that is often empty tests little
            self.mirror.clear()
            self.oracle.clear()

    # ------------------------------------------------------------------ reading

    @rule(data=st.data())
    def read_anywhere(self, data: st.DataObject) -> None:
        self.ran["read"] += 1
        self._read(self._position(data), self._count(data))

    @precondition(lambda self: self.oracle.positions())
    @rule(data=st.data())
    def read_a_held_stretch(self, data: st.DataObject) -> None:
        """Whole, in part, or one row too many on either side."""
        self.ran["read held"] += 1
        first, count = data.draw(st.sampled_from(self.oracle.stretches()), "stretch")
        start = first + data.draw(st.sampled_from([0, 0, count // 2, count - 1, -1]), "skip")
        end = data.draw(st.sampled_from([first + count, first + count, first + count + 1, start + 1]), "end")
        self._read(max(start, 0), end - max(start, 0))

    def _read(self, start: int, count: int) -> None:
        want = self.oracle.read(start, count)
        if isinstance(want, int):
            self.ran["stale reads"] += 1
            with pytest.raises(StaleRowError) as caught:
                self.mirror.read(start=start, count=count)
            assert caught.value.position == want
            assert f"position {want} " in str(caught.value)
        else:
            self.ran["rows read"] += count
            np.testing.assert_array_equal(self.mirror.read(start=start, count=count), want)
        if self.place.is_host:
            self._view(start, count, want)

    def _view(self, start: int, count: int, want: Floats | int) -> None:
        wraps = count > 0 and start % self.cap + count > self.cap
        if isinstance(want, int):
            with pytest.raises(StaleRowError) as caught:
                self.mirror.view(start=start, count=count)
            assert caught.value.position == want
        elif self.dtype != "f32" or wraps:
            with pytest.raises(ViewError):
                self.mirror.view(start=start, count=count)
        elif count > 0:
            self.ran["rows viewed"] += count
            np.testing.assert_array_equal(self.mirror.view(start=start, count=count), want)

    # --------------------------------------------------------- snapshot, restore

    @rule(target=saved)
    def snapshot(self) -> object:
        self.ran["snapshot"] += 1
        return multiple((self.mirror.snapshot(), self.oracle.copy()))

    @rule(state=saved)
    def restore(self, state: tuple[Snapshot, OracleRing]) -> None:
        self.ran["restore"] += 1
        self._become(state)

    @rule(state=consumes(saved))
    def restore_into_a_twin(self, state: tuple[Snapshot, OracleRing]) -> None:
        self.ran["restore into a twin"] += 1
        self.mirror.close()
        self.mirror = self._new()
        self.oracle.slices_written = [0] * self.taps
        self._become(state)

    def _become(self, state: tuple[Snapshot, OracleRing]) -> None:
        snapshot, oracle = state
        counted = self.oracle.slices_written  # statistics are of writes, and a restore is none
        self.mirror.restore(snapshot)
        self.oracle = oracle.copy()
        self.oracle.slices_written = counted

    # --------------------------------------------------------------- invariants

    @invariant()
    def same_positions(self) -> None:
        if not hasattr(self, "mirror"):
            return
        assert self.mirror.positions.tolist() == self.oracle.positions()
        assert len(self.mirror) == len(self.oracle.positions())

    @invariant()
    def every_held_row_is_read(self) -> None:
        for start, count in self.oracle.stretches() if hasattr(self, "mirror") else []:
            self._read(start, count)

    @invariant()
    def same_bytes(self) -> None:
        """Partial rows included: a snapshot shows what of them is there, and zeros for what is not."""
        if not hasattr(self, "mirror"):
            return
        snapshot, positions = self.mirror.snapshot(), self.oracle.positions(whole=False)
        assert snapshot.positions.tolist() == positions
        masks = [sum(1 << tap for tap in self.oracle.slices(p)) for p in positions]
        assert snapshot.tap_masks.tolist() == masks
        if self.dtype == "f32":
            shape = (-1, self.taps, N_EMBD)
            blank = np.zeros(N_EMBD, np.float32)
            want = [[self.oracle.slices(p).get(tap, blank) for tap in range(self.taps)] for p in positions]
            np.testing.assert_array_equal(snapshot.rows.view(np.float32).reshape(shape), np.reshape(want, shape))

    @invariant()
    def same_counts(self) -> None:
        if hasattr(self, "mirror"):
            assert [self.mirror.tap_stats(t).values // N_EMBD for t in range(self.taps)] == self.oracle.slices_written


def test_mirror_behaves_like_a_dictionary_of_slots(place: Place) -> None:
    machine = type("RingMachineHere", (RingMachine,), {"place": place, "ran": Counter()})
    run_state_machine_as_test(machine, settings=settings(max_examples=250, stateful_step_count=60))
    ran = machine.ran
    rules = ("append", "write_rows", "write", "write every tap", "truncate", "clear", "read", "read held")
    steps = sum(ran[name] for name in (*rules, "snapshot", "restore", "restore into a twin"))
    assert steps >= MIN_STEPS, f"only {steps} steps were run: {dict(ran)}"
    assert min(ran[name] for name in rules) >= MIN_STEPS // 50, f"a rule was hardly run: {dict(ran)}"
    assert ran["restore"] + ran["restore into a twin"] >= 200
    assert ran["rows read"] >= 5 * MIN_STEPS and ran["stale reads"] >= 500, f"reads were not of both kinds: {dict(ran)}"
    assert not place.is_host or ran["rows viewed"] >= 500
    print(f"{steps} steps: {dict(ran)}")
