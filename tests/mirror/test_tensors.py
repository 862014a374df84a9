"""Writing from and reading into ggml tensors: the same bytes as through numpy, without a detour through host memory."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ggml_mirror import FeatureDtype, FeatureMirror
from ggml_mirror._native import ffi
from ggml_mirror.mirror import BusBytes, bus_bytes

from .ggml_tensors import Tensors
from .places import Place
from .reference import Floats

TAPS, N_EMBD, CAP = 4, 64, 9
WIDTH = TAPS * N_EMBD
ROW, SLICE = WIDTH * 4, N_EMBD * 4


def values(n: int, width: int = WIDTH, seed: int = 0) -> Floats:
    return np.random.default_rng(seed + n * width).standard_normal((n, width)).astype(np.float32)


def mirror(place: Place, dtype: FeatureDtype | str = "q8_0", cap: int = CAP) -> FeatureMirror:
    return place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype)


def assert_written_like_numpy(
    place: Place, dtype: FeatureDtype | str, tensor: int, x: Floats, tap: int | None, start: int = 5
) -> None:
    with mirror(place, dtype) as through_tensor, mirror(place, dtype) as through_numpy:
        through_tensor.write_tensor(tensor, start=start, tap=tap)
        if tap is None:
            through_numpy.write_rows(start=start, rows=x)
        else:
            through_numpy.write(tap=tap, start=start, rows=x)
        one, other = through_tensor.snapshot(), through_numpy.snapshot()
        assert one.positions.tolist() == other.positions.tolist() and len(one.positions) == min(len(x), CAP)
        assert one.tap_masks.tolist() == other.tap_masks.tolist()
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_equal(
            [through_tensor.tap_stats(t) for t in range(TAPS)].__repr__(),
            [through_numpy.tap_stats(t) for t in range(TAPS)].__repr__(),
        )


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("n", [1, 6, CAP, 2 * CAP + 3])
def test_whole_rows(place: Place, dtype: FeatureDtype, tensors: Tensors, n: int) -> None:
    x = values(n)
    assert_written_like_numpy(place, dtype, tensors.of(x, place.device), x, None)


@pytest.mark.parametrize("tap", range(TAPS))
@pytest.mark.parametrize("n", [1, 6, 2 * CAP + 3])
def test_slices_of_a_tap(place: Place, dtype: FeatureDtype, tensors: Tensors, n: int, tap: int) -> None:
    x = values(n, N_EMBD)
    assert_written_like_numpy(place, dtype, tensors.of(x, place.device), x, tap)


def test_rows_of_a_wider_tensor(place: Place, dtype: FeatureDtype, tensors: Tensors) -> None:
    """Row stride larger than the row, as in a view of one tap's columns."""
    for n in (1, 6, 2 * CAP):
        wide = values(n)
        tensor = tensors.of(wide, place.device)
        for tap in range(TAPS):
            view = tensors.view_2d(tensor, N_EMBD, n, ROW, tap * SLICE)
            assert_written_like_numpy(place, dtype, view, wide[:, tap * N_EMBD : (tap + 1) * N_EMBD], tap)


def test_every_other_row_of_a_tensor(place: Place, tensors: Tensors) -> None:
    x = values(10)
    view = tensors.view_2d(tensors.of(x, place.device), WIDTH, 5, 2 * ROW, ROW)
    assert_written_like_numpy(place, "q8_0", view, x[1::2], None)


def test_one_row_repeated(place: Place, tensors: Tensors) -> None:
    x = values(4)  # ggml wants a view to be no larger than its base, though it shows one row only
    view = tensors.view_2d(tensors.of(x, place.device), WIDTH, 4, 0)
    assert_written_like_numpy(place, "q8_0", view, np.broadcast_to(x[:1], (4, WIDTH)), None)


