"""Snapshot files: the documented format, golden bytes, and that damage of any kind is noticed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ggml_mirror import FeatureMirror, Snapshot
from ggml_mirror.errors import SnapshotError
from ggml_mirror.snapshot import read_header

from . import snapshot_files
from .places import CPU_LOOPS

GOLDEN = Path(__file__).parent / "data" / "golden.snapshot"


def golden_mirror() -> FeatureMirror:
    """The mirror that golden.snapshot was saved from: exact q8_0 rows, wrapped, with a gap and a partial row."""
    m = CPU_LOOPS.mirror(taps=2, n_embd=32, cap=5, dtype="q8_0", target="golden-target", draft="golden-draft")
    x = (np.arange(8 * 64).reshape(8, 64) * 37 % 255 - 127).astype(np.float32) / 2
    x[:, ::32] = 63.5
    m.write_rows(start=0, rows=x)
    m.truncate(7)
    m.write(tap=1, start=8, rows=x[:1, :32])
    return m


def same(one: Snapshot, other: Snapshot) -> bool:
    arrays = ("positions", "tap_masks", "rows")
    return one.header == other.header and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Snapshot]:
    with golden_mirror() as m:
        snapshot = m.snapshot()
    snapshot.save(tmp_path / "file.snapshot")
    return tmp_path / "file.snapshot", snapshot


# ------------------------------------------------------------------------------------------------- format


def test_golden_file_loads() -> None:
    with golden_mirror() as m:
        snapshot = Snapshot.load(GOLDEN)
        assert same(snapshot, m.snapshot())
        assert snapshot.positions.tolist() == [4, 5, 6, 8]  # 7 was forgotten, 8 took the slot of 3
        assert snapshot.tap_masks.tolist() == [3, 3, 3, 2]
        m.clear()
        m.restore(snapshot)
        assert m.positions.tolist() == [4, 5, 6]


def test_saving_gives_the_golden_bytes(saved: tuple[Path, Snapshot]) -> None:
    """But for the order of the metadata, which safetensors does not fix."""
    ours, golden = saved[0].read_bytes(), GOLDEN.read_bytes()
    assert len(ours) == len(golden)
    size = int.from_bytes(golden[:8], "little")
    assert ours[:8] == golden[:8] and ours[8 + size :] == golden[8 + size :]
    assert json.loads(ours[8 : 8 + size]) == json.loads(golden[8 : 8 + size])


def test_file_built_from_the_documented_format_loads(tmp_path: Path) -> None:
    metadata, tensors = snapshot_files.good_tensors()
    snapshot = Snapshot.load(snapshot_files.write(tmp_path / "s", metadata, tensors))
    with CPU_LOOPS.mirror(taps=2, n_embd=32, cap=4, dtype="f32") as m:
        m.restore(snapshot)
        assert m.target == "golden-target" and m.draft is None
        np.testing.assert_array_equal(m.read(start=3, count=3), tensors["rows"].view(np.float32)[:3])


def test_file_that_is_saved_follows_the_documented_format(saved: tuple[Path, Snapshot]) -> None:
    raw = saved[0].read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, (code, dtype) in {
        "positions": ("I64", np.int64),
        "tap_masks": ("U64", np.uint64),
        "rows": ("U8", np.uint8),
    }.items():
        entry = header.pop(name)
        assert entry["dtype"] == code
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(raw[8 + size + first : 8 + size + last], dtype).reshape(entry["shape"])
    assert header == {}
    assert metadata.pop("checksum") == snapshot_files.checksum(metadata, tensors)
    want = {name: "" if value is None else str(value) for name, value in asdict(saved[1].header).items()}
    assert metadata == {"format": "ggml-mirror.snapshot", **want}
    assert np.array_equal(tensors["rows"], saved[1].rows)


def test_header_is_read_without_the_rows(saved: tuple[Path, Snapshot]) -> None:
    header = read_header(saved[0])
    assert header["checksum"].startswith("sha256:") and header["file_bytes"] == saved[0].stat().st_size
    assert {k: header[k] for k in asdict(saved[1].header)} == asdict(saved[1].header)


# ------------------------------------------------------------------------------------------------- damage


def assert_refused_or_harmless(path: Path, snapshot: Snapshot, what: str) -> bool:
    """Loading raises SnapshotError, naming the file (True), or gives what was saved: padding, order of keys."""
    try:
        loaded = Snapshot.load(path)
    except SnapshotError as error:
        assert str(path) in str(error)
        return True
    assert same(loaded, snapshot), what
    return False


def test_truncated_file_is_refused_wherever_it_ends(saved: tuple[Path, Snapshot]) -> None:
    path, _ = saved
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(SnapshotError):
            Snapshot.load(path)
        with pytest.raises(SnapshotError):
            read_header(path)


def test_every_flipped_byte_is_noticed(saved: tuple[Path, Snapshot]) -> None:
    path, snapshot = saved
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    harmless = []
    for i in range(len(raw)):
        for flip in (0x01, 0x20, 0x80):
            damaged = bytearray(raw)
            damaged[i] ^= flip
            path.write_bytes(damaged)
            if not assert_refused_or_harmless(path, snapshot, f"byte {i} ^ {flip:#x} was not noticed"):
                harmless.append(i)
    assert all(i < data for i in harmless), "no byte of the tensors may change unnoticed"
    assert len(harmless) < 20, f"only padding of the header may change: {harmless}"


@pytest.mark.parametrize("what", ["trailing byte", "leading byte", "twice", "a block of zeros", "two rows swapped"])
def test_other_damage_is_refused(saved: tuple[Path, Snapshot], what: str) -> None:
    path, snapshot = saved
    raw, row = path.read_bytes(), snapshot.header.row_bytes
    path.write_bytes(
        {
            "trailing byte": raw + b"\0",
            "leading byte": b"\0" + raw,
            "twice": raw + raw,
            "a block of zeros": raw[:-row] + bytes(row),
            "two rows swapped": raw.replace(snapshot.rows[0].tobytes(), b"*").replace(
                snapshot.rows[1].tobytes(), snapshot.rows[0].tobytes()
            ).replace(b"*", snapshot.rows[1].tobytes(), 1),
        }[what]
    )  # fmt: skip
    with pytest.raises(SnapshotError, match=r"corrupt|cannot read"):
        Snapshot.load(path)


@settings(max_examples=400)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(saved: tuple[Path, Snapshot], data: st.DataObject) -> None:
    """Pieces replaced, removed and inserted anywhere, most often in the header."""
    path, snapshot = saved
    with golden_mirror() as m:
        m.snapshot().save(path)
    raw = path.read_bytes()
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            first = data.draw(st.one_of(st.integers(0, len(raw)), st.integers(0, min(900, len(raw)))))
            last = min(first + data.draw(st.integers(0, 40)), len(raw))
            piece = data.draw(
                st.one_of(
                    st.binary(max_size=12),
                    st.sampled_from([b'"', b"}", b"-1", b"99999999999999999999", b"null", b"{}"]),
                )
            )
            raw = raw[:first] + piece + raw[last:]
        path.write_bytes(raw)
        assert_refused_or_harmless(path, snapshot, "damage was not noticed")
        try:
            read_header(path)
        except SnapshotError:
            pass
    finally:
        snapshot.save(path)


FOREIGN = {
    "empty": b"",
    "short": b"\x01",
    "text": b"not a snapshot\n" * 40,
    "gguf": b"GGUF\x03\0\0\0" + bytes(200),
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "header of 0 bytes": bytes(8),
    "no metadata": snapshot_files.encode(None, {"w": np.zeros(3, np.float32)}),
    "empty metadata": snapshot_files.encode({}, snapshot_files.good_tensors()[1]),
    "another safetensors": snapshot_files.encode({"format": "pt"}, {"w": np.zeros((2, 2), np.float32)}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@example(raw=b"")
@given(raw=st.binary(max_size=64))
@settings(max_examples=20)
def test_foreign_file_is_refused(kind: str, raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(FOREIGN[kind] + raw if kind != "empty" else raw)
    for read in (Snapshot.load, read_header):
        with pytest.raises(SnapshotError) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_model_file_is_refused(demo_target: Path) -> None:
    with pytest.raises(SnapshotError):
        Snapshot.load(demo_target)


@pytest.mark.parametrize("path", ["missing", ".", "missing/file"])
def test_path_that_is_no_file_is_refused(tmp_path: Path, path: str) -> None:
    for read in (Snapshot.load, read_header):
        with pytest.raises(SnapshotError):
            read(tmp_path / path)
