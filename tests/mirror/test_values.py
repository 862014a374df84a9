"""Values that a dtype cannot hold: replaced by the documented rule, counted per tap, and harmless to their neighbours.

NaN is stored as 0; infinity, and finite values beyond ``FeatureDtype.limit``, as the limit with their sign.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_mirror import FeatureDtype, FeatureMirror

from . import reference
from .places import Place
from .reference import BLOCK, F16_MAX, Floats

TAPS, N_EMBD = 4, 64
WIDTH = TAPS * N_EMBD

SPECIAL = (
    np.nan, -np.nan, np.inf, -np.inf,
    1e30, -1e30, reference.FLT_MAX, -reference.FLT_MAX,
    65504.0, -65504.0, np.nextafter(np.float32(65504), np.float32(np.inf)), 65519.0, 65520.0, -70000.0, 1e6, -9e6,
)  # fmt: skip


def replaced(dtype: FeatureDtype, x: Floats) -> Floats:
    """The rule, in numpy."""
    limit = np.float32(dtype.limit)
    return np.where(np.isnan(x), np.float32(0), x).clip(-limit, limit)


def expected_stats(dtype: FeatureDtype, x: Floats, abs_max: bool) -> tuple[float, ...]:
    """The TapStats of a tap that has seen x, each of its values once."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        magnitude = np.abs(x.astype(np.float64))
    finite = np.isfinite(magnitude)
    return (
        x.size,
        int(np.isnan(x).sum()),
        int(np.isinf(x).sum()),
        int((finite & (magnitude > dtype.limit)).sum()),
        int((finite & (magnitude > F16_MAX)).sum()),
        float(magnitude[finite].max(initial=0)) if abs_max else float("nan"),
    )


def assert_counted(m: FeatureMirror, place: Place, x: Floats) -> None:
    for tap in range(m.taps):
        seen = x[:, tap * m.n_embd : (tap + 1) * m.n_embd]
        want = expected_stats(m.dtype, seen, place.own_code(m.dtype))
        np.testing.assert_equal(astuple(m.tap_stats(tap)), want, f"tap {tap}")


def assert_rule_kept(m: FeatureMirror, place: Place, x: Floats) -> None:
    """x, at positions 0.., is stored as its replacement, and is read finite and within a quantum of it."""
    stored, read = m.snapshot().rows, m.read(start=0, count=len(x))
    clean = replaced(m.dtype, x)
    assert np.isfinite(read).all()
    reference.assert_same_bytes(
        m.dtype, clean, stored, approximate=place.approximate(m.dtype), signed_zeros=place.own_code(m.dtype)
    )
    assert (
        np.abs(read.astype(np.float64) - clean) <= reference.error_bound(m.dtype, clean, place.approximate(m.dtype))
    ).all()


