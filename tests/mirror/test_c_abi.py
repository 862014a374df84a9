"""The C functions called directly: what Python would have refused before is refused here too, never crashed on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ggml_mirror import FeatureMirror
from ggml_mirror._native import check, ffi, lib, require_own_header
from ggml_mirror.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GgmlMirrorError,
    ShapeError,
    StaleRowError,
    VersionMismatchError,
)

from .places import Place
from .process import assert_survives
from .unchanged import unchanged

TAPS, N_EMBD, CAP = 2, 64, 6


@pytest.fixture
def m(place: Place) -> Iterator[FeatureMirror]:
    """Whole rows at 2..7, then tap 0 at 8."""
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="q8_0") as mirror:
        mirror.write_rows(start=2, rows=np.random.default_rng(1).standard_normal((6, TAPS * N_EMBD)).astype(np.float32))
        mirror.write(tap=0, start=8, rows=np.ones((1, N_EMBD), np.float32))
        yield mirror


def load(m: FeatureMirror, positions: list[int], masks: list[int], count: int | None = None) -> None:
    rows = np.ones((max(len(positions), 1), m.row_nbytes), np.uint8)
    check(
        lib.gm_mirror_load(
            m._open(),
            len(positions) if count is None else count,
            ffi.new("int64_t[]", positions),
            ffi.new("uint64_t[]", masks),
            ffi.cast("uint8_t *", rows.ctypes.data),
        )
    )


@pytest.mark.parametrize(
    ("positions", "masks", "why"),
    [
        ([1, 7], [3, 3], "position 7 and an earlier one share a slot"),
        ([4, 4], [3, 3], "position 4 and an earlier one share a slot"),
        ([1, -1], [3, 3], "row 1 has position -1"),
        ([1, 2**62], [3, 3], f"row 1 has position {2**62}"),
        ([1, 2], [3, 0], "position 2 has tap mask 0"),
        ([1, 2], [3, 4], "position 2 has tap mask 4; this mirror has 2 taps"),
        ([1, 2], [2**64 - 1, 3], "position 1 has tap mask"),
        (list(range(7)), [3] * 7, "7 rows do not fit into 6 slots"),
    ],
)
def test_rows_that_cannot_be_loaded(m: FeatureMirror, positions: list[int], masks: list[int], why: str) -> None:
    with unchanged(m), pytest.raises(ArgumentError, match=why):
        load(m, positions, masks)


def test_loading_a_negative_count(m: FeatureMirror) -> None:
    with unchanged(m), pytest.raises(ArgumentError, match="count is -1"):
        load(m, [1], [3], count=-1)


def test_loading_in_any_order(m: FeatureMirror) -> None:
    load(m, [9, 1, 4], [3, 1, 3])
    assert m.snapshot().positions.tolist() == [1, 4, 9]
    assert m.snapshot().tap_masks.tolist() == [1, 3, 3]
    load(m, [], [])
    assert len(m.snapshot().positions) == 0


@pytest.mark.parametrize("position", [1, 9, -1, 2**62])
def test_saving_what_is_not_there(m: FeatureMirror, position: int) -> None:
    rows = ffi.new("uint8_t[]", 2 * m.row_nbytes)
    with unchanged(m), pytest.raises(StaleRowError) as caught:
        check(lib.gm_mirror_save(m._open(), 2, ffi.new("int64_t[]", [3, position]), rows))
    assert caught.value.position == position


def test_live_fills_no_more_than_it_is_given(m: FeatureMirror) -> None:
    positions, masks, count = ffi.new("int64_t[]", [-7] * 8), ffi.new("uint64_t[]", [77] * 8), ffi.new("int64_t *")
    check(lib.gm_mirror_live(m._open(), False, 3, positions, masks, count))
    assert count[0] == 6
    assert list(positions) == [3, 4, 5, -7, -7, -7, -7, -7] and list(masks) == [3, 3, 3, 77, 77, 77, 77, 77]
    check(lib.gm_mirror_live(m._open(), True, 8, positions, ffi.NULL, count))
    assert count[0] == 5 and list(positions[0:5]) == [3, 4, 5, 6, 7]


def _params() -> Any:
    p = ffi.new("gm_mirror_params *")
    p.taps, p.n_embd, p.cap = 1, 32, 4
    return p


#: Each call has one NULL where data is needed.
NULLS: dict[str, Callable[[Any], int]] = {
    "new without params": lambda h: lib.gm_mirror_new(ffi.NULL, ffi.new("gm_mirror **")),
    "new without out": lambda h: lib.gm_mirror_new(_params(), ffi.NULL),
    "size_of without params": lambda h: lib.gm_mirror_size_of(ffi.NULL, ffi.new("gm_mirror_size *")),
    "size_of without size": lambda h: lib.gm_mirror_size_of(_params(), ffi.NULL),
    "write without mirror": lambda h: lib.gm_mirror_write(ffi.NULL, 0, 0, 1, ffi.new("float[64]"), 256),
    "write without rows": lambda h: lib.gm_mirror_write(h, 0, 0, 1, ffi.NULL, 256),
    "write_tensor without mirror": lambda h: lib.gm_mirror_write_tensor(ffi.NULL, 0, 0, ffi.NULL),
    "write_tensor without tensor": lambda h: lib.gm_mirror_write_tensor(h, 0, 0, ffi.NULL),
    "write_taps without mirror": lambda h: lib.gm_mirror_write_taps(ffi.NULL, 0, ffi.NULL),
    "write_taps without tensors": lambda h: lib.gm_mirror_write_taps(h, 0, ffi.NULL),
    "write_taps without a tensor": lambda h: lib.gm_mirror_write_taps(h, 0, ffi.new("struct ggml_tensor *[2]")),
    "read without mirror": lambda h: lib.gm_mirror_read(ffi.NULL, 3, 1, ffi.new("float[128]")),
    "read without rows": lambda h: lib.gm_mirror_read(h, 3, 1, ffi.NULL),
    "read_tensor without tensor": lambda h: lib.gm_mirror_read_tensor(h, 3, 1, ffi.NULL),
    "truncate without mirror": lambda h: lib.gm_mirror_truncate(ffi.NULL, 0),
    "clear without mirror": lambda h: lib.gm_mirror_clear(ffi.NULL),
    "live without count": lambda h: lib.gm_mirror_live(h, True, 0, ffi.NULL, ffi.NULL, ffi.NULL),
    "save without positions": lambda h: lib.gm_mirror_save(h, 1, ffi.NULL, ffi.new("uint8_t[200]")),
    "save without rows": lambda h: lib.gm_mirror_save(h, 1, ffi.new("int64_t[]", [3]), ffi.NULL),
    "load without positions": lambda h: lib.gm_mirror_load(
        h, 1, ffi.NULL, ffi.new("uint64_t[]", [3]), ffi.new("uint8_t[200]")
    ),
    "load without masks": lambda h: lib.gm_mirror_load(
        h, 1, ffi.new("int64_t[]", [3]), ffi.NULL, ffi.new("uint8_t[200]")
    ),
    "load without rows": lambda h: lib.gm_mirror_load(
        h, 1, ffi.new("int64_t[]", [3]), ffi.new("uint64_t[]", [3]), ffi.NULL
    ),
    "tap_stats without stats": lambda h: lib.gm_mirror_tap_stats(h, 0, ffi.NULL),
    "get_bus without bytes": lambda h: lib.gm_mirror_get_bus(h, ffi.NULL),
    "get_times without times": lambda h: lib.gm_mirror_get_times(h, ffi.NULL),
    "get_transfers without transfers": lambda h: lib.gm_mirror_get_transfers(h, ffi.NULL),
    "host_rows_new without mirror": lambda h: lib.gm_host_rows_new(
        ffi.NULL, 64, ffi.new("gm_host_rows **"), ffi.new("uint8_t **")
    ),
    "host_rows_new without rows": lambda h: lib.gm_host_rows_new(h, 64, ffi.NULL, ffi.new("uint8_t **")),
    "host_rows_new without data": lambda h: lib.gm_host_rows_new(h, 64, ffi.new("gm_host_rows **"), ffi.NULL),
    "reset_stats without mirror": lambda h: lib.gm_mirror_reset_stats(ffi.NULL),
    "device_get without info": lambda h: lib.gm_device_get(0, ffi.NULL),
    "device_find without name": lambda h: lib.gm_device_find(ffi.NULL, ffi.new("int32_t *")),
    "device_find without index": lambda h: lib.gm_device_find(b"cpu", ffi.NULL),
    "device_converts without converts": lambda h: lib.gm_device_converts(0, 8, ffi.NULL),
    "type_limit without limit": lambda h: lib.gm_type_limit(8, ffi.NULL),
    "type_row_size without bytes": lambda h: lib.gm_type_row_size(8, 32, ffi.NULL),
    "type_block_size without size": lambda h: lib.gm_type_block_size(8, ffi.NULL),
}


@pytest.mark.parametrize("call", NULLS)
def test_null_where_data_is_needed(m: FeatureMirror, call: str) -> None:
    with unchanged(m), pytest.raises(ArgumentError, match="must not be NULL"):
        check(NULLS[call](m._open()))


def test_null_where_it_may_be(m: FeatureMirror) -> None:
    lib.gm_mirror_free(ffi.NULL)
    assert lib.gm_type_from_name(ffi.NULL) == -1
    handle = m._open()
    before = m.snapshot().rows
    for call in (
        lambda: lib.gm_mirror_write(handle, -1, 3, 0, ffi.NULL, 0),
        lambda: lib.gm_mirror_read(handle, 3, 0, ffi.NULL),
        lambda: lib.gm_mirror_save(handle, 0, ffi.NULL, ffi.NULL),
        lambda: lib.gm_mirror_live(handle, True, 0, ffi.NULL, ffi.NULL, ffi.new("int64_t *")),
    ):
        check(call())
    assert (m.snapshot().rows == before).all()


@pytest.mark.parametrize("number", [-1, 10_000, 2**31 - 1, -(2**31)])
def test_numbers_of_no_type(number: int) -> None:
    with pytest.raises(DtypeError, match=f"{number} is no ggml type"):
        check(lib.gm_type_limit(number, ffi.new("float *")))
    p = _params()
    p.type = number
    with pytest.raises(DtypeError):
        check(lib.gm_mirror_new(p, ffi.new("gm_mirror **")))


def test_every_type_of_ggml_has_a_limit_or_is_refused() -> None:
    """In a process of its own: ggml aborts on what it does not expect."""
    assert_survives("""
