"""What must not be restored is refused with a typed error, and the mirror is as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggml_mirror import FeatureDtype, FeatureMirror, Snapshot
from ggml_mirror.errors import GgmlMirrorError, SnapshotError, SnapshotMismatchError
from ggml_mirror.snapshot import read_header

from . import snapshot_files
from .places import CPU_LOOPS, Place
from .snapshot_files import Tensors
from .unchanged import unchanged

OURS: dict[str, Any] = {"taps": 2, "n_embd": 64, "cap": 6, "dtype": "q8_0", "target": "target-a", "draft": "draft-a"}

OTHERS = [
    ("dtype", "f32"), ("dtype", "q5_0"), ("taps", 1), ("taps", 4), ("n_embd", 32), ("n_embd", 128), ("cap", 5),
    ("cap", 7), ("target", "target-b"), ("target", None), ("draft", "draft-b"), ("draft", None),
]  # fmt: skip


def filled(m: FeatureMirror) -> FeatureMirror:
    m.write_rows(start=2, rows=np.random.default_rng(m.width).standard_normal((7, m.width)).astype(np.float32))
    m.write(tap=0, start=9, rows=np.ones((1, m.n_embd), np.float32))
    return m


# ------------------------------------------------------------------------------------- of another mirror


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_snapshot_of_another_mirror_is_refused(place: Place, name: str, value: Any) -> None:
    with filled(place.mirror(**OURS)) as m, filled(place.mirror(**{**OURS, name: value})) as other:
        theirs = other.snapshot()
        with unchanged(m), pytest.raises(SnapshotMismatchError) as caught:
            m.restore(theirs)
        assert f"{name} {value or 'unknown'} (mirror: {OURS[name]})" in str(caught.value)


def test_snapshots_do_not_cross_dtypes(place: Place, dtype: FeatureDtype) -> None:
    """Not even between types of equal size."""
    with filled(place.mirror(taps=1, n_embd=256, cap=8, dtype=dtype)) as m:
        for other in FeatureDtype:
            if other is dtype:
                continue
            with filled(CPU_LOOPS.mirror(taps=1, n_embd=256, cap=8, dtype=other)) as theirs:
                snapshot = theirs.snapshot()
            with unchanged(m), pytest.raises(SnapshotMismatchError, match=f"dtype {other} .*{dtype}"):
                m.restore(snapshot)


def test_all_differences_are_named_at_once() -> None:
    with filled(CPU_LOOPS.mirror(**OURS)) as m:
        with CPU_LOOPS.mirror(taps=3, n_embd=32, cap=9, dtype="f16", target="target-b") as other:
            with pytest.raises(SnapshotMismatchError) as caught:
                m.restore(other.snapshot())
    for part in (
        "dtype f16",
        "taps 3",
        "n_embd 32",
        "cap 9",
        "target target-b",
        "draft unknown",
        "nothing was changed",
    ):
        assert part in str(caught.value)


def test_rows_of_another_kind_are_refused() -> None:
    with filled(CPU_LOOPS.mirror(**OURS)) as m:
        snapshot = m.snapshot()
        with unchanged(m), pytest.raises(SnapshotMismatchError, match="rows fused"):
            m.restore(replace(snapshot, header=replace(snapshot.header, rows="fused")))


# ---------------------------------------------------------------------- files that lie, with a right checksum


def _set(name: str, value: Any) -> Callable[[dict[str, str], Tensors], None]:
    return lambda metadata, tensors: metadata.__setitem__(name, value)


def _drop(name: str) -> Callable[[dict[str, str], Tensors], None]:
    return lambda metadata, tensors: metadata.__delitem__(name)


def _tensor(name: str, value: Any) -> Callable[[dict[str, str], Tensors], None]:
    return lambda metadata, tensors: tensors.__setitem__(name, value)


def _no_rows(metadata: dict[str, str], tensors: Tensors) -> None:
    for name in ("positions", "tap_masks", "rows"):
        tensors[name] = tensors[name][:0]


HEADER_LIES = {
    "version 2": _set("format_version", "2"),
    "version 01": _set("format_version", "01"),
    "no version": _drop("format_version"),
    "format": _set("format", "ggml-mirror.cache"),
    "dtype unknown": _set("dtype", "q6_k"),
    "dtype empty": _set("dtype", ""),
    "dtype of another size": _set("dtype", "f16"),
    "count larger": _set("count", "5"),
    "count smaller": _set("count", "3"),
    "count negative": _set("count", "-1"),
    "count zero": _set("count", "0"),
    "count text": _set("count", "four"),
    "count fraction": _set("count", "4.0"),
    "count beyond 64 bits": _set("count", str(2**70)),
    "taps zero": _set("taps", "0"),
    "taps negative": _set("taps", "-2"),
    "taps 3": _set("taps", "3"),
    "n_embd zero": _set("n_embd", "0"),
    "n_embd beyond 64 bits": _set("n_embd", str(2**70)),
    "row_bytes": _set("row_bytes", "128"),
    "cap smaller than count": _set("cap", "3"),
    "cap zero": _set("cap", "0"),
    "cap text": _set("cap", ""),
    "first_position": _set("first_position", "4"),
    "first_position -1": _set("first_position", "-1"),
    "no rows field": _drop("rows"),
    "no target field": _drop("target"),
    "no rows but a count": _no_rows,
}

TENSOR_LIES = {
    "positions float": _tensor("positions", np.array([3, 4, 5, 6], np.float32)),
    "positions unsigned": _tensor("positions", np.array([3, 4, 5, 6], np.uint64)),
    "positions in two dimensions": _tensor("positions", np.array([[3, 4, 5, 6]], np.int64)),
    "positions too few": _tensor("positions", np.array([3, 4, 5], np.int64)),
    "positions negative": _tensor("positions", np.array([3, 4, 5, -2], np.int64)),
    "positions that share a slot": _tensor("positions", np.array([3, 4, 5, 8], np.int64)),
    "positions beyond 2^62": _tensor("positions", np.array([3, 4, 5, 2**62 + 2], np.int64)),
    "positions twice": _tensor("positions", np.array([3, 4, 4, 6], np.int64)),
    "positions descending": _tensor("positions", np.array([3, 5, 4, 6], np.int64)),
    "masks too few": _tensor("tap_masks", np.array([3, 3, 3], np.uint64)),
    "masks with a third tap": _tensor("tap_masks", np.array([3, 3, 3, 5], np.uint64)),
    "mask of no tap": _tensor("tap_masks", np.array([3, 3, 3, 0], np.uint64)),
    "mask of all ones": _tensor("tap_masks", np.array([3, 3, 3, 2**64 - 1], np.uint64)),
    "rows too few": _tensor("rows", np.zeros((3, 256), np.uint8)),
    "rows too short": _tensor("rows", np.zeros((4, 255), np.uint8)),
    "rows in one dimension": _tensor("rows", np.zeros(1024, np.uint8)),
    "rows float": _tensor("rows", np.zeros((4, 64), np.float32)),
    "one more tensor": _tensor("more", np.zeros(2, np.uint8)),
}


def lying_file(path: Path, lie: Callable[[dict[str, str], Tensors], None]) -> Path:
    metadata, tensors = snapshot_files.good_tensors()
    lie(metadata, tensors)
    return snapshot_files.write(path, metadata, tensors)


@pytest.mark.parametrize("name", {**HEADER_LIES, **TENSOR_LIES})
def test_file_that_lies_is_not_loaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError):
        Snapshot.load(lying_file(tmp_path / "s", {**HEADER_LIES, **TENSOR_LIES}[name]))


@pytest.mark.parametrize("name", {**HEADER_LIES, **TENSOR_LIES})
def test_file_that_lies_changes_no_mirror(place: Place, name: str, tmp_path: Path) -> None:
    path = lying_file(tmp_path / "s", {**HEADER_LIES, **TENSOR_LIES}[name])
    with filled(place.mirror(taps=2, n_embd=32, cap=4, dtype="f32", target="golden-target")) as m:
        with unchanged(m), pytest.raises(GgmlMirrorError):
            m.restore(Snapshot.load(path))


@pytest.mark.parametrize("name", ["count larger", "row_bytes", "taps 3", "first_position -1", "dtype of another size"])
def test_header_that_contradicts_itself_is_not_reported(name: str, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError):
        read_header(lying_file(tmp_path / "s", HEADER_LIES[name]))


# ------------------------------------------------------------------------------ snapshots made by hand

HAND_MADE = {
    "fewer rows": lambda s: {"rows": s.rows[:1]},
    "fewer masks": lambda s: {"tap_masks": s.tap_masks[:1]},
    "rows too short": lambda s: {"rows": s.rows.ravel()[: -len(s.rows)].reshape(len(s.rows), -1)},
    "positions int32": lambda s: {"positions": s.positions.astype(np.int32).repeat(2)},
    "positions float": lambda s: {"positions": s.positions.astype(np.float64)},
    "masks int32": lambda s: {"tap_masks": s.tap_masks.astype(np.uint32).repeat(2)},
    "rows float": lambda s: {"rows": s.rows.astype(np.float32)},
    "count in the header": lambda s: {"header": replace(s.header, count=s.header.count - 1)},
}


@pytest.mark.parametrize("part", HAND_MADE)
def test_snapshot_whose_arrays_do_not_fit_its_header_is_refused(part: str) -> None:
    """The arrays here are no shorter in memory than what restore takes from them, so that it cannot crash this test."""
    with filled(CPU_LOOPS.mirror(**OURS)) as m:
        snapshot = m.snapshot()
        with unchanged(m), pytest.raises(GgmlMirrorError):
            m.restore(replace(snapshot, **HAND_MADE[part](snapshot)))


@pytest.mark.parametrize("thing", [None, "file.snapshot", 3, b""])
def test_what_is_no_snapshot_is_refused(thing: Any) -> None:
    with filled(CPU_LOOPS.mirror(**OURS)) as m, unchanged(m), pytest.raises(GgmlMirrorError):
        m.restore(thing)


def test_snapshot_of_arrays_in_any_layout_is_restored() -> None:
    """Strided and reversed copies mean the same values."""
    with filled(CPU_LOOPS.mirror(**OURS)) as m, CPU_LOOPS.mirror(**OURS) as twin:
        s = m.snapshot()
        twin.restore(
            replace(
                s,
                rows=np.asfortranarray(s.rows),
                positions=s.positions[::-1].copy()[::-1],
                tap_masks=s.tap_masks.repeat(2)[::2],
            )
        )
        np.testing.assert_array_equal(twin.snapshot().rows, s.rows)
        np.testing.assert_array_equal(twin.positions, m.positions)
