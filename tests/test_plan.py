"""Sizes against arithmetic on the gguf package's block sizes, and against what the allocator really refuses."""

from __future__ import annotations

import dataclasses
import json

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggml_mirror import FeatureMirror, devices, find_device, plan
from ggml_mirror.byte_size import format_bytes, parse_bytes
from ggml_mirror.dtype import FeatureDtype
from ggml_mirror.errors import ArgumentError, DeviceError, DtypeError, MirrorMemoryError, ShapeError
from ggml_mirror.mirror import mirror_size
from ggml_mirror.plan import MAX_CAP, device_bytes, fitting_dtypes, largest_cap
from ggml_mirror.row_source import row_source

MIB = 1024**2


def _row_bytes(dtype: str, width: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.upper()]]
    assert width % block == 0
    return width // block * size


# ---------------------------------------------------------------------------------------------------- exact bytes


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("f32", 26843545600), ("f16", 13421772800), ("bf16", 13421772800), ("q8_0", 7130316800), ("q4_0", 3774873600)],
)
def test_the_table_of_a_27b_target_at_256k_is_reproduced_to_the_byte(dtype: str, expected: int) -> None:
    assert plan(width=25600, cap=262144)[dtype].ring_bytes == expected
    assert plan(taps=5, n_embd=5120, cap=262144)[dtype].ring_bytes == expected


@given(taps=st.integers(1, 64), blocks=st.integers(1, 300), cap=st.integers(1, 2**20))
def test_bytes_of_every_dtype_follow_from_its_block_size(taps: int, blocks: int, cap: int) -> None:
    made = plan(taps=taps, n_embd=32 * blocks, cap=cap)
    assert [entry.dtype for entry in made.dtypes] == list(FeatureDtype)
    for entry in made.dtypes:
        row = _row_bytes(entry.dtype.value, taps * 32 * blocks)
        assert (entry.row_bytes, entry.ring_bytes) == (row, row * cap)


@given(width=st.sampled_from([32, 2880, 25600]), budget=st.integers(0, 2**45))
def test_the_budget_holds_the_largest_cap_and_not_one_row_more(width: int, budget: int) -> None:
    for entry in plan(width=width, cap=1, budget=budget).dtypes:
        assert entry.max_cap is not None
        assert entry.max_cap * entry.row_bytes <= budget
        assert (entry.max_cap + 1) * entry.row_bytes > budget or entry.max_cap == MAX_CAP


def test_a_budget_may_be_text() -> None:
    assert plan(width=25600, cap=1, budget="8GiB")["f32"].max_cap == 8 * 1024**3 // 102400 == 83886
    assert plan(width=25600, cap=1)["f32"].max_cap is None


def test_max_cap_is_the_allocators_own() -> None:
    mirror_size(1, 32, MAX_CAP, "q4_0")
    with pytest.raises(ArgumentError):
        mirror_size(1, 32, MAX_CAP + 1, "q4_0")


# -------------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize("dtype", list(FeatureDtype))
def test_planned_device_bytes_are_what_the_allocator_says_it_needs(dtype: FeatureDtype) -> None:
    cpu = find_device("cpu")
    cap = 2**20
    while device_bytes(mirror_size(5, 5120, cap, dtype), cpu) <= cpu.memory_total:
        cap *= 2
    with pytest.raises(MirrorMemoryError) as caught:
        FeatureMirror(taps=5, n_embd=5120, cap=cap, dtype=dtype)
    made = plan(taps=5, n_embd=5120, cap=cap, dtypes=[dtype], device="cpu")
    fit = made.devices[0].dtypes[dtype]
    assert fit.bytes == caught.value.bytes_needed
    assert not fit.fits
    assert made.devices[0].fitting == ()
    # What the error advises is the largest that fits into what it found free.
    free = caught.value.bytes_free
    assert device_bytes(mirror_size(5, 5120, caught.value.max_cap, dtype), cpu) <= free
    assert device_bytes(mirror_size(5, 5120, caught.value.max_cap + 1, dtype), cpu) > free


