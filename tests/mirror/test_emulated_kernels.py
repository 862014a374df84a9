"""The CUDA and HIP row kernels, run on the CPU from the same source: what they store and read, bit for bit, where there is no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from ggml_mirror import FeatureDtype

from . import reference
from .compiled import compiled
from .inputs import INPUTS
from .reference import Floats

EMULATED = Path(__file__).parent / "emulated"
SOURCES = Path(__file__).parents[2] / "native/src"
FORMATS = (FeatureDtype.F32, FeatureDtype.F16, FeatureDtype.BF16, FeatureDtype.Q8_0, FeatureDtype.Q4_0)
GUARD = 0xA5


class RingPlace(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row_bytes", ctypes.c_uint64),
        ("n_embd", ctypes.c_int64),
        ("taps", ctypes.c_int32),
        ("cap", ctypes.c_int64),
    ]


class Counters(ctypes.Structure):
    _fields_ = [
        ("nan", ctypes.c_uint64),
        ("inf", ctypes.c_uint64),
        ("overflow", ctypes.c_uint64),
        ("over_f16", ctypes.c_uint64),
        ("abs_max", ctypes.c_float),
        ("unused", ctypes.c_uint32),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    ggml = Path(llama_cpp.__file__).parent / "lib"
    flags = ["-O2", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DGM_EMULATED=1", f"-I{SOURCES}", f"-I{EMULATED}"]
    libraries = [f"-L{ggml}", "-lggml-base", f"-Wl,-rpath,{ggml}"]
    library = tmp_path_factory.mktemp("kernels") / "emulated_kernels.so"
    yield compiled(library, [EMULATED / "emulated_kernels.cpp"], *flags, *libraries)


@pytest.fixture(params=FORMATS, ids=str)
def dtype(request: pytest.FixtureRequest) -> FeatureDtype:
    return request.param


class Ring:
    """A ring in host memory that begins ``offset`` bytes after a multiple of 64, with guard bytes around it."""

    def __init__(
        self, kernels: ctypes.CDLL, dtype: FeatureDtype, taps: int, n_embd: int, cap: int, offset: int = 0
    ) -> None:
        self.kernels, self.dtype, self.taps, self.n_embd, self.cap = kernels, dtype, taps, n_embd, cap
        self.row_bytes = taps * reference.row_bytes(dtype, n_embd)
        self.counters = (Counters * 64)()
        self.memory = np.full(cap * self.row_bytes + 256, GUARD, np.uint8)
        self.first = -self.memory.ctypes.data % 64 + 64 + offset
        self.place = RingPlace(self.memory.ctypes.data + self.first, self.row_bytes, n_embd, taps, cap)

    def write(self, start: int, rows: Floats, tap: int = -1) -> None:
        self.kernels.emulate_capture(
            self.dtype.value.encode(), ctypes.byref(self.place), max(tap, 0), self.taps if tap < 0 else 1, ctypes.c_int64(start),
            ctypes.c_int64(len(rows)), ctypes.c_void_p(rows.ctypes.data), ctypes.c_uint64(rows.strides[0]), self.counters,
        )  # fmt: skip
        around = np.delete(self.memory, np.s_[self.first : self.first + self.cap * self.row_bytes])
        assert (around == GUARD).all(), "a store beside the ring"

    def read(self, start: int, count: int, offset: int = 0) -> Floats:
        """Into memory that begins ``offset`` values after a multiple of 64 bytes."""
        n = count * self.taps * self.n_embd
        memory = np.full(n + 64, 1234.5, np.float32)
        first = -memory.ctypes.data % 64 // 4 + 16 + offset
        self.kernels.emulate_read(
            self.dtype.value.encode(), ctypes.byref(self.place), ctypes.c_int64(start), ctypes.c_int64(count),
            ctypes.c_void_p(memory.ctypes.data + 4 * first),
        )  # fmt: skip
        assert (np.delete(memory, np.s_[first : first + n]) == 1234.5).all(), "a store beside the rows"
        return memory[first : first + n].reshape(count, -1)

    def stored(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        slots = self.memory[self.first : self.first + self.cap * self.row_bytes].reshape(self.cap, -1)
        return slots[np.arange(start, start + count) % self.cap]


def assert_holds(ring: Ring, start: int, x: Floats, **read: int) -> None:
    stored = ring.stored(start, len(x))
    np.testing.assert_array_equal(stored, reference.quantize(ring.dtype, x))
    if ring.dtype is not FeatureDtype.F32:
        want = reference.dequantize(ring.dtype, stored)
        np.testing.assert_array_equal(ring.read(start, len(x), **read).view(np.uint32), want.view(np.uint32))


def in_limit(dtype: FeatureDtype, x: Floats) -> Floats:
    limit = np.float32(dtype.limit)
    return x.clip(-limit, limit)


@pytest.mark.parametrize("name", INPUTS)
def test_bytes_are_those_of_the_reference(kernels: ctypes.CDLL, dtype: FeatureDtype, name: str) -> None:
    """To the bit, ties included; but for the levels of blocks whose scale is 0."""
    x = in_limit(dtype, INPUTS[name](6, 4 * 64))
    ring = Ring(kernels, dtype, taps=4, n_embd=64, cap=9)
    ring.write(5 * 9 + 6, x)
    if name in ("subnormals", "underflow") and dtype.block_size > 1:
        reference.assert_same_bytes(dtype, x, ring.stored(51, 6))
        return
    assert_holds(ring, 51, x)


@pytest.mark.parametrize(("taps", "n_embd"), [(1, 32), (3, 576), (5, 288), (2, 1024), (64, 32)])
def test_every_width_by_rows_and_by_taps(kernels: ctypes.CDLL, dtype: FeatureDtype, taps: int, n_embd: int) -> None:
    """Slices of whole pieces (512 values) and of others."""
    x = np.random.default_rng(n_embd).standard_normal((7, taps * n_embd), np.float32)
    whole, by_tap = (Ring(kernels, dtype, taps, n_embd, cap=8) for _ in range(2))
    whole.write(4, x)
    for tap in range(taps):
        by_tap.write(4, x[:, tap * n_embd : (tap + 1) * n_embd], tap)
    assert_holds(whole, 4, x)
    assert_holds(by_tap, 4, x)


@pytest.mark.parametrize("n_embd", [1, 3, 33, 130, 257])
@pytest.mark.parametrize("plain", FORMATS[:3], ids=str)
def test_odd_widths_of_plain_formats(kernels: ctypes.CDLL, plain: FeatureDtype, n_embd: int) -> None:
    x = np.random.default_rng(n_embd).standard_normal((5, 3 * n_embd), np.float32)
    ring = Ring(kernels, plain, 3, n_embd, cap=6)
    ring.write(4, x)
    assert_holds(ring, 4, x)


@pytest.mark.parametrize("offset", [4, 6, 8])
def test_memory_at_any_address(kernels: ctypes.CDLL, dtype: FeatureDtype, offset: int) -> None:
    """Ring, source rows and rows read begin where wide accesses would be misaligned."""
    wide = np.random.default_rng(offset).standard_normal((4, 2 * 512 + 3), np.float32)
    ring = Ring(kernels, dtype, 2, 512, cap=5, offset=offset & 4 if dtype is FeatureDtype.F32 else offset)
    ring.write(3, wide[:, 1:-2])
    assert_holds(ring, 3, wide[:, 1:-2], offset=offset // 2)


def test_values_that_cannot_be_held_are_replaced_and_counted(kernels: ctypes.CDLL, dtype: FeatureDtype) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, 3 * 288), np.float32)
    special = [np.nan, -np.inf, np.inf, 1e30, -65504, np.nextafter(np.float32(65504), np.float32(1e9)), 9e6, -7e4]
    x.reshape(-1)[rng.choice(x.size, 400, replace=False)] = np.resize(np.array(special, np.float32), 400)
    x[2, :32] = np.nan
    ring = Ring(kernels, dtype, 3, 288, cap=7)
    ring.write(5, x)
    assert_holds(ring, 5, in_limit(dtype, np.where(np.isnan(x), np.float32(0), x)))
    for tap in range(3):
        size = np.abs(x[:, tap * 288 : (tap + 1) * 288].astype(np.float64))
        finite, c = np.isfinite(size), ring.counters[tap]
        assert c.nan == np.isnan(size).sum() > 0
        assert c.inf == np.isinf(size).sum() > 0
        assert c.overflow == (finite & (size > dtype.limit)).sum()
        assert c.over_f16 == (finite & (size > 65504)).sum() > 0
        assert c.abs_max == size[finite].max()


def test_counts_add_up_over_launches(kernels: ctypes.CDLL) -> None:
    ring = Ring(kernels, FeatureDtype.F16, 2, 64, cap=4)
    for n in (1, 2, 3):
        ring.write(0, np.full((n, 64), np.inf, np.float32), tap=1)
    ring.write(0, np.full((1, 64), -3.5, np.float32), tap=1)
    ring.write(0, np.full((1, 64), 2.5, np.float32), tap=1)
    assert (ring.counters[1].inf, ring.counters[1].abs_max) == (6 * 64, 3.5)
    assert (ring.counters[0].inf, ring.counters[0].abs_max) == (0, 0)
