"""Saving is atomic: there is the old file or the new one, whole, and nothing beside it."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ggml_mirror import Snapshot
from ggml_mirror import snapshot as snapshot_module
from ggml_mirror.errors import SnapshotError

from .places import CPU_LOOPS


def snapshot_of(value: float, rows: int = 3) -> Snapshot:
    with CPU_LOOPS.mirror(taps=1, n_embd=64, cap=max(rows, 4), dtype="f32") as m:
        m.write_rows(start=0, rows=np.full((rows, 64), value, np.float32))
        return m.snapshot()


def value_in(path: Path) -> float:
    rows = Snapshot.load(path).rows.view(np.float32)
    assert (rows == rows[0, 0]).all(), "a torn file"
    return float(rows[0, 0])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an older snapshot in it."""
    snapshot_of(1.0).save(tmp_path / "s")
    return tmp_path


def assert_untouched(folder: Path) -> None:
    assert [p.name for p in folder.iterdir()] == ["s"]
    assert value_in(folder / "s") == 1.0


def test_saving_replaces_an_older_file(folder: Path) -> None:
    snapshot_of(2.0).save(folder / "s")
    assert [p.name for p in folder.iterdir()] == ["s"]
    assert value_in(folder / "s") == 2.0


def test_path_may_be_text(tmp_path: Path) -> None:
    snapshot_of(2.0).save(str(tmp_path / "s"))
    assert value_in(tmp_path / "s") == 2.0


def test_saving_twice_loads_the_same(tmp_path: Path) -> None:
    snapshot = snapshot_of(2.0)
    snapshot.save(tmp_path / "a")
    Snapshot.load(tmp_path / "a").save(tmp_path / "b")
    a, b = Snapshot.load(tmp_path / "a"), Snapshot.load(tmp_path / "b")
    assert a.header == b.header and np.array_equal(a.rows, b.rows)


def test_full_disk_leaves_the_older_file(folder: Path) -> None:
    with file_size_limit(4096), pytest.raises(SnapshotError, match="cannot write snapshot"):
        snapshot_of(2.0, rows=1000).save(folder / "s")
    assert_untouched(folder)


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace", "tempfile.mkstemp"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_failure_at_any_step_leaves_the_older_file(
    folder: Path, step: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("no space")

    with monkeypatch.context() as patched:
        patched.setattr(f"{snapshot_module.__name__}.{step}", fail)
        with pytest.raises(SnapshotError if kind is OSError else kind):
            snapshot_of(2.0).save(folder / "s")
    assert_untouched(folder)


@pytest.mark.parametrize("name", ["missing/s", "s/below-a-file", "x" * 300])
def test_path_that_cannot_be_written_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(SnapshotError, match="cannot write snapshot"):
        snapshot_of(2.0).save(folder / name)
    assert_untouched(folder)


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SnapshotError):
        snapshot_of(2.0).save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_readers_see_a_whole_file_while_it_is_replaced(tmp_path: Path) -> None:
    path, done = tmp_path / "s", threading.Event()
    snapshots = [snapshot_of(float(i), rows=64) for i in range(4)]
    snapshots[0].save(path)

    def write() -> None:
        for i in range(150):
            snapshots[i % 4].save(path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(value_in(path))
    writer.join()
    assert len(seen) > 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