from ggml_mirror._native import check, ffi, lib, require_own_header
from ggml_mirror.errors import DtypeError
for number in range(64):
    limit = ffi.new("float *")
    try:
        check(lib.gm_type_limit(number, limit))
        assert limit[0] > 0
    except DtypeError as error:
        assert str(number) in str(error)
""")


def test_type_that_cannot_be_converted() -> None:
    with pytest.raises(DtypeError, match=r"i32 .* cannot be converted"):
        check(lib.gm_type_limit(lib.gm_type_from_name(b"i32"), ffi.new("float *")))


@pytest.mark.parametrize("index", [-1, 1000, 2**31 - 1])
def test_devices_that_are_not_there(index: int) -> None:
    p = _params()
    p.device = index
    for call in (
        lambda: lib.gm_device_get(index, ffi.new("gm_device_info *")),
        lambda: lib.gm_device_converts(index, 8, ffi.new("bool *")),
        lambda: lib.gm_mirror_new(p, ffi.new("gm_mirror **")),
        lambda: lib.gm_mirror_size_of(p, ffi.new("gm_mirror_size *")),
    ):
        with pytest.raises(DeviceError, match=f"no device {index}"):
            check(call())


def test_widths_that_no_device_is_asked_about() -> None:
    capture, read = ffi.new("bool *"), ffi.new("bool *")
    for n_embd in (-32, 33, 2**62):
        with pytest.raises(ShapeError):
            check(lib.gm_device_supports(0, 8, n_embd, n_embd, capture, read))


def test_failure_leaves_its_details_until_the_next_call(m: FeatureMirror) -> None:
    status = lib.gm_mirror_read(m._open(), 7, 2, ffi.new("float[256]"))
    info = lib.gm_last_error()
    assert status == lib.GM_ERR_STALE == info.status
    assert (info.position, info.tap, info.bytes_needed, info.bytes_free) == (8, -1, 0, 0)
    with pytest.raises(GgmlMirrorError) as caught:
        check(status)
    assert ffi.string(info.message).decode() == str(caught.value)


def test_a_library_of_other_sources_is_refused() -> None:
    """A checkout that moved on, with the library of before: its structs would be read wrongly."""
    header = b"struct gm_mirror;"
    for good in (hashlib.sha256(header).hexdigest(), ""):
        require_own_header(good, header)
    for bad in (hashlib.sha256(b"another").hexdigest(), None):
        with pytest.raises(VersionMismatchError, match="make env"):
            require_own_header(bad, header)
