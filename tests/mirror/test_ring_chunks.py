"""Large rings: what is looked up by chunks of chunks is what a look at every slot tells."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from .compiled import compiled

RING = Path(__file__).parent / "ring"
NATIVE = Path(__file__).parents[2] / "native"
TAPS, ALL = 2, 0b11


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    sources = [RING / "ring_library.cpp", NATIVE / "src/ring.cpp", NATIVE / "src/error.cpp"]
    flags = ["-O1", "-D_GLIBCXX_ASSERTIONS", f"-I{NATIVE / 'src'}", f"-I{NATIVE / 'include'}"]
    found = compiled(tmp_path_factory.mktemp("ring") / "ring.so", sources, *flags)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for name, result, arguments in (
        ("new", pointer, [number, ctypes.c_int32]),
        ("free", None, [pointer]),
        ("begin_write", None, [pointer, number, number, ctypes.c_uint64]),
        ("end_write", None, [pointer, number, number, ctypes.c_uint64]),
        ("truncate", None, [pointer, number]),
        ("clear", None, [pointer]),
        ("version", ctypes.c_uint64, [pointer]),
        ("stretch_before", number, [pointer, number, number]),
        ("require", number, [pointer, number, number]),
        ("changed", number, [pointer, number, number, ctypes.c_uint64, number, pointer, pointer]),
    ):
        function = getattr(found, f"ring_{name}")
        function.restype, function.argtypes = result, arguments
    yield found


class Slots:
    """A ring that is looked at slot by slot, and the native one beside it."""

    def __init__(self, lib: ctypes.CDLL, cap: int) -> None:
        self.lib, self.cap = lib, cap
        self.ring = lib.ring_new(cap, TAPS)
        self.position = np.full(cap, -1, np.int64)
        self.taps = np.zeros(cap, np.uint64)
        self.version = np.zeros(cap, np.uint64)

    def write(self, start: int, count: int, taps: int, *, finish: bool = True) -> None:
        """``finish``: else the write fails behind its begin, and nobody knows what is stored."""
        self.lib.ring_begin_write(self.ring, start, count, taps)
        positions = np.arange(start, start + count)
        slots = positions % self.cap
        other = self.position[slots] != positions
        self.version[slots[other]] = 0
        self.taps[slots] = np.where(other, 0, self.taps[slots] & np.uint64(~taps & ALL))
        self.position[slots] = positions
        if finish:
            self.lib.ring_end_write(self.ring, start, count, taps)
            self.taps[slots] |= np.uint64(taps)
            self.version[slots] = self.lib.ring_version(self.ring)

    def truncate(self, start: int) -> None:
        self.lib.ring_truncate(self.ring, start)
        gone = self.position >= start
        self.position[gone], self.taps[gone], self.version[gone] = -1, 0, 0

    def clear(self) -> None:
        self.lib.ring_clear(self.ring)
        self.position[:], self.taps[:], self.version[:] = -1, 0, 0

    def complete(self, positions: np.ndarray) -> np.ndarray:
        slots = positions % self.cap
        return (self.position[slots] == positions) & (self.taps[slots] == ALL)

    def check(self, rng: np.random.Generator, seen: int) -> int:
        """Everything that is asked of a ring, at places near its end and anywhere. Returns the version."""
        end = int(self.position.max()) + 1
        for at in {end, max(end - 1, 0), int(rng.integers(0, end + 20))}:
            for most in (int(rng.integers(0, self.cap + 5)), self.cap, 1 << 40):
                n = min(most, at, self.cap)
                missing = np.nonzero(~self.complete(np.arange(at - n, at)))[0]
                stretch = n - 1 - int(missing[-1]) if len(missing) else n
                assert self.lib.ring_stretch_before(self.ring, at, most) == stretch
                start, count = at - stretch, int(rng.integers(0, stretch + 3))
                missing = np.nonzero(~self.complete(np.arange(start, start + count)))[0]
                first = start + int(missing[0]) if len(missing) else -1
                assert self.lib.ring_require(self.ring, start, count) == first
                self.check_changed(start, min(count, self.cap), int(rng.choice([0, seen])))
        self.check_changed(max(end - self.cap, 0), min(end, self.cap), seen)
        return int(self.lib.ring_version(self.ring))

    def check_changed(self, start: int, count: int, since: int) -> None:
        positions, versions = np.zeros(count, np.int64), np.zeros(count, np.uint64)
        n = self.lib.ring_changed(self.ring, start, count, since, count, positions.ctypes.data, versions.ctypes.data)
        assert n <= count
        positions, versions = positions[:n], versions[:n]
        assert (np.diff(positions) > 0).all() and (n == 0 or start <= positions[0] <= positions[-1] < start + count)
        every = np.arange(start, start + count)
        real = np.where(self.complete(every), self.version[every % self.cap], 0)
        assert np.array_equal(versions, real[positions - start])
        wanted = every[(real == 0) | (real > since)]
        assert np.isin(wanted, positions).all()
        # Others only because they share a smallest chunk, or the ends of the range, with those.
        assert n <= 16 * len(wanted) + 16 * 3

    def close(self) -> None:
        self.lib.ring_free(self.ring)


@pytest.mark.parametrize("cap", [1, 15, 16, 17, 255, 256, 300, 4095, 4096, 4097, 9001])
def test_a_walk(lib: ctypes.CDLL, cap: int) -> None:
    rng = np.random.default_rng(cap)
    slots, end, seen = Slots(lib, cap), 0, 0
    for _ in range(400):
        kind = rng.choice(["append", "append", "append", "bulk", "rewrite", "tap", "broken", "truncate", "skip", "clear"],
                          p=[0.2, 0.15, 0.1, 0.2, 0.1, 0.1, 0.05, 0.07, 0.025, 0.005])  # fmt: skip
        if kind == "append":
            n = int(rng.integers(1, min(9, cap) + 1))
            slots.write(end, n, ALL)
        elif kind == "bulk":
            n = int(rng.integers(1, cap + 1))
            slots.write(end, n, ALL)
        elif kind in ("rewrite", "tap", "broken"):
            start = int(rng.integers(max(end - cap, 0), end + 1))
            n = int(rng.integers(1, min(cap, 600) + 1))
            slots.write(start, n, ALL if kind == "rewrite" else int(rng.integers(1, ALL)), finish=kind != "broken")
        elif kind == "truncate":
            slots.truncate(int(rng.integers(max(end - 2 * cap, 0), end + 2)))
        elif kind == "skip":
            slots.write(end + int(rng.integers(1, 2 * cap + 2)), 1, ALL)
        else:
            slots.clear()
        end = int(slots.position.max()) + 1
        now = slots.check(rng, seen)
        if rng.random() < 0.5:
            seen = now
    slots.close()


def test_what_is_looked_at_does_not_grow_with_the_ring(lib: ctypes.CDLL) -> None:
    """Rows that did not change are passed over, and so few others are told."""
    for cap in (512, 262_144):
        slots = Slots(lib, cap)
        slots.write(0, cap - 8, ALL)
        seen = int(lib.ring_version(slots.ring))
        slots.write(cap - 8, 4, ALL)
        told = lib.ring_changed(slots.ring, 0, cap - 4, seen, 0, None, None)
        assert 4 <= told <= 16
        slots.close()
