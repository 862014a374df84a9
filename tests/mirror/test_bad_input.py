"""Numbers and names that are out of range: the exact typed error, naming them, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ggml_mirror import FeatureDtype, FeatureMirror, devices, row_bytes
from ggml_mirror.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GgmlMirrorError,
    MirrorMemoryError,
    ShapeError,
    StaleRowError,
)

from . import reference
from .places import CPU_LOOPS, Place
from .unchanged import unchanged

TAPS, N_EMBD, CAP = 2, 64, 8
GOOD: dict[str, Any] = {"taps": TAPS, "n_embd": N_EMBD, "cap": CAP, "dtype": "q8_0"}

NO_INTEGERS = [1.0, 1.5, "1", None, np.float32(1), np.bool_(True), [1], float("nan")]
BEYOND_64_BITS = [2**63, -(2**63) - 1, 2**70, -(2**70)]

BLOCKED = [d for d in FeatureDtype if d.block_size > 1]


@pytest.fixture
def m(place: Place) -> Iterator[FeatureMirror]:
    """Whole rows at 3..8, one tap at 9."""
    with place.mirror(**GOOD) as mirror:
        mirror.write_rows(start=3, rows=np.random.default_rng(1).standard_normal((6, TAPS * N_EMBD)).astype(np.float32))
        mirror.write(tap=1, start=9, rows=np.ones((1, N_EMBD), np.float32))
        yield mirror


def number(value: Any) -> str:
    return str(value) if isinstance(value, int) else repr(value)


# -------------------------------------------------------------------------------------------- making one


@pytest.mark.parametrize("value", [0, -1, 65, 2**31 - 1, -(2**31), 2**31, *BEYOND_64_BITS])
def test_taps_out_of_range(place: Place, value: int) -> None:
    with pytest.raises(ArgumentError, match=rf"taps is {value}\b"):
        place.mirror(**{**GOOD, "taps": value})


@pytest.mark.parametrize("value", [0, -1, -64, 2**40 + 64, 2**62, -(2**63)])
def test_n_embd_out_of_range(place: Place, value: int) -> None:
    with pytest.raises(ShapeError, match=rf"(n_embd is|width) {value}\b"):
        place.mirror(**{**GOOD, "n_embd": value})


@pytest.mark.parametrize("dtype", BLOCKED, ids=str)
@pytest.mark.parametrize("value", [1, 31, 33, 48, 5121])
def test_n_embd_that_is_no_multiple_of_the_block(place: Place, dtype: FeatureDtype, value: int) -> None:
    """Each tap must be whole blocks: a row of 2 x 48 would be, its taps are not."""
    with pytest.raises(
        ShapeError, match=rf"width {value} is not a multiple of 32, the block size of {dtype}; use f32, f16 or bf16"
    ):
        place.mirror(**{**GOOD, "dtype": dtype, "n_embd": value})


@pytest.mark.parametrize("value", [2**40, 2**62, 2**63, 2**70])
def test_cap_beyond_any_memory_says_what_fits(place: Place, value: int) -> None:
    with pytest.raises(MirrorMemoryError, match=rf"\b{value} rows\b") as caught:
        place.mirror(**{**GOOD, "cap": value})
    error = caught.value
    row = reference.row_bytes(FeatureDtype.parse(GOOD["dtype"]), GOOD["taps"] * GOOD["n_embd"])
    assert error.bytes_needed == value * row > error.bytes_free > 0
    assert 0 < error.max_cap < 2**31 and f"cap {error.max_cap}" in str(error) and error.fitting_dtypes == ()


@pytest.mark.parametrize("value", [0, -1, -(2**63), -(2**63) - 1, -(2**70)])
def test_cap_out_of_range(place: Place, value: int) -> None:
    with pytest.raises(ArgumentError, match=rf"cap is {value}\b") as caught:
        place.mirror(**{**GOOD, "cap": value})
    assert "1 to 2147483647" in str(caught.value) or "64 bits" in str(caught.value)


def test_ring_beyond_any_memory(place: Place) -> None:
    with pytest.raises(ArgumentError, match=f"2147483647 slots of {64 * 4 * 2**40} bytes"):
        place.mirror(taps=64, n_embd=2**40, cap=2**31 - 1, dtype="f32")


@pytest.mark.parametrize("name", ["taps", "n_embd", "cap", "n_threads"])
@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer(place: Place, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be an integer, not "):
        place.mirror(**{**GOOD, name: value})


@pytest.mark.parametrize("name", ["n_embd", "n_threads"])
@pytest.mark.parametrize("value", BEYOND_64_BITS)
def test_integers_beyond_64_bits(place: Place, name: str, value: int) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is {value}, beyond"):
        place.mirror(**{**GOOD, name: value})


@pytest.mark.parametrize("value", [-1, -(2**31)])
def test_negative_threads(value: int) -> None:
    with pytest.raises(ArgumentError, match=f"n_threads is {value}"):
        CPU_LOOPS.mirror(**{**GOOD, "n_threads": value})


@pytest.mark.parametrize(
    "value", ["q6_k", "Q2_K", "", " ", "int8", "f32,f16", "q8_0\0", b"q8_0", 0, 8, object, ["f32"]], ids=repr
)
def test_unknown_dtype(place: Place, value: Any) -> None:
    with pytest.raises(DtypeError, match="unknown feature dtype") as caught:
        place.mirror(**{**GOOD, "dtype": value})
    assert repr(value) in str(caught.value)
    assert all(d.value in str(caught.value) for d in FeatureDtype)


@pytest.mark.parametrize("value", ["cuda99", "", "gpu", "cpu0", None, 0, b"cpu", "x" * 1000], ids=repr)
def test_unknown_device(value: Any) -> None:
    with pytest.raises(DeviceError) as caught:
        FeatureMirror(**GOOD, device=value)
    if isinstance(value, str):
        assert value[:60] in str(caught.value) and all(d.name in str(caught.value) for d in devices())


@pytest.mark.parametrize("value", ["cpu\0x", "cpu\udc80"], ids=ascii)
def test_device_name_that_is_no_c_text(value: str) -> None:
    with pytest.raises(DeviceError):
        FeatureMirror(**GOOD, device=value)


@pytest.mark.parametrize("value", [np.int64(2), np.uint8(2), np.int32(2)], ids=lambda v: type(v).__name__)
def test_numpy_integers_are_integers(place: Place, value: Any) -> None:
    with place.mirror(taps=value, n_embd=value * 32, cap=value, dtype="q8_0") as m:
        m.write(tap=value - 1, start=value, rows=np.ones((1, 64), np.float32))
        m.write_rows(start=value, rows=np.ones((1, 128), np.float32))
        assert m.read(start=value, count=value - 1).shape == (1, 128)
        m.truncate(value)
        assert (m.taps, m.n_embd, m.cap, len(m)) == (2, 64, 2, 0)


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("value", [-1, TAPS, 64, 2**31, *BEYOND_64_BITS])
def test_writing_a_tap_out_of_range(m: FeatureMirror, value: int) -> None:
    rows = np.ones((1, N_EMBD), np.float32)
    with (
        unchanged(m),
        pytest.raises(ArgumentError, match=f"tap {value} is out of range; this mirror has taps 0 to {TAPS - 1}"),
    ):
        m.write(tap=value, start=0, rows=rows)


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_writing_a_tap_that_is_no_integer(m: FeatureMirror, value: Any) -> None:
    with unchanged(m), pytest.raises(ArgumentError, match="tap must be an integer"):
        m.write(tap=value, start=0, rows=np.ones((1, N_EMBD), np.float32))


@pytest.mark.parametrize("value", [-1, -(2**63), 2**62, 2**63 - 1, *BEYOND_64_BITS])
def test_writing_at_a_start_out_of_range(m: FeatureMirror, value: int) -> None:
    for write in (lambda: m.write(tap=0, start=value, rows=np.ones((1, N_EMBD), np.float32)),
                  lambda: m.write_rows(start=value, rows=np.ones((3, TAPS * N_EMBD), np.float32))):  # fmt: skip
        with unchanged(m), pytest.raises(ArgumentError, match=rf"start (is )?{value}\b"):
            write()


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_writing_at_a_start_that_is_no_integer(m: FeatureMirror, value: Any) -> None:
    with unchanged(m), pytest.raises(ArgumentError, match="start must be an integer"):
        m.write_rows(start=value, rows=np.ones((1, TAPS * N_EMBD), np.float32))


def test_the_last_position(m: FeatureMirror) -> None:
    """2^62 - 1 is a position; a range that ends beyond it is refused whole."""
    last = 2**62 - 1
    rows = np.full((2, TAPS * N_EMBD), 127, np.float32)
    with unchanged(m), pytest.raises(ArgumentError, match=f"start {last} and count 2"):
        m.write_rows(start=last, rows=rows)
    m.write_rows(start=last, rows=rows[:1])
    assert m.positions[-1] == last
    np.testing.assert_array_equal(m.read(start=last, count=1), rows[:1])
    snapshot = m.snapshot()
    m.truncate(last)
    assert last not in m.positions
    m.restore(snapshot)
    assert m.positions[-1] == last


# ----------------------------------------------------------------------------------------------- reading

RANGES = [(-1, 1), (0, -1), (-1, 0), (-(2**63), 1), (2**62, 1), (2**62 - 1, 2), (3, 2**62), (2**63 - 1, 2**63 - 1)]


@pytest.mark.parametrize(("start", "count"), RANGES)
def test_reading_a_range_out_of_range(m: FeatureMirror, start: int, count: int) -> None:
    for read in (m.read, m.view):
        with unchanged(m), pytest.raises(ArgumentError, match=f"start {start} and count {count}"):
            read(start=start, count=count)


@pytest.mark.parametrize("name", ["start", "count"])
def test_reading_a_range_that_is_no_integer(m: FeatureMirror, name: str) -> None:
    for value in (*NO_INTEGERS, *BEYOND_64_BITS):
        for read in (m.read, m.view):
            with (
                unchanged(m),
                pytest.raises(ArgumentError, match=f"{name} (must be an integer|is -?[0-9]+, beyond 64 bits)"),
            ):
                read(**{"start": 3, "count": 1, name: value})


@pytest.mark.parametrize(("start", "count", "position", "why"), [
    (0, 1, 0, "overwritten by position 8"),
    (2, 2, 2, "never written"),
    (8, 2, 9, "partial: taps not written: 0"),
    (9, 1, 9, "partial: taps not written: 0"),
    (3, CAP, 9, "partial"),
    (3, 10**12, 9, "partial"),
    (10, 1, 10, "never written"),
    (1, 1, 1, "overwritten by position 9"),
    (2**40, 1, 2**40, "never written"),
])  # fmt: skip
def test_reading_a_row_that_is_not_there(m: FeatureMirror, start: int, count: int, position: int, why: str) -> None:
    for read in (m.read, m.view):
        with unchanged(m), pytest.raises(StaleRowError, match=f"position {position} .*{why}") as caught:
            read(start=start, count=count)
        assert caught.value.position == position
        assert f"{start}..{start + count - 1}" in str(caught.value)


def test_reading_no_rows_is_no_error(m: FeatureMirror) -> None:
    for start in (0, 3, 2**62):
        assert m.read(start=start, count=0).shape == (0, TAPS * N_EMBD)


@pytest.mark.parametrize("value", [-1, -(2**63), *BEYOND_64_BITS, *NO_INTEGERS], ids=repr)
def test_truncating_at_what_is_no_position(m: FeatureMirror, value: Any) -> None:
    with unchanged(m), pytest.raises(ArgumentError) as caught:
        m.truncate(value)
    assert number(value) in str(caught.value)


def test_truncating_beyond_the_end_forgets_nothing(m: FeatureMirror) -> None:
    for start in (10, 2**62, 2**63 - 1):
        with unchanged(m):
            m.truncate(start)


@pytest.mark.parametrize("value", [-1, TAPS, 2**31, *BEYOND_64_BITS, *NO_INTEGERS], ids=repr)
def test_statistics_of_a_tap_that_is_not_there(m: FeatureMirror, value: Any) -> None:
    with unchanged(m), pytest.raises(ArgumentError) as caught:
        m.tap_stats(value)
    assert number(value) in str(caught.value)


# --------------------------------------------------------------------------------------------- row_bytes


@pytest.mark.parametrize("width", [0, -1, -32, 33, 2**40 + 32, 2**62])
def test_bytes_of_a_width_out_of_range(width: int) -> None:
    with pytest.raises(ShapeError, match=rf"width {width}\b"):
        row_bytes("q8_0", width)


@pytest.mark.parametrize("width", [32.0, 32.5, "32", None, 2**70, -(2**70)], ids=repr)
def test_bytes_of_what_is_no_width(width: Any) -> None:
    with pytest.raises(GgmlMirrorError) as caught:
        row_bytes("q8_0", width)
    assert number(width) in str(caught.value)


def test_bytes_of_an_unknown_dtype() -> None:
    with pytest.raises(DtypeError, match=r"'q9_9'.*f32, f16, bf16, q8_0"):
        row_bytes("q9_9", 32)
