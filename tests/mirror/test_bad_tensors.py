"""Tensors that are no rows, or not yet: a typed error, and neither the mirror nor the tensor is changed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from ggml_mirror._native import ffi
from ggml_mirror.errors import ArgumentError, DeviceError, GgmlMirrorError, ShapeError, StaleRowError

from .ggml_tensors import F16, I32, Q8_0, Tensors
from .places import Place
from .process import assert_survives
from .test_tensors import CAP, N_EMBD, ROW, TAPS, WIDTH, mirror, values
from .unchanged import unchanged


def bad_tensors(tensors: Tensors, device: str) -> dict[str, int]:
    """Tensors that are no rows of width 256, for writing as for reading."""
    made = {
        "F16": tensors.new(WIDTH, 2, type=F16),
        "I32": tensors.new(WIDTH, 2, type=I32),
        "q8_0": tensors.new(WIDTH, 2, type=Q8_0),
        "one value short": tensors.new(WIDTH - 1, 2),
        "one value long": tensors.new(WIDTH + 1, 2),
        "a tap's slices": tensors.new(N_EMBD, 2),
        "rows and columns swapped": tensors.new(2, WIDTH),
    }
    base = tensors.new(WIDTH, WIDTH)
    tensors.allocate(device)
    made["transposed"] = tensors.transpose(base)
    made["rows at uneven strides"] = tensors.view_3d(base, WIDTH, 2, 3, ROW, 3 * ROW)
    return made


@pytest.mark.parametrize("kind", [
    "F16", "I32", "q8_0", "one value short", "one value long", "a tap's slices", "rows and columns swapped",
    "transposed", "rows at uneven strides",
])  # fmt: skip
def test_tensor_that_is_no_rows(place: Place, tensors: Tensors, kind: str) -> None:
    tensor = bad_tensors(tensors, place.device)[kind]
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ShapeError, match=rf"\[{WIDTH}, "):
            m.write_tensor(tensor, start=0)
        with unchanged(m), pytest.raises(ShapeError, match=rf"\[{WIDTH}, >= 2\]"):
            m.read_tensor(tensor, start=0, count=2)


def test_whole_rows_are_no_slices(place: Place, tensors: Tensors) -> None:
    tensor = tensors.of(values(2), place.device)
    with mirror(place) as m, unchanged(m), pytest.raises(ShapeError, match=rf"\[{N_EMBD}, n\].* f32 \[{WIDTH}, 2"):
        m.write_tensor(tensor, start=0, tap=0)


def test_taps_of_unlike_tensors(place: Place, tensors: Tensors) -> None:
    """Their number, their widths, their rows: nothing is written unless all fit."""
    good = [tensors.of(values(2, N_EMBD), place.device) for _ in range(TAPS)]
    wide, long = tensors.of(values(2), place.device), tensors.of(values(3, N_EMBD), place.device)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ArgumentError, match=f"3 tensors given; this mirror has {TAPS} taps"):
            m.write_taps(good[:3], start=0)
        with unchanged(m), pytest.raises(ShapeError, match=rf"\[{N_EMBD}, n\]"):
            m.write_taps([*good[:3], wide], start=0)
        with unchanged(m), pytest.raises(ShapeError, match="tap 3 has 3 rows, tap 0 has 2"):
            m.write_taps([*good[:3], long], start=0)
        with unchanged(m), pytest.raises(ArgumentError, match="null pointer"):
            m.write_taps([*good[:3], None], start=0)
        with unchanged(m), pytest.raises(ArgumentError, match="start -1"):
            m.write_taps(good, start=-1)


def test_tensor_with_too_few_rows_to_read_into(place: Place, tensors: Tensors) -> None:
    tensor = tensors.of(values(2), place.device)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ShapeError, match=rf"\[{WIDTH}, >= 3\]; this is f32 \[{WIDTH}, 2\]"):
            m.read_tensor(tensor, start=0, count=3)
    np.testing.assert_array_equal(tensors.get(tensor, 2, WIDTH), values(2))


def test_strided_tensor_is_nothing_to_read_into(place: Place, tensors: Tensors) -> None:
    view = tensors.view_2d(tensors.of(values(8), place.device), WIDTH, 4, 2 * ROW)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ShapeError, match="contiguous"):
            m.read_tensor(view, start=0, count=2)


@pytest.mark.parametrize("no_alloc", [True, False], ids=["no memory", "memory of a context"])
def test_tensor_outside_a_backend_buffer(place: Place, no_alloc: bool) -> None:
    with Tensors(no_alloc=no_alloc) as tensors, mirror(place) as m:
        tensor = tensors.new(WIDTH, 2)
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ArgumentError, match="no data"):
            m.write_tensor(tensor, start=0)
        with unchanged(m), pytest.raises(ShapeError, match="allocated"):
            m.read_tensor(tensor, start=0, count=2)


def test_stale_read_leaves_the_tensor(place: Place, tensors: Tensors) -> None:
    before = values(4)
    tensor = tensors.of(before, place.device)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(3))
        with unchanged(m), pytest.raises(StaleRowError) as caught:
            m.read_tensor(tensor, start=0, count=4)
        assert caught.value.position == 3
    np.testing.assert_array_equal(tensors.get(tensor, 4, WIDTH), before)


@pytest.mark.gpu
def test_reading_to_another_device(place: Place, tensors: Tensors) -> None:
    if place.is_host:
        pytest.skip("a mirror in host memory reads into any host tensor")
    tensor = tensors.of(values(2), "CPU")
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(DeviceError, match=m.device.name):
            m.read_tensor(tensor, start=0, count=2)


@pytest.mark.parametrize(
    "null", [0, None, ctypes.c_void_p(0), ffi.NULL, ctypes.POINTER(ctypes.c_int)()], ids=lambda v: type(v).__name__
)
def test_null_pointer(place: Place, null: Any) -> None:
    with mirror(place) as m:
        with unchanged(m), pytest.raises(ArgumentError, match=r"rows must not be NULL|null pointer"):
            m.write_tensor(null, start=0)
        with unchanged(m), pytest.raises(ArgumentError, match=r"rows must not be NULL|null pointer"):
            m.read_tensor(null, start=0, count=1)


@pytest.mark.parametrize(
    "thing", [1.5, [1], {}, np.ones((2, WIDTH), np.float32), np.int64(0), object()], ids=lambda v: type(v).__name__
)
def test_what_is_no_pointer(place: Place, thing: Any) -> None:
    with mirror(place) as m, unchanged(m), pytest.raises(GgmlMirrorError):
        m.write_tensor(thing, start=0)


@pytest.mark.parametrize("thing", ["b'a tensor'", "-8"])
def test_what_is_no_pointer_does_not_crash(thing: str) -> None:
    assert_survives(f"""