@given(
    dtype=st.sampled_from(list(FeatureDtype)),
    taps=st.integers(1, 8),
    blocks=st.integers(1, 200),
    free=st.integers(0, 2**40),
)
def test_largest_cap_fits_and_one_more_does_not(dtype: FeatureDtype, taps: int, blocks: int, free: int) -> None:
    for device in devices():
        cap = largest_cap(taps, 32 * blocks, dtype, free, device)

        def takes(rows: int, device=device) -> int:  # type: ignore[no-untyped-def]
            return device_bytes(mirror_size(taps, 32 * blocks, rows, dtype, device.index), device)

        assert cap == 0 or takes(cap) <= free
        assert cap == MAX_CAP or takes(cap + 1) > free


def test_fitting_dtypes_are_those_whose_bytes_fit() -> None:
    cpu = find_device("cpu")
    # 1000 rows of 25600: 97.7 MiB as f32, 48.8 as f16, 25.9 as q8_0, 18.3 as q5_1, 13.7 as q4_0.
    assert fitting_dtypes(5, 5120, 1000, 50 * MIB, cpu) == tuple(FeatureDtype)[1:]
    assert fitting_dtypes(5, 5120, 1000, 14 * MIB, cpu) == (FeatureDtype.Q4_0, FeatureDtype.IQ4_NL)
    assert fitting_dtypes(5, 5120, 1000, 1 * MIB, cpu) == ()


def test_every_device_is_planned_with_its_memory_or_the_one_that_was_named() -> None:
    made = plan(width=2880, cap=16)
    assert [d.name for d in made.devices] == [d.name for d in devices()]
    only = plan(width=2880, cap=16, device="CPU").devices
    assert [d.name for d in only] == ["CPU"]
    assert 0 < only[0].memory_free <= only[0].memory_total
    assert only[0].fitting == tuple(FeatureDtype)


# ---------------------------------------------------------------------------------------------------- rows, dtypes


def test_dtypes_whose_blocks_do_not_divide_a_tap_are_left_out_with_a_note() -> None:
    made = plan(taps=5, n_embd=48, cap=10)  # 240 values a row: not a multiple of 32 either
    assert [str(e.dtype) for e in made.dtypes] == ["f32", "f16", "bf16"]
    assert all(name in made.notes[0] for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "48"))
    # The taps of a row are apart: 2 x 48 = 96 values would divide, but no tap of 48 does.
    assert [str(e.dtype) for e in plan(taps=2, n_embd=48, cap=10).dtypes] == ["f32", "f16", "bf16"]
    assert plan(width=96, cap=10).notes == ()


def test_dtypes_that_were_asked_for_are_errors_instead() -> None:
    with pytest.raises(ShapeError, match=r"48 .*q4_0.* 32; use one of f32, f16, bf16$"):
        plan(taps=5, n_embd=48, cap=10, dtypes=["f32", "q4_0"])
    with pytest.raises(DtypeError, match="q9"):
        plan(width=96, cap=10, dtypes=["q9"])
    with pytest.raises(ArgumentError, match="no dtype"):
        plan(width=96, cap=10, dtypes=[])


def test_dtypes_keep_their_order_without_repeats() -> None:
    made = plan(width=96, cap=10, dtypes=["q8_0", "f32", "Q8_0"])
    assert [e.dtype.value for e in made.dtypes] == ["q8_0", "f32"]
    with pytest.raises(KeyError, match=r"bf16 is not in this plan"):
        made["bf16"]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"taps": 5},
        {"n_embd": 5120},
        {"width": 0},
        {"width": -32},
        {"taps": 0, "n_embd": 64},
        {"width": 100, "taps": 3},
        {"width": 100, "taps": 2, "n_embd": 64},
    ],
)
def test_rows_that_are_not_determined_or_contradict_themselves_are_refused(row: dict[str, int]) -> None:
    with pytest.raises(ArgumentError):
        plan(cap=1, **row)


