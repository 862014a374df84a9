"""A mirror used from many threads: calls run one at a time, no row is torn, and closing it under them is harmless."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from ggml_mirror import FeatureMirror, Snapshot
from ggml_mirror.errors import ClosedError, StaleRowError, ViewError

from .places import Place

TAPS, N_EMBD, CAP = 2, 40960, 24  # up to 2.6 MB a write: helper threads take part
WIDTH = TAPS * N_EMBD


def run_together(works: list[Callable[[threading.Event], None]], seconds: float) -> None:
    """Run them all until the time is over; the first exception of any of them fails the test."""
    stop, failures = threading.Event(), []

    def guarded(work: Callable[[threading.Event], None]) -> None:
        try:
            while not stop.is_set():
                work(stop)
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(w,)) for w in works]
    for t in threads:
        t.start()
    stop.wait(seconds)
    stop.set()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


class Writer:
    """Writes rows that are one number throughout; each call another number, exact in every dtype under test."""

    def __init__(self, m: FeatureMirror, seed: int) -> None:
        self.m, self.rng, self.calls = m, np.random.default_rng(seed), 0

    def __call__(self, stop: threading.Event) -> None:
        value = np.float32(127 * 2.0 ** -float(self.rng.integers(0, 14)))
        n, start = int(self.rng.integers(1, 9)), int(self.rng.integers(0, 2 * CAP))
        try:
            self.m.write_rows(start=start, rows=np.full((n, WIDTH), value, np.float32))
        except ClosedError:
            stop.set()
        self.calls += 1


class Reader:
    """Reads single rows and ranges: each row is one number throughout, or the read is stale."""

    def __init__(self, m: FeatureMirror, seed: int) -> None:
        self.m, self.rng, self.rows = m, np.random.default_rng(seed), 0

    def __call__(self, stop: threading.Event) -> None:
        start, count = int(self.rng.integers(0, 2 * CAP)), int(self.rng.integers(1, 9))
        try:
            rows = self.m.read(start=start, count=count)
        except StaleRowError as error:
            assert start <= error.position < start + count
            return
        except ClosedError:
            stop.set()
            return
        assert (rows == rows[:, :1]).all(), "a torn row"
        assert set(rows[:, 0]) <= {np.float32(127 * 2.0**-e) for e in range(14)}
        self.rows += count


@pytest.mark.parametrize("name", ["f32", "q8_0"])
def test_no_row_is_torn(place: Place, name: str) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=name, n_threads=2) as m:
        writers, readers = [Writer(m, i) for i in range(3)], [Reader(m, 10 + i) for i in range(3)]

        def snapshots(stop: threading.Event) -> None:
            s = m.snapshot()
            for row in s.rows.reshape(len(s.rows), -1, m.row_nbytes // (WIDTH // 32)):
                assert (row == row[0]).all(), "a torn row in a snapshot"

        def forgets(stop: threading.Event) -> None:
            m.truncate(CAP + CAP // 2)
            positions = m.positions
            assert len(set(positions % CAP)) == len(positions)
            stop.wait(0.002)

        run_together([*writers, *readers, snapshots, forgets], seconds=1.0)
        assert sum(w.calls for w in writers) > 30 and sum(r.rows for r in readers) > 30
        assert m.times().write_calls == sum(w.calls for w in writers)


def test_slices_of_a_tap_are_never_mixed(place: Place) -> None:
    """Two threads write one tap each; a row that is read holds one write of either, whole."""
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=4, dtype="f32") as m:
        m.write_rows(start=0, rows=np.zeros((1, WIDTH), np.float32))
        counts = [0, 0]

        def writer(tap: int) -> Callable[[threading.Event], None]:
            def write(stop: threading.Event) -> None:
                counts[tap] += 1
                m.write(tap=tap, start=0, rows=np.full((1, N_EMBD), counts[tap], np.float32))

            return write

        last = [0.0, 0.0]

        def read(stop: threading.Event) -> None:
            for tap, part in enumerate(np.split(m.read(start=0, count=1)[0], TAPS)):
                assert (part == part[0]).all(), "a torn slice"
                assert part[0] >= last[tap], "an older write came back"
                last[tap] = part[0]

        run_together([writer(0), writer(1), read], seconds=0.7)
        assert min(counts) > 30 and min(last) > 0


def test_restoring_is_seen_whole(place: Place) -> None:
    """A snapshot goes in at one moment: positions and rows are those of one of the two, never of both."""
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="q8_0") as m:
        states: list[Snapshot] = []
        for value, start in ((127, 0), (63.5, 7)):
            m.clear()
            m.write_rows(start=start, rows=np.full((5, WIDTH), value, np.float32))
            states.append(m.snapshot())
        known = {(tuple(s.positions.tolist()), s.rows.tobytes()) for s in states}
        seen = set()

        def restore(stop: threading.Event) -> None:
            for s in states:
                m.restore(s)

        def look(stop: threading.Event) -> None:
            s = m.snapshot()
            seen.add((tuple(s.positions.tolist()), s.rows.tobytes()))

        run_together([restore, restore, look, look], seconds=0.5)
        assert seen == known


def test_closing_under_use_is_harmless(place: Place) -> None:
    """Calls in flight end; those after raise ClosedError; the ring goes when its last view does."""
    for round_ in range(20):
        m = place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32")
        m.write_rows(start=0, rows=np.full((CAP, WIDTH), 127, np.float32))
        views: list[np.ndarray] = []

        def look(stop: threading.Event, m: FeatureMirror = m, views: list[np.ndarray] = views) -> None:
            try:
                views.append(m.view(start=0, count=4))
            except (StaleRowError, ViewError):
                pass
            except ClosedError:
                stop.set()

        def close(stop: threading.Event, m: FeatureMirror = m, delay: float = 0.001 * round_) -> None:
            stop.wait(delay)
            m.close()
            m.close()

        run_together([Writer(m, 1), Writer(m, 2), Reader(m, 3), Reader(m, 4), look, close], seconds=5.0)
        assert m.closed
        for view in views[-20:]:
            assert np.isfinite(view).all()


def test_errors_belong_to_their_thread(place: Place) -> None:
    """The message and position of a failure are those of the call that failed, whatever fails beside it."""
    with place.mirror(taps=1, n_embd=32, cap=4, dtype="f32") as m:

        def failing(position: int) -> Callable[[threading.Event], None]:
            def read(stop: threading.Event) -> None:
                with pytest.raises(StaleRowError, match=f"position {position} ") as caught:
                    m.read(start=position, count=1)
                assert caught.value.position == position

            return read

        run_together([failing(p) for p in (3, 1_000_000, 2**40)], seconds=0.3)


def test_mirrors_are_made_and_closed_side_by_side(place: Place) -> None:
    def life(stop: threading.Event) -> None:
        with place.mirror(taps=1, n_embd=64, cap=8, dtype="q8_0") as m:
            m.write_rows(start=5, rows=np.full((6, 64), 127, np.float32))
            assert (m.read(start=5, count=6) == 127).all()

    run_together([life] * 6, seconds=0.5)
