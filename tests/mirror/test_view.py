"""A view shows the ring itself, and keeps its memory alive for as long as it is looked at."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from ggml_mirror import FeatureDtype
from ggml_mirror.errors import StaleRowError, ViewError

from .places import CPU_LOOPS, Place
from .reference import Floats

TAPS, N_EMBD, CAP = 2, 64, 8
WIDTH = TAPS * N_EMBD


@pytest.fixture(autouse=True)
def host_only(place: Place) -> None:
    if not place.is_host:
        pytest.skip("views are of host memory; test_a_ring_outside_host_memory_has_no_view holds the rest")


def values(n: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)


def test_view_equals_read(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=CAP, rows=values(CAP))
        for start in range(CAP, 2 * CAP):
            for count in range(1, 2 * CAP - start + 1):
                np.testing.assert_array_equal(m.view(start=start, count=count), m.read(start=start, count=count))


def test_view_is_no_copy(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=0, rows=values(4))
        view = m.view(start=1, count=2)
        m.write_rows(start=2, rows=values(1, seed=9))
        np.testing.assert_array_equal(view[1], values(1, seed=9)[0])
        assert view.ctypes.data == m.view(start=0, count=1).ctypes.data + WIDTH * 4


def test_view_is_read_only(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=0, rows=values(4))
        view = m.view(start=0, count=4)
        assert view.dtype == np.float32 and view.shape == (4, WIDTH) and view.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1


def test_view_can_not_be_made_writable(place: Place) -> None:
    """Or else anyone could change rows behind the mirror's back."""
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=0, rows=values(4))
        with pytest.raises(ValueError):
            m.view(start=0, count=4).flags.writeable = True


def test_view_of_no_rows_is_empty(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        assert m.view(start=3, count=0).shape == (0, WIDTH)


def test_wrapped_range_has_no_view(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=CAP - 3, rows=values(CAP))
        with pytest.raises(ViewError, match=rf"positions {CAP - 1}..{CAP} wrap .*cap {CAP}.*read"):
            m.view(start=CAP - 1, count=2)
        m.view(start=CAP - 3, count=3)
        m.view(start=CAP, count=CAP - 3)


def test_only_f32_has_a_view(place: Place, dtype: FeatureDtype) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype=dtype) as m:
        m.write_rows(start=0, rows=values(4))
        if dtype is FeatureDtype.F32:
            m.view(start=0, count=4)
        else:
            with pytest.raises(ViewError, match=f"{dtype} ring.*read"):
                m.view(start=0, count=4)


def test_view_of_a_partial_row_is_stale(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
        m.write_rows(start=0, rows=values(4))
        m.write(tap=0, start=4, rows=values(1)[:, :N_EMBD])
        with pytest.raises(StaleRowError) as caught:
            m.view(start=2, count=3)
        assert caught.value.position == 4


def test_view_outlives_its_mirror(place: Place) -> None:
    """Closing frees the ring once no view of it is left: until then its rows stay, whatever else takes memory."""
    m = place.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32")
    m.write_rows(start=0, rows=values(CAP))
    view = m.view(start=0, count=CAP)
    part, other = view[3:, ::2], m.view(start=2, count=1)
    m.close()
    del m, view
    gc.collect()
    for seed in range(1, 200):
        with CPU_LOOPS.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as another:
            another.write_rows(start=0, rows=values(CAP, seed))
    np.testing.assert_array_equal(part, values(CAP)[3:, ::2])
    np.testing.assert_array_equal(other, values(CAP)[2:3])


@pytest.mark.gpu
def test_a_ring_outside_host_memory_has_no_view() -> None:
    from .places import place_params

    for gpu in (p.values[0] for p in place_params() if not p.values[0].is_host):
        with gpu.mirror(taps=TAPS, n_embd=N_EMBD, cap=CAP, dtype="f32") as m:
            m.write_rows(start=0, rows=values(4))
            with pytest.raises(ViewError, match=f"{m.device.name}.*read"):
                m.view(start=0, count=4)