def sprinkled(seed: int, n: int) -> Floats:
    """Rows of ordinary values with each special one somewhere, unevenly over the taps; some blocks hold several."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, WIDTH)).astype(np.float32)
    for i, value in enumerate(SPECIAL):
        for _ in range(1 + i % 4):
            x[rng.integers(n), rng.integers(WIDTH)] = value
    x[0, :BLOCK] = np.nan  # a whole block
    x[1, N_EMBD : N_EMBD + BLOCK] = np.inf
    x[1, N_EMBD : N_EMBD + BLOCK : 2] = -np.inf
    return x


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("where", [0, N_EMBD + BLOCK - 1])
def test_one_bad_value_follows_the_rule(place: Place, dtype: FeatureDtype, value: float, where: int) -> None:
    x = np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)
    x[1, where] = value
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=4, dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
        assert_rule_kept(m, place, x)
        assert_counted(m, place, x)


@pytest.mark.parametrize("n", [4, 2600], ids=["few rows", "rows for every thread"])
def test_many_bad_values_follow_the_rule(place: Place, dtype: FeatureDtype, n: int) -> None:
    x = sprinkled(5, n)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=n, dtype=dtype, n_threads=3) as m:
        m.write_rows(start=0, rows=x)
        assert_rule_kept(m, place, x)
        assert_counted(m, place, x)


def test_writing_by_tap_counts_for_that_tap_only(place: Place, dtype: FeatureDtype) -> None:
    x = sprinkled(6, 8)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype=dtype) as m:
        for tap in (2, 0, 3, 1):
            m.write(tap=tap, start=0, rows=x[:, tap * N_EMBD : (tap + 1) * N_EMBD])
            seen = x[:, tap * N_EMBD : (tap + 1) * N_EMBD]
            np.testing.assert_equal(astuple(m.tap_stats(tap)), expected_stats(dtype, seen, place.own_code(dtype)))
        assert_counted(m, place, x)


def test_counts_add_up_over_writes_and_start_again_at_a_reset(place: Place, dtype: FeatureDtype) -> None:
    one, two = sprinkled(7, 5), sprinkled(8, 6)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype=dtype) as m:
        m.write_rows(start=0, rows=one)
        m.write_rows(start=3, rows=two)
        assert_counted(m, place, np.concatenate([one, two]))
        m.clear()
        assert_counted(m, place, np.concatenate([one, two]))
        m.reset_stats()
        assert astuple(m.tap_stats(0)) == (0, 0, 0, 0, 0, 0)
        m.write_rows(start=0, rows=two)
        assert_counted(m, place, two)


def test_rows_that_the_ring_does_not_keep_are_not_counted(place: Place, dtype: FeatureDtype) -> None:
    x = sprinkled(9, 20)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=6, dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
        assert_counted(m, place, x[-6:])


def test_overflows_of_f16_are_counted_whatever_the_dtype(place: Place, dtype: FeatureDtype) -> None:
    """What probe reports for a model must not depend on the dtype it happens to store."""
    x = np.zeros((1, WIDTH), np.float32)
    x[0, [0, 40, 41, 42]] = [F16_MAX, np.nextafter(np.float32(F16_MAX), np.float32(np.inf)), -65519.0, 3e38]
    x[0, 64:66] = [np.inf, np.nan]
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=1, dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
        assert [m.tap_stats(t).over_f16 for t in range(TAPS)] == [3, 0, 0, 0]


def test_nan_leaves_the_bytes_of_its_neighbours_as_a_zero_would(place: Place, dtype: FeatureDtype) -> None:
    """(A GPU's own zero may be the negative one.)"""
    x = np.random.default_rng(2).standard_normal((4, WIDTH)).astype(np.float32)
    zeroed = x.copy()
    x[:, ::7], zeroed[:, ::7] = np.nan, 0
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
        m.write_rows(start=4, rows=zeroed)
        rows = m.snapshot().rows
    if not place.is_host:
        rows = reference.dequantize(dtype, rows)
    np.testing.assert_array_equal(rows[:4], rows[4:])


def test_the_array_that_was_written_is_not_changed(place: Place, dtype: FeatureDtype) -> None:
    x = sprinkled(10, 6)
    before = x.tobytes()
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
    assert x.tobytes() == before


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.01, 0.3, 1.0]))
def test_any_bit_pattern_is_read_back_finite(place: Place, dtype: FeatureDtype, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, WIDTH)).astype(np.float32)
    x = np.where(rng.random(x.shape) < share, rng.integers(0, 1 << 32, x.shape, np.uint32).view(np.float32), x)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=3, dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
        assert_rule_kept(m, place, x)
        assert_counted(m, place, x)


def test_what_can_be_held_keeps_its_sign_beside_what_cannot(place: Place) -> None:
    x = np.full((1, WIDTH), -0.0, np.float32)
    x[0, 3] = np.nan
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=1, dtype="f32") as m:
        m.write_rows(start=0, rows=x)
        assert np.signbit(np.delete(m.read(start=0, count=1), 3)).all()
