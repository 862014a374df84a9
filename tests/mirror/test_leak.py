"""Memory comes back: after 1,000 mirrors, 1,000 that could not be made, and after the last view of a closed one.

What is allowed to stay is 4 KiB a cycle (resident memory is counted in pages, and allocators keep some), far below any
ring, staging buffer or snapshot that is made here. A GPU's driver keeps more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from resident import growth, resident

from ggml_mirror import FeatureDtype, Snapshot, find_device
from ggml_mirror.errors import GgmlMirrorError, MirrorMemoryError, ShapeError, SnapshotError, StaleRowError

from .ggml_tensors import Tensors
from .places import CPU_LOOPS, Place

pytestmark = pytest.mark.slow

MIB = 2**20
CYCLES, WARM_UP = 1000, 50


def allowed(place: Place) -> int:
    return 4 * MIB if place.is_host else 32 * MIB


def test_making_writing_and_closing(place: Place, dtype: FeatureDtype) -> None:
    """A ring of 512 KiB (f32) to 72 KiB (q4_0), every byte of it written: 1,000 leaked ones would be 70 MiB or more."""
    x = np.ones((64, 2048), np.float32)

    def cycle(i: int) -> None:
        with place.mirror(taps=2, n_embd=1024, cap=64, dtype=dtype) as m:
            m.write_rows(start=i, rows=x)
            m.read(start=i, count=64)

    free = find_device(place.device).memory_free
    assert growth(cycle, CYCLES, warm_up=WARM_UP) < allowed(place)
    assert place.is_host or find_device(place.device).memory_free > free - 64 * MIB


def test_mirrors_that_are_not_closed_but_forgotten(place: Place) -> None:
    """With threads of their own."""
    x = np.ones((256, 2048), np.float32)

    def cycle(i: int) -> None:
        place.mirror(taps=2, n_embd=1024, cap=256, dtype="f32", n_threads=3).write_rows(start=i, rows=x)

    assert growth(cycle, CYCLES, warm_up=WARM_UP) < allowed(place)
    assert psutil.Process().num_threads() < 100


def test_bookkeeping(place: Place) -> None:
    """A million slots are 16 MiB of it or more: one of 200 would show."""

    def cycle(i: int) -> None:
        place.mirror(taps=1, n_embd=32, cap=10**6, dtype="q4_0").close()

    assert growth(cycle, 200, warm_up=WARM_UP) < allowed(place)


def test_mirrors_that_could_not_be_made(place: Place) -> None:
    """Refused for too little memory, bad numbers, or a wrong width: 1,000 of each."""
    cap = find_device(place.device).memory_free // 1000

    def cycle(i: int) -> None:
        for error, arguments in (
            (MirrorMemoryError, {"taps": 4, "n_embd": 4096, "cap": cap}),
            (GgmlMirrorError, {"taps": 0, "n_embd": 32, "cap": 4}),
            (ShapeError, {"taps": 1, "n_embd": 33, "cap": 100_000, "dtype": "q8_0"}),
        ):
            with pytest.raises(error):
                place.mirror(**arguments)

    assert growth(cycle, CYCLES, warm_up=WARM_UP) < allowed(place)


def test_writes_reads_and_snapshots(place: Place, tmp_path: Path) -> None:
    """Of a mirror that lives on; each cycle moves 1 MiB in four ways."""
    x = np.ones((64, 4096), np.float32)
    with place.mirror(taps=4, n_embd=1024, cap=100, dtype="f32") as m, Tensors() as tensors:
        tensor = tensors.of(x, place.device)

        def cycle(i: int) -> None:
            m.write_rows(start=i, rows=x)
            m.write(tap=1, start=i, rows=x[:, ::4])
            m.write_tensor(tensor, start=i)
            m.read_tensor(tensor, start=i, count=64)
            m.read(start=i, count=64)
            m.restore(m.snapshot())
            if i % 10 == 0:
                m.snapshot().save(tmp_path / "s")
                Snapshot.load(tmp_path / "s")

        assert growth(cycle, CYCLES, warm_up=WARM_UP) < allowed(place)


def test_failures(tmp_path: Path, place: Place) -> None:
    (tmp_path / "bad").write_bytes(b"\x10\0\0\0\0\0\0\0{}" + bytes(100_000))
    x = np.ones((64, 4096), np.float64)
    with place.mirror(taps=4, n_embd=1024, cap=100, dtype="f32") as m:

        def cycle(i: int) -> None:
            with pytest.raises(StaleRowError):
                m.read(start=i, count=64)
            with pytest.raises(ShapeError):
                m.write_rows(start=i, rows=x)
            with pytest.raises(SnapshotError):
                Snapshot.load(tmp_path / "bad")

        assert growth(cycle, CYCLES, warm_up=WARM_UP) < allowed(place)


def test_memory_of_a_closed_mirror_goes_with_its_last_view() -> None:
    x = np.ones((16384, 4096), np.float32)
    before = resident()
    m = CPU_LOOPS.mirror(taps=1, n_embd=4096, cap=len(x), dtype="f32")
    m.write_rows(start=0, rows=x)
    ring = m.nbytes
    assert ring == 256 * MIB and resident() - before > 0.9 * ring
    view = m.view(start=0, count=len(x))
    part = view[5:7]
    m.close()
    assert resident() - before > 0.9 * ring, "the view still shows the ring"
    del view, m
    assert resident() - before > 0.9 * ring, "a part of the view still does"
    assert (part == 1).all()
    del part
    assert resident() - before < 0.1 * ring


def test_views_of_mirrors_that_come_and_go() -> None:
    x = np.ones((256, 1024), np.float32)

    def cycle(i: int) -> None:
        with CPU_LOOPS.mirror(taps=1, n_embd=1024, cap=256, dtype="f32") as m:
            m.write_rows(start=0, rows=x)
            views = [m.view(start=j, count=3) for j in range(20)]
        assert views[7][0, 0] == 1

    assert growth(cycle, CYCLES, warm_up=WARM_UP) < 4 * MIB
