"""Snapshots of a mirror on a device with pinned host memory. Run by test_pinned.py in a process of its own: it registers a device.

The device is a copy of ggml's description of the CPU under another name, whose memory says that it is not the host's, and which has a host
buffer type. Both kinds of memory say what is done with them: what was pinned, and each copy between ring and host. The layouts are those of
ggml-backend-impl.h.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resident import growth

from ggml_mirror import FeatureMirror, Snapshot, find_device
from ggml_mirror.errors import MirrorMemoryError, SnapshotMismatchError

from .ggml_tensors import Tensors, _declare, _dev_buffer_type, _dev_by_name
from .places import Place
from .test_pinned import round_trips
from .unchanged import unchanged

_POINTER = ctypes.sizeof(c_void_p)
_DEVICE_POINTERS = 15 + 2  # struct ggml_backend_device: functions, registry, context
_GET_NAME, _GET_BUFFER_TYPE, _GET_HOST_BUFFER_TYPE = 0, 6, 7
_TYPE_POINTERS = 6 + 2  # struct ggml_backend_buffer_type: functions, device, context
_ALLOC_BUFFER, _IS_HOST, _DEVICE_OF_TYPE = 1, 5, 6
_SET_TENSOR, _GET_TENSOR, _FREE_BUFFER = 4, 5, 0  # functions at the head of struct ggml_backend_buffer

_Alloc = CFUNCTYPE(c_void_p, c_void_p, c_size_t)
_Copy = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_size_t, c_size_t)
_Free = CFUNCTYPE(None, c_void_p)
_register = _declare(ctypes.CDLL("libggml.so.0"), "ggml_backend_device_register", None, c_void_p)
_kept: list[object] = []


def _copy(address: int, pointers: int) -> Any:
    copy = (c_void_p * pointers).from_buffer_copy(ctypes.string_at(address, pointers * _POINTER))
    _kept.append(copy)
    return copy


def _function(kind: Any, body: Callable[..., Any]) -> int:
    _kept.append(function := kind(body))
    return ctypes.cast(function, c_void_p).value


class Device:
    """What has been done with the memory of "PINNED"."""

    def __init__(self) -> None:
        self.copies: list[tuple[str, int, int, int]] = []  # direction, host address, offset in the ring, bytes
        self.pinned: dict[int, int] = {}  # buffer -> bytes
        self.allocations = 0
        self.refuse = ""  # "null", "other": what ggml does when memory cannot be pinned
        self.own: dict[int, int] = {}  # buffer -> bytes of the device's own memory
        self.full = False  # it has no more of it
        cpu, self._cpu_type = _dev_by_name(b"CPU"), _dev_buffer_type(_dev_by_name(b"CPU"))
        self._alloc = _Alloc(_copy(self._cpu_type, _TYPE_POINTERS)[_ALLOC_BUFFER])
        device = _copy(cpu, _DEVICE_POINTERS)
        self.address = ctypes.addressof(device)
        name = ctypes.create_string_buffer(b"PINNED")
        _kept.append(name)
        ring, host = (_copy(self._cpu_type, _TYPE_POINTERS) for _ in range(2))
        ring[_IS_HOST] = None
        ring[_DEVICE_OF_TYPE] = host[_DEVICE_OF_TYPE] = self.address
        ring[_ALLOC_BUFFER] = _function(_Alloc, self._alloc_ring)
        host[_ALLOC_BUFFER] = _function(_Alloc, self._pin)
        get = CFUNCTYPE(c_void_p, c_void_p)
        self.memory = ctypes.addressof(ring)
        device[_GET_NAME] = _function(get, lambda _: ctypes.addressof(name))
        device[_GET_BUFFER_TYPE] = _function(get, lambda _: ctypes.addressof(ring))
        device[_GET_HOST_BUFFER_TYPE] = _function(get, lambda _: ctypes.addressof(host))
        _register(self.address)

    def _alloc_ring(self, kind: int, size: int) -> int | None:
        if self.full:
            return None
        buffer = self._alloc(kind, size)
        functions = (c_void_p * 12).from_address(buffer)
        self._follow(buffer, size, self.own)
        set_tensor, get_tensor = _Copy(functions[_SET_TENSOR]), _Copy(functions[_GET_TENSOR])

        def put(b: int, tensor: int, data: int, offset: int, n: int) -> None:
            self.copies.append(("in", data, offset, n))
            set_tensor(b, tensor, data, offset, n)

        def get(b: int, tensor: int, data: int, offset: int, n: int) -> None:
            self.copies.append(("out", data, offset, n))
            get_tensor(b, tensor, data, offset, n)

        functions[_SET_TENSOR], functions[_GET_TENSOR] = _function(_Copy, put), _function(_Copy, get)
        return buffer

    def _pin(self, kind: int, size: int) -> int | None:
        if self.refuse:
            return None if self.refuse == "null" else self._alloc(self._cpu_type, size)
        buffer = self._alloc(kind, size)
        self._follow(buffer, size, self.pinned)
        self.allocations += 1
        return buffer

    def _follow(self, buffer: int, size: int, held: dict[int, int]) -> None:
        """Until it is freed."""
        functions = (c_void_p * 12).from_address(buffer)
        free = _Free(functions[_FREE_BUFFER])

        def freed(b: int) -> None:
            del held[b]
            free(b)

        functions[_FREE_BUFFER] = _function(_Free, freed)
        held[buffer] = size


DEVICE = Device()
TAPS, N_EMBD, CAP = 2, 1024, 40
WIDTH = TAPS * N_EMBD


@pytest.fixture
def device() -> Iterator[Device]:
    gc.collect()
    assert DEVICE.pinned == {}
    DEVICE.copies.clear()
    DEVICE.allocations, DEVICE.refuse, DEVICE.full = 0, "", False
    yield DEVICE
    gc.collect()
    assert DEVICE.pinned == {}, "something stays pinned once mirrors and snapshots are gone"


@pytest.fixture(params=["f32", "q8_0"])
def m(request: pytest.FixtureRequest, device: Device) -> Iterator[FeatureMirror]:
    with FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=request.param, device="pinned", n_threads=2) as mirror:
        yield mirror


def twin_of(m: FeatureMirror, device: str = "pinned") -> FeatureMirror:
    return FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=m.dtype, device=device, n_threads=1)


def fill(m: FeatureMirror, start: int = 0, count: int = CAP) -> None:
    rows = np.random.default_rng(start).integers(-127, 128, (count, WIDTH)).astype(np.float32)
    m.write_rows(start=start, rows=rows)


def ring_copies(device: Device, m: FeatureMirror, direction: str) -> list[tuple[int, int]]:
    """(offset, bytes) of those of whole rows; conversions move others."""
    row = m.row_nbytes
    return [(at, n) for way, _, at, n in device.copies if way == direction and n % row == at % row == 0]


@pytest.mark.parametrize(("start", "count", "n_copies"), [(0, CAP, 1), (7, 20, 1), (CAP - 1, 2, 2), (25, CAP, 2)])
def test_a_range_takes_one_copy_or_two_where_it_wraps(
    device: Device, m: FeatureMirror, start: int, count: int, n_copies: int
) -> None:
    with twin_of(m, "cpu") as plain, twin_of(m) as other:
        for mirror in (m, plain):
            fill(mirror, start, count)
        device.copies.clear()
        snapshot = m.snapshot()
        assert len(ring_copies(device, m, "out")) == len(device.copies) == n_copies
        np.testing.assert_array_equal(snapshot.rows, plain.snapshot().rows)
        device.copies.clear()
        other.restore(snapshot)
        assert len(ring_copies(device, m, "in")) == len(device.copies) == n_copies
        np.testing.assert_array_equal(other.snapshot().rows, plain.snapshot().rows)
        np.testing.assert_array_equal(other.read(start=start, count=count), plain.read(start=start, count=count))
        sent, taken = m.transfers(), other.transfers()
        assert (sent.save_calls, sent.save_copies, sent.pinned_copies) == (1, n_copies, n_copies)
        assert (taken.load_calls, taken.load_copies, taken.load_bytes) == (1, n_copies, snapshot.rows.nbytes)
        m.reset_stats()
        assert (m.transfers().save_calls, m.transfers().save_copies, m.transfers().save_bytes) == (0, 0, 0)


def test_the_array_is_the_pinned_memory_and_is_used_again(device: Device, m: FeatureMirror) -> None:
    fill(m)
    device.copies.clear()
    for _ in range(5):
        snapshot = m.snapshot()
        assert device.copies[-1][1] == snapshot.rows.ctypes.data
        del snapshot
    assert device.allocations == len(device.pinned) == 1
    assert m.transfers().pinned_bytes == sum(device.pinned.values()) >= m.nbytes
    m.truncate(CAP - 3)  # somewhat fewer rows fit as well
    m.snapshot()
    assert device.allocations == 1


def test_an_array_outlives_its_mirror_and_so_does_a_part_of_it(device: Device, m: FeatureMirror) -> None:
    fill(m)
    snapshot = m.snapshot()
    want = snapshot.rows.copy()
    m.close()
    assert len(device.pinned) == 1
    part = snapshot.rows[3:5]
    del snapshot
    gc.collect()
    np.testing.assert_array_equal(part, want[3:5])
    assert len(device.pinned) == 1
    del part
    gc.collect()
    assert device.pinned == {}


def test_arrays_take_half_and_leave_the_rest_to_staging(device: Device, m: FeatureMirror) -> None:
    fill(m)
    kept = [m.snapshot() for _ in range(4)]
    assert sum(device.pinned.values()) <= m.size.pinned
    fill(m, CAP, CAP)
    with twin_of(m) as other:
        for i, snapshot in enumerate(kept):
            m.restore(snapshot)
            np.testing.assert_array_equal(m.snapshot().rows, kept[0].rows, err_msg=str(i))
            other.restore(snapshot)
    assert sum(device.pinned.values()) <= m.size.pinned
    moved = m.transfers()
    assert moved.pinned_copies == moved.save_copies + moved.load_copies, "not all of it went through pinned memory"


def test_a_snapshot_of_a_file_goes_through_staging(device: Device, m: FeatureMirror, tmp_path: Path) -> None:
    fill(m, 25)
    m.snapshot().save(tmp_path / "s")
    loaded = Snapshot.load(tmp_path / "s")
    device.copies.clear()
    m.restore(loaded)
    assert len(device.copies) == 2 and all(
        not 0 <= address - loaded.rows.ctypes.data < loaded.rows.nbytes for _, address, _, _ in device.copies
    )
    np.testing.assert_array_equal(m.snapshot().rows, loaded.rows)
    assert m.transfers().pinned_copies == m.transfers().save_copies + m.transfers().load_copies


@pytest.mark.parametrize("how", ["null", "other"])
def test_without_pinned_memory_any_other_will_do(device: Device, m: FeatureMirror, how: str) -> None:
    device.refuse = how
    fill(m, 25)
    snapshot = m.snapshot()
    m.clear()
    m.restore(snapshot)
    np.testing.assert_array_equal(m.snapshot().rows, snapshot.rows)
    moved = m.transfers()
    assert (moved.pinned_copies, moved.pinned_bytes, device.pinned) == (0, 0, {})
    assert "did not pin" in moved.unpinned
    device.refuse = ""
    m.snapshot()
    assert m.transfers().pinned_copies == 2 and m.transfers().unpinned == ""


def test_the_variable_turns_it_off(device: Device, m: FeatureMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_MIRROR_PINNED_MIB", "0")
    fill(m)
    m.restore(m.snapshot())
    assert device.allocations == 0 and m.transfers().pinned_copies == 0
    assert "GGML_MIRROR_PINNED_MIB" in m.transfers().unpinned
    with twin_of(m) as other:
        assert other.size.pinned == 0


def test_a_refused_restore_changes_nothing(device: Device, m: FeatureMirror) -> None:
    fill(m)
    with FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=CAP + 1, dtype=m.dtype, device="pinned") as other:
        fill(other, 3)
        with unchanged(m), pytest.raises(SnapshotMismatchError):
            m.restore(other.snapshot())


def test_threads_take_and_drop_snapshots_while_others_write(device: Device, m: FeatureMirror) -> None:
    fill(m)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with twin_of(m) as other:
                for i in range(12):
                    snapshot = m.snapshot()
                    want = snapshot.rows.copy()
                    fill(m, 7 * i + seed)
                    other.restore(snapshot)
                    np.testing.assert_array_equal(other.snapshot().rows, want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures[0]
    assert sum(device.pinned.values()) <= m.size.pinned  # the twins are gone


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_what_a_gpu_is_tested_for(device: Device, dtype: str) -> None:
    round_trips(Place("pinned", ggml_ops=False, is_host=False), dtype, cap=50)


def test_mirrors_and_snapshots_that_come_and_go_leave_nothing(device: Device) -> None:
    """Rings and snapshots of 320 KiB: 200 leaked ones would be 64 MiB."""

    def cycle(i: int) -> None:
        with FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32", device="pinned", n_threads=1) as mirror:
            mirror.write_rows(start=i, rows=rows)
            kept = [mirror.snapshot() for _ in range(2)]
            mirror.restore(kept[1])
            mirror.close()
            assert kept[0].rows[-1].any()

    rows = np.ones((CAP, WIDTH), np.float32)
    grown = growth(cycle, 200, warm_up=50)
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which keeps what is freed in quarantine
        assert grown < 8 << 20


def test_the_size_is_known_beforehand(device: Device, m: FeatureMirror) -> None:
    assert m.nbytes < m.size.pinned <= 3 * m.nbytes
    assert find_device("pinned").is_host is False


def test_staging_is_taken_when_rows_come_from_other_memory(device: Device) -> None:
    """Tensors on the device need none. What is taken in all is no more than was announced, and is given back."""
    gc.collect()
    x = np.random.default_rng(0).standard_normal((CAP, WIDTH), np.float32)
    with Tensors() as tensors:
        source, rows = tensors.of(x, device.memory), CAP * WIDTH * 4
        before = sum(device.own.values())
        with FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f16", device="pinned", n_threads=1) as m:
            assert sum(device.own.values()) - before < m.size.ring + 2048
            for _ in range(2):
                m.write_tensor(source, start=3)
                m.read_tensor(source, start=3, count=CAP)
                m.restore(m.snapshot())
            without = sum(device.own.values())
            device.full = True
            for use in (lambda: m.read(start=3, count=CAP), lambda: m.write_rows(start=9, rows=x)):
                with pytest.raises(MirrorMemoryError, match=f"{rows} bytes of staging") as refused:
                    use()
                assert refused.value.bytes_needed == rows and refused.value.bytes_free > 0
            assert m.positions.tolist() == [], "nobody knows what was stored"
            device.full = False
            m.write_rows(start=9, rows=x)
            np.testing.assert_allclose(m.read(start=9, count=CAP), x, rtol=2**-10, atol=1e-6)
            assert sum(device.own.values()) - without == rows
            assert sum(device.own.values()) - before <= m.size.ring + m.size.staging
        assert sum(device.own.values()) == before
