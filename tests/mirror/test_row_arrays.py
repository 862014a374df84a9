"""Which arrays are rows: any layout of float32 [n, width] means its values; everything else is refused, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ggml_mirror import FeatureDtype
from ggml_mirror.errors import ShapeError

from .places import Place
from .process import assert_survives
from .reference import Floats
from .unchanged import unchanged

TAPS, N_EMBD, N = 2, 64, 5
WIDTH = TAPS * N_EMBD


def values(n: int = N, width: int = WIDTH) -> Floats:
    return np.random.default_rng(n * 1000 + width).standard_normal((n, width)).astype(np.float32)


def _misaligned(n: int, width: int) -> Floats:
    buffer = np.zeros(n * width * 4 + 1, np.uint8)
    x = buffer[1:].view(np.float32).reshape(n, width)
    x[:] = values(n, width)
    return x


def _misaligned_rows(n: int, width: int) -> Floats:
    """Each row at another offset from a multiple of 4 bytes."""
    x = np.ndarray((n, width), np.float32, np.zeros(n * (width * 4 + 1), np.uint8).data, strides=(width * 4 + 1, 4))
    x[:] = values(n, width)
    return x


def _read_only(n: int, width: int) -> Floats:
    x = values(n, width)
    x.flags.writeable = False
    return x


#: name -> (n, width) -> array. What it means is what numpy.ascontiguousarray makes of it.
LAYOUTS: dict[str, Callable[[int, int], Floats]] = {
    "contiguous": values,
    "rows of a wider array": lambda n, width: values(n, width + 40)[:, 3 : 3 + width],
    "every other row": lambda n, width: values(2 * n, width)[::2],
    "rows reversed": lambda n, width: values(n, width)[::-1],
    "every third row reversed": lambda n, width: values(3 * n, width)[::-3],
    "every other column": lambda n, width: values(n, 2 * width)[:, ::2],
    "columns reversed": lambda n, width: values(n, width)[:, ::-1],
    "Fortran order": lambda n, width: np.asfortranarray(values(n, width)),
    "transposed": lambda n, width: values(width, n).T,
    "one row broadcast": lambda n, width: np.broadcast_to(values(1, width), (n, width)),
    "one value broadcast": lambda n, width: np.broadcast_to(np.float32(1.25), (n, width)),
    "one column broadcast": lambda n, width: np.broadcast_to(values(n, 1), (n, width)),
    "overlapping windows": lambda n, width: np.lib.stride_tricks.sliding_window_view(values(1, width + n)[0], width)[
        :n
    ],
    "read-only": _read_only,
    "misaligned": _misaligned,
    "misaligned rows": _misaligned_rows,
    "a subclass": lambda n, width: values(n, width).view(np.matrix),
    "slice of three dimensions": lambda n, width: values(n, 3 * width).reshape(n, 3, width)[:, 1],
}


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FeatureDtype.F32, FeatureDtype.Q8_0], ids=str)
def test_any_layout_means_its_values(place: Place, dtype: FeatureDtype, layout: str, n: int) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=N + 2, dtype=dtype) as m:
        rows, slices = LAYOUTS[layout](n, WIDTH), LAYOUTS[layout](n, N_EMBD)
        m.write_rows(start=4, rows=rows)  # wraps
        got = m.snapshot().rows
        m.clear()
        m.write_rows(start=4, rows=np.array(rows, order="C"))
        np.testing.assert_array_equal(got, m.snapshot().rows)
        if dtype is FeatureDtype.F32:
            np.testing.assert_array_equal(got.view(np.float32), rows)
        for start in (4, 5):  # in slots that already hold rows
            m.write(tap=1, start=start, rows=slices)
        got = m.snapshot().rows
        for start in (4, 5):
            m.write(tap=1, start=start, rows=np.array(slices, order="C"))
        np.testing.assert_array_equal(got, m.snapshot().rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_in_any_layout_write_nothing(place: Place, layout: str) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=N, dtype="f32") as m:
        m.write_rows(start=0, rows=values())
        before = m.snapshot()
        m.write_rows(start=2, rows=LAYOUTS[layout](N, WIDTH)[:0])
        m.write(tap=0, start=2**62, rows=LAYOUTS[layout](N, N_EMBD)[:0])
        after = m.snapshot()
        assert after.positions.tolist() == before.positions.tolist() and (after.rows == before.rows).all()


def test_more_rows_than_cap_keep_their_tail_in_any_layout(place: Place) -> None:
    for make in LAYOUTS.values():
        rows = make(3 * N + 1, WIDTH)
        with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=N, dtype="f32") as m:
            m.write_rows(start=7, rows=rows)
            first = 7 + 2 * N + 1
            assert m.positions.tolist() == list(range(first, first + N))
            np.testing.assert_array_equal(m.read(start=first, count=N), rows[-N:])


@pytest.mark.parametrize(
    "shape", [(), (WIDTH,), (1, WIDTH - 1), (1, WIDTH + 1), (WIDTH, 1), (1, N_EMBD), (1, 1, WIDTH), (N, 0), (0, 0)]
)
def test_wrong_shape(place: Place, shape: tuple[int, ...]) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype="q8_0") as m:
        m.write_rows(start=0, rows=values())
        with unchanged(m), pytest.raises(ShapeError) as caught:
            m.write_rows(start=0, rows=np.ones(shape, np.float32))
        assert f"[n, {WIDTH}], not {list(shape)}" in str(caught.value)


def test_whole_rows_are_not_a_tap(place: Place) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype="q8_0") as m, unchanged(m):
        with pytest.raises(ShapeError, match=rf"\[n, {N_EMBD}\], not \[{N}, {WIDTH}\]"):
            m.write(tap=0, start=0, rows=values())


@pytest.mark.parametrize("kind", ["f8", "f2", "i4", "u4", "i8", "?", "c8", "O", "S4", ">f4", "V4"])
def test_wrong_element_type(place: Place, kind: str) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype="q8_0") as m:
        m.write_rows(start=0, rows=values())
        rows = np.zeros((N, WIDTH), kind)
        for write in (lambda: m.write_rows(start=0, rows=rows), lambda: m.write(tap=0, start=0, rows=rows[:, :N_EMBD])):
            with unchanged(m), pytest.raises(ShapeError, match="rows must be float32, not ") as caught:
                write()
            assert str(rows.dtype) in str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [None, 1.0, "rows", b"\0" * WIDTH * 4, [[0.0] * WIDTH], (), memoryview(b"\0" * 4), np.float32(1)],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_array(place: Place, rows: Any) -> None:
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=8, dtype="q8_0") as m:
        m.write_rows(start=0, rows=values())
        with unchanged(m), pytest.raises(ShapeError, match=f"must be a numpy array, not {type(rows).__name__}"):
            m.write_rows(start=0, rows=rows)


@pytest.mark.gpu
def test_rows_closer_than_their_width_do_not_end_the_process() -> None:
    assert_survives("""
x = np.broadcast_to(np.full((1, 256), 127, np.float32), (5, 256))
with FeatureMirror(taps=1, n_embd=256, cap=8, dtype="f32", device="auto") as m:
    m.write_rows(start=0, rows=x)
    assert (m.read(start=0, count=5) == 127).all()
""")
