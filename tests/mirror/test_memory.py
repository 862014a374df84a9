"""Bytes before allocation: exact sizes, and an error that says what was needed, what is free, and what would fit."""

from __future__ import annotations

import numpy as np
import pytest

from ggml_mirror import FeatureDtype, FeatureMirror, find_device
from ggml_mirror import row_bytes as package_row_bytes
from ggml_mirror.errors import MirrorMemoryError
from ggml_mirror.mirror import mirror_size

from . import reference
from .ggml_tensors import Tensors
from .places import Place

TAPS, N_EMBD = 5, 5120
WIDTH = TAPS * N_EMBD
MOST_SLOT_BYTES = 64  # in host memory: which position a slot holds, and of which taps


def taken(place: Place, dtype: FeatureDtype, cap: int, taps: int = TAPS, n_embd: int = N_EMBD) -> int:
    """Bytes of the device's memory: the ring by gguf's sizes, the rest as announced."""
    size = mirror_size(taps, n_embd, cap, dtype, find_device(place.device).index, ggml_ops=place.ggml_ops)
    assert 0 < size.bookkeeping <= MOST_SLOT_BYTES * cap
    return cap * reference.row_bytes(dtype, taps * n_embd) + size.staging + (size.bookkeeping if place.is_host else 0)


def too_big(place: Place, dtype: FeatureDtype = FeatureDtype.F32, share: float = 1.5) -> tuple[MirrorMemoryError, int]:
    """The error of a mirror that needs this share of what is free, and its cap."""
    cap = int(find_device(place.device).memory_free * share) // reference.row_bytes(dtype, WIDTH)
    with pytest.raises(MirrorMemoryError) as caught:
        place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype)
    return caught.value, cap


def test_sizes_are_those_of_gguf(place: Place, dtype: FeatureDtype) -> None:
    assert package_row_bytes(dtype, WIDTH) == reference.row_bytes(dtype, WIDTH)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=7, dtype=dtype) as m:
        assert (m.width, m.row_nbytes, m.nbytes) == (
            WIDTH,
            reference.row_bytes(dtype, WIDTH),
            7 * reference.row_bytes(dtype, WIDTH),
        )
        assert m.size == mirror_size(TAPS, N_EMBD, 7, dtype, m.device.index, ggml_ops=place.ggml_ops)


def test_sizes_at_a_context_of_256k() -> None:
    """The table of the 27B target: 5 taps of 5120."""
    ring = {d: mirror_size(TAPS, N_EMBD, 262144, d).ring for d in ("f32", "f16", "bf16", "q8_0")}
    assert ring == {"f32": 26843545600, "f16": 13421772800, "bf16": 13421772800, "q8_0": 7130316800}


def test_error_names_what_is_needed_and_free(place: Place, dtype: FeatureDtype) -> None:
    error, cap = too_big(place, dtype)
    assert error.bytes_needed == taken(place, dtype, cap)
    free = find_device(place.device).memory_free
    assert 0.8 * free <= error.bytes_free <= 1.2 * free  # others take and give back memory meanwhile
    for part in (
        cap,
        reference.row_bytes(dtype, WIDTH),
        dtype,
        error.bytes_needed,
        error.bytes_free,
        find_device(place.device).name,
    ):
        assert str(part) in str(error)
    assert isinstance(error, MemoryError)


def test_largest_cap_is_the_largest_that_fits(place: Place, dtype: FeatureDtype) -> None:
    error, _ = too_big(place, dtype)
    assert f"{dtype} fits with cap {error.max_cap}" in str(error)
    assert taken(place, dtype, error.max_cap) <= error.bytes_free < taken(place, dtype, error.max_cap + 1)


@pytest.mark.parametrize("share", [1.02, 1.5, 2.5, 5.0, 20.0])
def test_dtypes_that_fit_are_exactly_those(place: Place, share: float) -> None:
    error, cap = too_big(place, share=share)
    fitting = tuple(d for d in FeatureDtype if taken(place, d, cap) <= error.bytes_free and place.supports(d))
    assert error.fitting_dtypes == fitting
    assert (f"cap {cap} fits as {', '.join(fitting)}" in str(error)) if fitting else ("fits as" not in str(error))