@pytest.mark.parametrize("row", [{"width": 320, "taps": 5}, {"width": 320, "n_embd": 64}, {"taps": 5, "n_embd": 64}])
def test_any_two_of_width_taps_and_n_embd_give_the_third(row: dict[str, int]) -> None:
    made = plan(cap=1, **row)
    assert (made.width, made.taps, made.n_embd) == (320, 5, 64)


@pytest.mark.parametrize("cap", [0, -1, 2**31, 2**63, 10**30])
def test_impossible_caps_are_refused(cap: int) -> None:
    with pytest.raises(ArgumentError, match="cap"):
        plan(width=64, cap=cap)


def test_unknown_devices_and_negative_budgets_are_refused() -> None:
    with pytest.raises(DeviceError, match="nowhere"):
        plan(width=64, cap=1, device="nowhere")
    with pytest.raises(ArgumentError, match="negative"):
        plan(width=64, cap=1, budget=-1)


def test_a_plan_is_frozen_and_its_json_says_the_same() -> None:
    made = plan(taps=5, n_embd=576, cap=4112, budget=10 * MIB)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.cap = 1  # type: ignore[misc]
    back = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert (back["rows"], back["width"], back["cap"], back["budget_bytes"]) == ("raw", 2880, 4112, 10 * MIB)
    assert back["dtypes"]["q8_0"] == {"row_bytes": 3060, "ring_bytes": 3060 * 4112, "max_cap_in_budget": 3426}
    assert back["devices"][0]["dtypes"]["q8_0"]["fits"] is True


# --------------------------------------------------------------------------------------------------- sizes as text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 * 1024**3),
        ("8G", 8 * 1024**3),
        ("8 gib", 8 * 1024**3),
        ("8GB", 8 * 10**9),
        ("1.5MiB", 3 * MIB // 2),
        ("0.1KiB", 102),
        ("4096", 4096),
        ("7B", 7),
        ("9007199254740993", 2**53 + 1),
        ("0", 0),
    ],
)
def test_sizes_are_parsed_exactly(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 GiB free", "-1", "1e9", "8XiB", ".5GiB", "٣", "8,5GiB", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (102400, "100 KiB"),
        (111411200, "106.25 MiB"),
        (7130316800, "6.64 GiB"),
        (26843545600, "25 GiB"),
        (5000 * 1024**5, "5,000 PiB"),
    ],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_fused_rows_are_as_wide_as_the_draft() -> None:
    """262,144 positions of a 27B target in 0.70 GiB."""
    fused = plan(width=5120, cap=262144, rows="fused")
    assert (fused.rows, fused.taps, fused.n_embd) == ("fused", 1, 5120)
    assert fused["q4_0"].ring_bytes == fused["iq4_nl"].ring_bytes == 262144 * 2880
    assert fused["f32"].ring_bytes * 5 == plan(width=25600, cap=262144)["f32"].ring_bytes
    with pytest.raises(ArgumentError, match="one tap"):
        plan(taps=5, n_embd=5120, cap=8, rows="fused")
    with pytest.raises(ArgumentError, match="raw or fused"):
        plan(width=64, cap=8, rows="liquid")


@pytest.mark.parametrize(
    "row",
    [{"width": 5120}, {"n_embd": 5120}, {"taps": 5, "n_embd": 5120}, {"taps": 5, "width": 25600}, {"n_embd": 5120, "width": 25600}],
)  # fmt: skip
def test_a_raw_row_that_is_given_says_how_wide_a_fused_one_is(row: dict[str, int]) -> None:
    source = row_source(**row, rows="fused")
    made = plan(width=source.width, taps=source.taps, n_embd=source.n_embd, cap=8, rows=source.rows)
    assert (made.taps, made.n_embd) == (1, 5120)