def test_rows_in_more_dimensions(place: Place, tensors: Tensors) -> None:
    """[width, 2, 3] holds six rows if they follow on at one stride."""
    x = values(12)
    tensor = tensors.of(x, place.device)
    assert_written_like_numpy(place, "q8_0", tensors.view_3d(tensor, WIDTH, 2, 3, ROW, 2 * ROW), x[:6], None)
    assert_written_like_numpy(place, "q8_0", tensors.view_3d(tensor, WIDTH, 2, 3, 2 * ROW, 4 * ROW), x[::2], None)


def test_bad_values_in_a_tensor_are_replaced_and_counted(place: Place, dtype: FeatureDtype, tensors: Tensors) -> None:
    x = values(4)
    x[1, 5], x[2, 70], x[3, 255], x[0, 0] = np.nan, np.inf, -1e30, 70000
    assert_written_like_numpy(place, dtype, tensors.of(x, place.device), x, None)


def test_a_tensor_in_host_memory_may_fill_any_mirror(place: Place, dtype: FeatureDtype, tensors: Tensors) -> None:
    wide = values(6)
    tensor = tensors.of(wide, "CPU")
    assert_written_like_numpy(place, dtype, tensor, wide, None)
    assert_written_like_numpy(
        place, dtype, tensors.view_2d(tensor, N_EMBD, 6, ROW, SLICE), wide[:, N_EMBD : 2 * N_EMBD], 1
    )


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_may_fill_a_mirror_in_host_memory(dtype: FeatureDtype, tensors: Tensors) -> None:
    from .places import CPU_GGML, CPU_LOOPS, place_params

    for gpu in [p.values[0] for p in place_params() if not p.values[0].is_host]:
        wide = values(6)
        tensor = tensors.of(wide, gpu.device)
        for place in (CPU_LOOPS, CPU_GGML):
            assert_written_like_numpy(place, dtype, tensor, wide, None)
            assert_written_like_numpy(
                place, dtype, tensors.view_2d(tensor, N_EMBD, 6, ROW, SLICE), wide[:, N_EMBD : 2 * N_EMBD], 1
            )


def test_tensor_may_be_given_as_any_kind_of_pointer(place: Place, tensors: Tensors) -> None:
    x = values(2)
    address = tensors.of(x, place.device)
    for pointer in (
        address,
        ctypes.c_void_p(address),
        ffi.cast("void *", address),
        ffi.cast("struct ggml_tensor *", address),
    ):
        assert_written_like_numpy(place, "f16", pointer, x, None)


@pytest.mark.parametrize("n", [1, 6, 2 * CAP + 3])
@pytest.mark.parametrize("where", ["apart", "columns", "host"])
def test_all_taps_at_once(place: Place, dtype: FeatureDtype, tensors: Tensors, n: int, where: str) -> None:
    """A tensor per tap: of its own, a view of shared rows (one stride), or some on the device and some in host memory."""
    x = values(n)
    slices = [np.ascontiguousarray(x[:, t * N_EMBD : (t + 1) * N_EMBD]) for t in range(TAPS)]
    if where == "columns":
        rows = tensors.of(x, place.device)
        given = [tensors.view_2d(rows, N_EMBD, n, ROW, t * SLICE) for t in range(TAPS)]
    else:
        given = [tensors.of(s, "CPU" if where == "host" and t % 2 else place.device) for t, s in enumerate(slices)]
    with mirror(place, dtype) as at_once, mirror(place, dtype) as by_tap:
        at_once.write_taps(given, start=5)
        for tap, rows in enumerate(slices):
            by_tap.write(tap=tap, start=5, rows=rows)
        one, other = at_once.snapshot(), by_tap.snapshot()
        assert one.positions.tolist() == other.positions.tolist() and len(one.positions) == min(n, CAP)
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_equal(*([m.tap_stats(t).__repr__() for t in range(TAPS)] for m in (at_once, by_tap)))
        assert at_once.times().write_rows == by_tap.times().write_rows