def test_not_one_row_fits(place: Place) -> None:
    with pytest.raises(MirrorMemoryError, match="not one row of f32 fits") as caught:
        place.mirror(taps=64, n_embd=2**40, cap=1, dtype="f32")
    assert (caught.value.max_cap, caught.value.fitting_dtypes) == (0, ())
    assert caught.value.bytes_needed >= 2**48


@pytest.mark.parametrize("cap", [10**9, 2**31 - 1])
def test_absurd_cap_says_what_fits(place: Place, cap: int) -> None:
    with pytest.raises(MirrorMemoryError) as caught:
        place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype="q4_0")
    assert caught.value.bytes_needed == taken(place, FeatureDtype.Q4_0, cap)
    assert 0 < caught.value.max_cap < cap and str(caught.value.max_cap) in str(caught.value)


def test_dtypes_whose_blocks_do_not_divide_a_tap_are_not_advised(place: Place) -> None:
    cap = find_device(place.device).memory_free // 120  # too many of 132 bytes, not of 66
    with pytest.raises(MirrorMemoryError) as caught:
        place.mirror(taps=1, n_embd=33, cap=cap, dtype="f32")
    assert caught.value.fitting_dtypes == ("f16", "bf16")


def test_mirror_that_does_not_fit_takes_nothing(place: Place) -> None:
    free = find_device(place.device).memory_free
    for _ in range(20):
        too_big(place)
    assert find_device(place.device).memory_free > free * 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_a_gpu_is_left_as_it_was(place: Place, dtype: FeatureDtype) -> None:
    """Neither a mirror that does not fit nor one that was closed keeps any of its memory."""
    if place.is_host:
        pytest.skip("host memory is everyone's")
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=64, dtype=dtype) as m:
        m.write_rows(start=0, rows=np.ones((4, WIDTH), np.float32))  # starts the device; what it runs is loaded to stay
    free = find_device(place.device).memory_free
    for share in (1.0, 1.5, 100.0):
        error, _ = too_big(place, FeatureDtype(dtype), share)
        assert str(error.bytes_needed) in str(error) and str(error.bytes_free) in str(error)
        assert error.bytes_needed > error.bytes_free
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=4096, dtype=dtype) as m:
        assert find_device(place.device).memory_free <= free - m.nbytes
        m.write_rows(start=0, rows=np.ones((4, WIDTH), np.float32))  # takes its staging
    assert find_device(place.device).memory_free == free


@pytest.mark.gpu
def test_a_gpus_staging_is_taken_when_rows_come_from_other_memory(
    place: Place, dtype: FeatureDtype, tensors: Tensors
) -> None:
    """Tensors on the device and snapshots need none. All in all it takes no more than was announced, to a driver's page of 2 MiB each
    for ring, counts, staging and temporaries."""
    if place.is_host:
        pytest.skip("host memory is everyone's")
    cap, page = 256, 2 * 2**20
    tensor = tensors.of(np.ones((cap, WIDTH), np.float32), place.device)

    def free() -> int:
        return find_device(place.device).memory_free

    def use(m: FeatureMirror) -> int:
        m.write_tensor(tensor, start=3)
        m.read_tensor(tensor, start=3, count=cap)
        m.restore(m.snapshot())
        return free()

    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype) as m:
        use(m)  # starts the device
        m.read(start=3, count=cap)
    before = free()
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype) as m:
        made = free()
        assert before - made <= m.size.ring + 2 * page
        without = use(m)
        assert made - without <= page or not place.own_code(dtype)  # ggml's operations need temporaries
        m.write_rows(start=3, rows=m.read(start=3, count=cap))
        assert without - free() > page
        assert before - free() <= m.size.ring + m.size.staging + 4 * page
    assert before - free() <= page


@pytest.mark.slow
def test_what_is_advised_can_be_made(place: Place) -> None:
    """A tenth less, for what others take meanwhile."""
    error, cap = too_big(place)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=error.max_cap * 9 // 10, dtype="f32") as m:
        assert_holds_rows_at_its_end(m)
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap * 9 // 10, dtype=error.fitting_dtypes[0]) as m:
        assert_holds_rows_at_its_end(m)


