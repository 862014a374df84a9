"""What is stored equals what the reference quantiser gives, and what is read equals what is stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ggml_mirror import FeatureDtype

from . import reference
from .conftest import REAL_N_EMBD, REAL_TAPS
from .inputs import INPUTS, STABLE_INPUTS
from .places import Place
from .reference import Bytes, Floats

TAPS, N_EMBD, ROWS = 4, 64, 40


def within_limit(dtype: FeatureDtype, x: Floats) -> Floats:
    limit = np.float32(dtype.limit)
    return x.clip(-limit, limit)


def store(place: Place, dtype: FeatureDtype, x: Floats, taps: int = TAPS, by_tap: bool = False) -> tuple[Bytes, Floats]:
    """(stored bytes, rows read back) of a mirror that holds x, its rows wrapped around the ring's end."""
    n, width = x.shape
    n_embd = width // taps
    with place.mirror(taps=taps, n_embd=n_embd, cap=n + 3, dtype=dtype) as m:
        start = m.cap * 5 + n // 2
        if by_tap:
            for tap in range(taps):
                m.write(tap=tap, start=start, rows=x[:, tap * n_embd : (tap + 1) * n_embd])
        else:
            m.write_rows(start=start, rows=x)
        return m.snapshot().rows, m.read(start=start, count=n)


def assert_stored_right(
    place: Place, dtype: FeatureDtype, x: Floats, stored: Bytes, read: Floats, signed_zeros: bool = True
) -> None:
    reference.assert_same_bytes(dtype, x, stored, approximate=place.approximate(dtype), signed_zeros=signed_zeros)
    if place.is_host or place.own_code(dtype):
        np.testing.assert_array_equal(read.view(np.uint32), reference.dequantize(dtype, stored).view(np.uint32))
    else:
        np.testing.assert_array_equal(read, reference.dequantize(dtype, stored))
    off = np.abs(read.astype(np.float64) - x) - reference.error_bound(dtype, x, place.approximate(dtype))
    assert off.max(initial=0) <= 0, f"a value is {off.max()} beyond half a quantum"


@pytest.mark.parametrize("by_tap", [False, True], ids=["rows", "taps"])
@pytest.mark.parametrize("name", INPUTS)
def test_stored_bytes_are_those_of_the_reference(place: Place, dtype: FeatureDtype, name: str, by_tap: bool) -> None:
    x = within_limit(dtype, INPUTS[name](ROWS, TAPS * N_EMBD))
    assert_stored_right(place, dtype, x, *store(place, dtype, x, by_tap=by_tap))


def test_stored_bytes_of_real_rows(place: Place, dtype: FeatureDtype, real_rows: Floats) -> None:
    assert real_rows.shape[1] == len(REAL_TAPS) * REAL_N_EMBD
    assert_stored_right(place, dtype, real_rows, *store(place, dtype, real_rows, taps=len(REAL_TAPS)))


@settings(max_examples=60)
@given(data=st.data())
def test_stored_bytes_of_arbitrary_rows(place: Place, dtype: FeatureDtype, data: st.DataObject) -> None:
    limit = float(np.float32(reference.LIMITS.get(dtype, reference.F16_MAX)))
    size = data.draw(st.sampled_from([limit, 1000.0, 1.0, 2.0**-20]))
    x = data.draw(arrays(np.float32, (2, 256), elements=st.floats(-size, size, width=32), fill=st.just(np.float32(0))))
    # Signed zeros beside values beyond 65504 are test_f32_keeps_every_bit's.
    assert_stored_right(place, dtype, x, *store(place, dtype, x), signed_zeros=place.own_code(dtype))


def test_most_bytes_are_equal_without_any_tie(place: Place, dtype: FeatureDtype) -> None:
    """The tolerance is for ties, which random values hardly ever hit."""
    x = INPUTS["normal-1"](200, TAPS * N_EMBD)
    stored, _ = store(place, dtype, x)
    assert reference.assert_same_bytes(dtype, x, stored, approximate=place.approximate(dtype)) <= x.size // 10_000


def test_ties_are_met(place: Place) -> None:
    """The tolerance is needed: ggml's vectorised q8_0 rounds exact ties to even, the reference away from zero."""
    x = INPUTS["ties"](ROWS, TAPS * N_EMBD)
    quotient = reference.exact(FeatureDtype.Q8_0, x).quotient
    assert (np.abs(quotient % 1 - 0.5) == 0).sum() > 1000


@pytest.mark.parametrize("name", STABLE_INPUTS)
def test_storing_what_was_read_gives_the_same_bytes(place: Place, dtype: FeatureDtype, name: str) -> None:
    if dtype is FeatureDtype.IQ4_NL:
        pytest.skip("iq4_nl fits its scale anew each time")
    stored, read = store(place, dtype, within_limit(dtype, INPUTS[name](ROWS, TAPS * N_EMBD)))
    again, read_again = store(place, dtype, read)
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_array_equal(read_again.view(np.uint32), read.view(np.uint32))


def test_storing_real_rows_that_were_read_gives_the_same_bytes(
    place: Place, dtype: FeatureDtype, real_rows: Floats
) -> None:
    if dtype is FeatureDtype.IQ4_NL:
        pytest.skip("iq4_nl fits its scale anew each time")
    stored, read = store(place, dtype, real_rows)
    np.testing.assert_array_equal(store(place, dtype, read)[0], stored)


@pytest.mark.parametrize("by_tap", [False, True], ids=["rows", "taps"])
def test_f32_keeps_every_bit(place: Place, by_tap: bool) -> None:
    finite = np.random.default_rng(3).integers(0, 1 << 32, (ROWS, TAPS * N_EMBD), np.uint32)
    finite = np.where((finite & 0x7F800000) == 0x7F800000, finite & 0x807FFFFF, finite)
    x = finite.view(np.float32)
    x[0, :4] = [0.0, -0.0, 2.0**-149, -(2.0**-149)]
    stored, read = store(place, FeatureDtype.F32, x, by_tap=by_tap)
    np.testing.assert_array_equal(stored, x.view(np.uint8))
    np.testing.assert_array_equal(read.view(np.uint32), x.view(np.uint32))


def test_rows_written_by_tap_equal_rows_written_whole(place: Place, dtype: FeatureDtype) -> None:
    x = INPUTS["massive-channel"](ROWS, TAPS * N_EMBD)
    whole, by_tap = (store(place, dtype, x, by_tap=b)[0] for b in (False, True))
    np.testing.assert_array_equal(whole, by_tap)


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_bytes_do_not_depend_on_threads_or_on_how_many_rows_are_written_at_once(
    place: Place, dtype: FeatureDtype, n_threads: int
) -> None:
    """64 KiB a row, 35 rows on either side of the ring's end: either run is work for several threads, each row is not."""
    n, start = 70, 45
    x = np.random.default_rng(23).standard_normal((n, 16384), np.float32)
    with place.mirror(taps=2, n_embd=8192, cap=80, dtype=dtype, n_threads=n_threads) as m:
        m.write_rows(start=start, rows=x)
        at_once, read = m.snapshot().rows, m.read(start=start, count=n)
        m.clear()
        m.write_rows(start=start, rows=np.zeros_like(x))
        for i in range(n):
            m.write_rows(start=start + i, rows=x[i : i + 1])
        np.testing.assert_array_equal(m.snapshot().rows, at_once)
        np.testing.assert_array_equal(np.concatenate([m.read(start=start + i, count=1) for i in range(n)]), read)
    some = [0, 34, 35, 69]
    assert_stored_right(place, dtype, x[some], at_once[some], read[some])
