"""The limit of a dtype: the largest |x| that comes back finite whatever lies beside it in its block."""

from __future__ import annotations

import numpy as np
import pytest

from ggml_mirror import FeatureDtype

from . import reference
from .places import CPU_LOOPS, Place
from .reference import BLOCK, Floats


def largest_blocks(limit: float) -> Floats:
    """Rows of eight blocks: a value of magnitude ``limit``, either sign, beside 31 equal ones at a multiple of limit / 508."""
    x = np.repeat(np.arange(-508, 508)[:, None] / 508 * limit, BLOCK, axis=1)
    x[:, 0] = limit
    return np.concatenate([x, -x]).astype(np.float32).reshape(-1, 8 * BLOCK)


@pytest.mark.parametrize("known", reference.LIMITS, ids=str)
def test_limit_is_the_largest_level_times_the_largest_scale(known: FeatureDtype) -> None:
    assert known.limit == reference.LIMITS[known]


def test_f16_limit_is_that_of_the_ieee_half() -> None:
    assert FeatureDtype.F16.limit == float(np.finfo(np.float16).max)


def test_what_is_within_the_limit_comes_back_finite(place: Place, dtype: FeatureDtype) -> None:
    x = largest_blocks(dtype.limit)
    with place.mirror(taps=1, n_embd=8 * BLOCK, cap=len(x), dtype=dtype) as m:
        m.write_rows(start=0, rows=x)
        read, stats = m.read(start=0, count=len(x)), m.tap_stats(0)
    assert (stats.nan, stats.inf, stats.overflow) == (0, 0, 0)
    bad = np.flatnonzero(~np.isfinite(read.reshape(-1, BLOCK)).all(axis=1))
    held = x.reshape(-1, BLOCK)[bad, :2]
    assert len(bad) == 0, f"{len(bad)} blocks came back with infinity or NaN, of values {held[:3].tolist()}"


def test_limit_is_not_needlessly_small(dtype: FeatureDtype) -> None:
    """A block just beyond the limit does overflow in the reference quantiser. (f32 has nothing beyond but infinity.)"""
    if dtype is FeatureDtype.F32:
        assert dtype.limit == reference.FLT_MAX
        return
    with np.errstate(over="ignore"):
        x = largest_blocks(dtype.limit * 1.01)
        read = reference.dequantize(dtype, reference.quantize(dtype, x))
    assert not np.isfinite(read).all()


def test_the_search_for_a_limit_does_not_depend_on_the_order_of_use() -> None:
    """Limits are found once per process and kept: asking again, or after storing, gives the same."""
    before = [d.limit for d in FeatureDtype]
    for d in FeatureDtype:
        with CPU_LOOPS.mirror(taps=1, n_embd=BLOCK, cap=1, dtype=d) as m:
            m.write_rows(start=0, rows=np.ones((1, BLOCK), np.float32))
    assert [d.limit for d in FeatureDtype] == before