def assert_holds_rows_at_its_end(m: FeatureMirror) -> None:
    """Rows of small integers, which every dtype advised here stores exactly, around the ring's end."""
    rows = np.random.default_rng(1).integers(-100, 100, (4, m.width)).astype(np.float32)
    m.write_rows(start=m.cap - 2, rows=rows)
    np.testing.assert_array_equal(m.read(start=m.cap - 2, count=4), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q8_0", "f16", "f32"])
def test_ring_of_a_context_of_256k(place: Place, name: str, tensors: Tensors) -> None:
    """6.6, 12.5 and 25 GiB on a GPU: rows at either end, around it, and across each multiple of 4 GiB; from arrays and tensors."""
    if place.is_host:
        pytest.skip("of a GPU's memory")
    cap, row = 262144, reference.row_bytes(FeatureDtype(name), WIDTH)
    if find_device(place.device).memory_free < cap * row + 2**30:
        pytest.skip(f"needs {cap * row / 2**30:.1f} GiB of free memory")
    starts = sorted({0, *(edge // row - 2 for edge in range(2**32, cap * row, 2**32)), cap - 8})
    rows = [np.random.default_rng(s).integers(-127, 128, (5, WIDTH)).astype(np.float32) for s in starts]
    for x in rows:
        x[:, ::32] = 127  # so that q8_0 holds integers exactly: its scale is then 1
    source, target = tensors.new(WIDTH, 5), tensors.new(WIDTH, 5)
    tensors.allocate(place.device)
    slices = [tensors.view_2d(source, N_EMBD, 5, 4 * WIDTH, 4 * N_EMBD * tap) for tap in range(TAPS)]
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=name) as m:
        for i, (s, x) in enumerate(zip(starts, rows, strict=True)):
            tensors.set(source, x)
            if i % 3 == 0:
                m.write_rows(start=s, rows=x)
            elif i % 3 == 1:
                m.write_taps(slices, start=s)
            else:
                for tap in range(TAPS):
                    m.write_tensor(slices[tap], start=s, tap=tap)
        for s, x in zip(starts, rows, strict=True):
            m.read_tensor(target, start=s, count=5)
            np.testing.assert_array_equal(tensors.get(target, 5, WIDTH), x)
            np.testing.assert_array_equal(m.read(start=s, count=5), x)
        tensors.set(source, rows[0][::-1])
        m.write_tensor(source, start=cap - 2)  # two rows at the end, three at the beginning
        m.read_tensor(target, start=cap - 2, count=5)
        np.testing.assert_array_equal(tensors.get(target, 5, WIDTH), rows[0][::-1])
        np.testing.assert_array_equal(m.read(start=cap - 8, count=5), rows[-1])
        snapshot = m.snapshot()
        m.clear()
        m.restore(snapshot)
        for s, x in list(zip(starts, rows, strict=True))[1:]:
            np.testing.assert_array_equal(m.read(start=s, count=5), x)
        np.testing.assert_array_equal(m.read(start=cap - 2, count=5), rows[0][::-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f32", "f16"])
def test_offsets_beyond_32_bits(place: Place, name: str) -> None:
    """Rows on both sides of each multiple of 2^32 bytes, and of those that a truncated offset would hit instead."""
    row = reference.row_bytes(FeatureDtype(name), WIDTH)
    cap = 9 * 2**30 // row
    if find_device(place.device).memory_free < 10 * 2**30:
        pytest.skip("needs 10 GiB of free memory")
    with place.mirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=name) as m:
        assert m.nbytes > 2**33
        edges = [2**31 // row, 2**32 // row, 3 * 2**31 // row, 2**33 // row]
        starts = sorted({0, *(e - 1 for e in edges), cap - 3})
        rows = [np.random.default_rng(s).integers(-100, 100, (3, WIDTH)).astype(np.float32) for s in starts]
        for s, x in zip(starts, rows, strict=True):
            m.write_rows(start=s, rows=x)
        for tap in range(TAPS):
            m.write(tap=tap, start=starts[2], rows=rows[2][:, tap * N_EMBD : (tap + 1) * N_EMBD])
        snapshot = m.snapshot()
        for _ in range(2):
            for s, x in zip(starts, rows, strict=True):
                np.testing.assert_array_equal(m.read(start=s, count=3), x)
            m.clear()
            m.restore(snapshot)
