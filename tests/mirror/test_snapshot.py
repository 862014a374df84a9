"""A mirror that was restored goes on exactly as one that was never saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ggml_mirror import FeatureDtype, FeatureMirror, Snapshot
from ggml_mirror.errors import StaleRowError

from .places import CPU_LOOPS, Place
from .reference import Floats

TAPS, N_EMBD, CAP = 4, 64, 11
WIDTH = TAPS * N_EMBD


def rows(seed: int, n: int, width: int = WIDTH) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def empty(m: FeatureMirror) -> None:
    pass


def emptied(m: FeatureMirror) -> None:
    m.write_rows(start=3, rows=rows(1, 9))
    m.clear()


def few(m: FeatureMirror) -> None:
    m.write_rows(start=2, rows=rows(1, 4))


def full(m: FeatureMirror) -> None:
    m.write_rows(start=0, rows=rows(1, CAP))


def wrapped(m: FeatureMirror) -> None:
    m.write_rows(start=0, rows=rows(1, CAP))
    m.write_rows(start=CAP, rows=rows(2, 4))


def wrapped_at_large_positions(m: FeatureMirror) -> None:
    m.write_rows(start=2**40 + 3, rows=rows(1, CAP + 5))


def gaps(m: FeatureMirror) -> None:
    for start in (0, 4, 9, 17):
        m.write_rows(start=start, rows=rows(start, 2))


def partial(m: FeatureMirror) -> None:
    m.write_rows(start=0, rows=rows(1, 8))
    m.write(tap=1, start=6, rows=rows(2, 6, N_EMBD))  # 8..11 have one tap, 11 in place of 0
    m.write(tap=2, start=9, rows=rows(3, 2, N_EMBD))


def truncated(m: FeatureMirror) -> None:
    wrapped(m)
    m.truncate(9)


HISTORIES = [empty, emptied, few, full, wrapped, wrapped_at_large_positions, gaps, partial, truncated]


def go_on(m: FeatureMirror) -> None:
    """What a decode loop does next: complete partial rows, append, step back, write over."""
    end = int(m.positions[-1]) + 1 if len(m) else 0
    for tap in range(TAPS):
        m.write(tap=tap, start=end, rows=rows(20 + tap, 3, N_EMBD))
    m.truncate(end + 2)
    m.write(tap=0, start=end + 1, rows=rows(30, 4, N_EMBD))
    m.write_rows(start=end + 4, rows=rows(31, 3))


def assert_same(one: FeatureMirror, other: FeatureMirror) -> None:
    a, b = one.snapshot(), other.snapshot()
    assert a.header == b.header
    np.testing.assert_array_equal(a.positions, b.positions)
    np.testing.assert_array_equal(a.tap_masks, b.tap_masks)
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(one.positions, other.positions)
    for start in range(max(int(a.header.first_position) - 2, 0), max(int(a.header.first_position) + 2 * CAP, 1)):
        outcomes = []
        for m in (one, other):
            try:
                outcomes.append(m.read(start=start, count=2).tobytes())
            except StaleRowError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda f: f.__name__)
def test_restored_mirror_goes_on_like_its_twin(
    place: Place, dtype: FeatureDtype, history: Callable[[FeatureMirror], None], through: str, tmp_path: Path
) -> None:
    def new() -> FeatureMirror:
        return place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=dtype)

    with new() as never_saved, new() as saved, new() as restored:
        for m in (never_saved, saved):
            history(m)
        snapshot = saved.snapshot()
        if through == "file":
            snapshot.save(tmp_path / "s")
            snapshot = Snapshot.load(tmp_path / "s")
        restored.write_rows(start=5, rows=rows(99, CAP))  # what it held before must leave no trace
        restored.restore(snapshot)
        assert_same(never_saved, restored)
        for m in (never_saved, saved, restored):
            go_on(m)
        assert_same(never_saved, saved)  # taking a snapshot changes nothing
        assert_same(never_saved, restored)


def test_snapshot_moves_between_places(place: Place, dtype: FeatureDtype) -> None:
    """Storage bytes mean the same on every device and on every path."""
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=dtype) as here:
        with CPU_LOOPS.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=dtype) as there:
            wrapped(here)
            there.restore(here.snapshot())
            assert_same(here, there)
            here.clear()
            here.restore(there.snapshot())
            assert_same(here, there)


def test_snapshot_is_as_large_as_the_live_rows(place: Place, dtype: FeatureDtype) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=4096, dtype=dtype) as m:
        m.write_rows(start=4000, rows=rows(1, 200))
        snapshot = m.snapshot()
        assert snapshot.rows.shape == (200, m.row_nbytes)
        assert snapshot.nbytes == 200 * (m.row_nbytes + 8 + 8)
        assert (snapshot.header.first_position, snapshot.header.count) == (4000, 200)


def test_snapshot_is_of_its_moment(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=0, rows=rows(1, 4))
        snapshot = m.snapshot()
        m.write_rows(start=0, rows=rows(2, 4))
        np.testing.assert_array_equal(snapshot.rows.view(np.float32), rows(1, 4))


def test_bytes_of_missing_taps_are_zero_whatever_the_slot_held(place: Place, dtype: FeatureDtype) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=1, dtype=dtype) as m:
        m.write_rows(start=0, rows=rows(1, 1))
        m.write(tap=1, start=1, rows=rows(2, 1, N_EMBD))
        slices = m.snapshot().rows.reshape(TAPS, -1)
        assert not slices[[0, 2, 3]].any() and slices[1].any()
        assert m.snapshot().tap_masks.tolist() == [0b0010]


def test_header_says_what_the_snapshot_is_of(place: Place, dtype: FeatureDtype) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=dtype, target="t" * 32, draft="d" * 32) as m:
        wrapped(m)
        h = m.snapshot().header
    assert (h.rows, h.dtype, h.taps, h.n_embd, h.cap) == ("raw", dtype.value, TAPS, N_EMBD, CAP)
    assert (h.row_bytes, h.first_position, h.count, h.target, h.draft) == (m.row_nbytes, 4, CAP, "t" * 32, "d" * 32)


def test_mirror_without_models_takes_those_of_the_snapshot() -> None:
    with (
        CPU_LOOPS.mirror(taps=1, n_embd=32, cap=4, target="a", draft="b") as one,
        CPU_LOOPS.mirror(taps=1, n_embd=32, cap=4) as other,
    ):
        other.restore(one.snapshot())
        assert (other.target, other.draft) == ("a", "b")
        assert other.snapshot().header == one.snapshot().header


def test_restoring_is_no_write(place: Place) -> None:
    """Statistics are of what was written; a restore brings rows that were counted elsewhere."""
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        full(m)
        before = m.tap_stats(0), m.times().write_rows
        m.restore(m.snapshot())
        assert (m.tap_stats(0).values, m.times().write_rows) == (before[0].values, before[1])