# ----------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("start", "count"), [(5, CAP), (5, 1), (9, 1), (7, 5), (13, 1)])
def test_reading_into_a_tensor(place: Place, dtype: FeatureDtype, tensors: Tensors, start: int, count: int) -> None:
    """Ranges that wrap (cap 9) and that do not, into a tensor with room for more."""
    before = values(CAP + 2, seed=5)
    tensor = tensors.of(before, place.device)
    with mirror(place, dtype) as m:
        m.write_rows(start=5, rows=values(CAP))
        m.read_tensor(tensor, start=start, count=count)
        got = tensors.get(tensor, CAP + 2, WIDTH)
        np.testing.assert_array_equal(got[:count], m.read(start=start, count=count))
        np.testing.assert_array_equal(got[count:], before[count:])


def test_reading_into_a_view(place: Place, tensors: Tensors) -> None:
    before = values(8, seed=5)
    tensor = tensors.of(before, place.device)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        m.read_tensor(tensors.view_2d(tensor, WIDTH, 4, ROW, 2 * ROW), start=3, count=4)
        got = tensors.get(tensor, 8, WIDTH)
        np.testing.assert_array_equal(got[2:6], m.read(start=3, count=4))
        np.testing.assert_array_equal(got[[0, 1, 6, 7]], before[[0, 1, 6, 7]])


def test_reading_no_rows_leaves_the_tensor(place: Place, tensors: Tensors) -> None:
    before = values(2)
    tensor = tensors.of(before, place.device)
    with mirror(place) as m:
        m.read_tensor(tensor, start=3, count=0)
    np.testing.assert_array_equal(tensors.get(tensor, 2, WIDTH), before)


def test_what_a_tensor_wrote_a_tensor_reads(place: Place, dtype: FeatureDtype, tensors: Tensors) -> None:
    """Of a mirror with more rows than pass through staging at once (8 MiB)."""
    n = 66
    x = np.random.default_rng(1).random((n, 2 * 65536), np.float32) - np.float32(0.5)
    tensor = tensors.of(x, place.device)
    with place.mirror(taps=2, n_embd=65536, cap=n + 7, dtype=dtype, n_threads=2) as m:
        m.write_tensor(tensor, start=50)
        want = m.read(start=50, count=n)
        m.read_tensor(tensor, start=50, count=n)
        np.testing.assert_array_equal(tensors.get(tensor, n, m.width), want)
        assert np.abs(want - x).max() <= 0.08


def test_no_feature_crosses_host_memory(place: Place, tensors: Tensors) -> None:
    """Between tensors on its device a mirror moves nothing through the host; with numpy it moves each value once."""
    x = values(6)
    tensor = tensors.of(x, place.device)
    with mirror(place) as m:
        m.write_tensor(tensor, start=0)
        m.write_tensor(tensors.view_2d(tensor, N_EMBD, 6, ROW, SLICE), start=2, tap=1)
        m.read_tensor(tensor, start=0, count=6)
        assert (m.bus().to_host, m.bus().to_device) == (0, 0)
        m.write_rows(start=0, rows=x)
        m.read(start=0, count=6)
        crossed = 0 if place.is_host else x.nbytes
        assert m.bus() == BusBytes(to_host=crossed, to_device=crossed)


def test_a_snapshot_crosses_as_it_is_stored(place: Place, dtype: FeatureDtype) -> None:
    """Each row once and in storage bytes, there and back; the process's account has the same."""
    if not place.supports(dtype, TAPS, N_EMBD):
        pytest.skip(f"{place.device} cannot hold {dtype}")
    with mirror(place, dtype) as m:
        m.write_rows(start=0, rows=values(6))
        m.reset_stats()
        before = bus_bytes()
        m.restore(m.snapshot())
        crossed = 0 if place.is_host else 6 * m.row_nbytes
        assert m.bus() == BusBytes(to_host=crossed, to_device=crossed)
        total = bus_bytes()
        assert BusBytes(total.to_host - before.to_host, total.to_device - before.to_device) == m.bus()
