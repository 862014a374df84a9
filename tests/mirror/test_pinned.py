"""Snapshots through pinned host memory: see pinned_device.py; on a GPU with what its driver pins."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from resident import resident

from ggml_mirror import find_device

from .places import CPU_LOOPS, Place

TAPS, N_EMBD = 5, 5120


def test_on_a_device_that_says_what_is_copied() -> None:
    file = Path(__file__).with_name("pinned_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_host_memory_is_not_pinned() -> None:
    with CPU_LOOPS.mirror(taps=2, n_embd=64, cap=8, dtype="q8_0") as m:
        m.write_rows(start=5, rows=np.ones((8, 128), np.float32))
        m.restore(m.snapshot())
        moved = m.transfers()
        assert (moved.save_copies, moved.load_copies, moved.pinned_copies) == (2, 2, 0)
        assert (moved.pinned_bytes, moved.unpinned, m.size.pinned) == (0, "", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_a_gpu_copies_to_and_from_pinned_memory(place: Place, dtype: str) -> None:
    if place.is_host:
        pytest.skip("host memory is not pinned")
    round_trips(place, dtype)  # starts the device, and what its driver keeps
    held, free = resident(), find_device(place.device).memory_free
    round_trips(place, dtype)
    gc.collect()
    assert find_device(place.device).memory_free > free - (64 << 20)
    assert resident() < held + (64 << 20)


def round_trips(place: Place, dtype: str, cap: int = 700) -> None:
    """Snapshots of rows that wrap go back as they are, and by way of staging; each in two copies, all of them pinned."""
    x, start = np.random.default_rng(3).standard_normal((cap, TAPS * N_EMBD)).astype(np.float32), cap + cap // 3
    with (
        CPU_LOOPS.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype) as plain,
        place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype) as m,
        place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype) as other,
    ):
        m.write_rows(start=start, rows=x)
        taken = m.snapshot()
        plain.restore(taken)
        np.testing.assert_array_equal(plain.read(start=start, count=cap), m.read(start=start, count=cap))
        for snapshot in (taken, plain.snapshot()):
            other.clear()
            other.restore(snapshot)
            np.testing.assert_array_equal(other.snapshot().rows, taken.rows)
        for mirror in (m, other):
            moved = mirror.transfers()
            assert moved.unpinned == ""
            assert moved.pinned_copies == moved.save_copies + moved.load_copies
            assert moved.pinned_copies == 2 * (moved.save_calls + moved.load_calls)
        for _ in range(20):
            m.restore(m.snapshot())
        assert 0 < m.transfers().pinned_bytes <= m.size.pinned + other.size.pinned
        row = taken.rows[5].copy()
        m.close()
        np.testing.assert_array_equal(taken.rows[5], row)