with FeatureMirror(taps=1, n_embd=32, cap=4) as m:
    try:
        m.write_tensor({thing}, start=0)
    except GgmlMirrorError:
        pass
    else:
        raise SystemExit(1)
""")


@pytest.mark.parametrize(("arguments", "error"), [
    ({"start": -1}, "start -1"), ({"start": 2**62}, f"start {2**62}"), ({"start": 2**70}, f"start is {2**70}"),
    ({"start": 0.5}, "start must be an integer"), ({"start": 0, "tap": -1}, "tap -1"),
    ({"start": 0, "tap": TAPS}, f"tap {TAPS}"),
    ({"start": 0, "tap": 2**70}, f"tap {2**70}"), ({"start": 0, "tap": 0.5}, "tap must be an integer"),
    ({"start": 0, "tap": "0"}, "tap must be an integer"),
])  # fmt: skip
def test_writing_where_nothing_can_be(place: Place, tensors: Tensors, arguments: dict[str, Any], error: str) -> None:
    tensor = tensors.of(values(2, N_EMBD if "tap" in arguments else WIDTH), place.device)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ArgumentError, match=error):
            m.write_tensor(tensor, **arguments)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1), (2**62, 1), (2**63, 1), (0, 2**63), (0.5, 1), (0, "1")])
def test_reading_where_nothing_can_be(place: Place, tensors: Tensors, start: Any, count: Any) -> None:
    tensor = tensors.of(values(2), place.device)
    with mirror(place) as m:
        m.write_rows(start=0, rows=values(CAP))
        with unchanged(m), pytest.raises(ArgumentError):
            m.read_tensor(tensor, start=start, count=count)
