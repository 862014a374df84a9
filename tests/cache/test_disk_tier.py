"""The disk tier: a cap that holds, the order of use, neighbours in the directory, and a file system that fails."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ggml_mirror.cache import state_file
from ggml_mirror.cache.counters import CacheCounters
from ggml_mirror.cache.disk_tier import CachedFile, DiskTier
from ggml_mirror.cache.entry import Entry
from ggml_mirror.cache.identity import CacheIdentity
from ggml_mirror.errors import ArgumentError

from .entries import GRID, entry_of, same_entry

IDENTITY = CacheIdentity({"target": "a", "dtype": "q8_0"})
A, B, C = (entry_of([token] * 100, target_bytes=1000) for token in (1, 2, 3))
SIZE = state_file.head_of(A, IDENTITY.facts).nbytes


def tier_of(directory: Path, capacity: int = 1 << 30, identity: CacheIdentity = IDENTITY) -> DiskTier:
    return DiskTier(directory, capacity, identity, GRID, CacheCounters())


def found(tier: DiskTier, entry: Entry) -> Entry | None:
    """What the tier has of these very tokens, read from its file."""
    files = [file for _, file in tier.nearest(entry.key) if file.key == entry.key]
    return tier.load(files[0]) if files else None


def holds(tier: DiskTier, *entries: Entry) -> bool:
    return [bool(e := found(tier, entry)) and same_entry(e, entry) for entry in entries] == [True] * len(entries)


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "here"


# ------------------------------------------------------------------------------------------------------- store and load


def test_entries_survive_the_object(directory: Path) -> None:
    tier = tier_of(directory)
    for entry in (A, B):
        tier.store(entry)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    again = tier_of(directory)
    assert holds(again, A, B) and found(again, C) is None
    assert len(again) == 2 and again.nbytes == tier.nbytes == sum(f.stat().st_size for f in files_in(directory))


def test_start_reads_heads_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = tier_of(directory)
    for token in range(1, 30):
        tier.store(entry_of([token] * 100, target_bytes=200_000))
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, n, at: read.append(len(data := real(handle, n, at))) or data)
    assert len(tier_of(directory)) == 29
    assert max(read) <= 32 << 10 and len(read) == 29


def test_a_sequence_is_written_once(directory: Path) -> None:
    tier = tier_of(directory)
    tier.store(A)
    before = files_in(directory)[0].stat()
    tier.store(A)
    after = files_in(directory)[0].stat()
    assert before.st_ino == after.st_ino and after.st_mtime_ns > before.st_mtime_ns  # used, not written
    better = entry_of([1] * 100, target_bytes=1000, first_row=0, seed=9)
    worse = entry_of([1] * 100, target_bytes=1000, first_row=50)
    tier.store(worse)
    assert holds(tier, A)
    tier = tier_of(directory.parent / "other")
    tier.store(worse)
    tier.store(better)
    assert holds(tier, better) and len(files_in(directory.parent / "other")) == 1


def test_what_is_superseded_goes_first(directory: Path) -> None:
    """When there is need: at once, or later."""
    short, long, other = entry_of([5] * 200), entry_of([5] * 300), entry_of([6] * 300)
    size = {e.key: state_file.head_of(e, IDENTITY.facts).nbytes for e in (short, long, other)}
    tier = tier_of(directory, size[long.key] + size[other.key])
    for entry in (other, short, long):
        tier.store(entry)
    assert holds(tier, other, long) and len(files_in(directory)) == 2
    roomy = tier_of(directory.parent / "roomy", sum(size.values()))
    for entry in (other, short, long):
        roomy.store(entry)
    assert holds(roomy, other, short, long)
    roomy.store(A)
    assert holds(roomy, other, long, A) and found(roomy, short) is None


class DiskTierMachine(RuleBasedStateMachine):
    """Two processes' worth of tiers in one directory; the model is a list, the one used longest ago first."""

    capacity = 3 * SIZE + 500

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.tiers = [tier_of(self.directory, self.capacity) for _ in range(2)]
        self.model: list[Entry] = []

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    @rule(which=st.integers(0, 1), token=st.integers(1, 6), extra=st.sampled_from([0, 400, 2 * SIZE, 4 * SIZE]))
    def store(self, which: int, token: int, extra: int) -> None:
        entry = entry_of([token, extra] * 50, target_bytes=1000 + extra)
        size = state_file.head_of(entry, IDENTITY.facts).nbytes
        self.tiers[which].refresh()
        self.tiers[which].store(entry)
        there = [old for old in self.model if old.key == entry.key]
        if there or size <= self.capacity:
            self.model = [old for old in self.model if old.key != entry.key]
            sizes = [state_file.head_of(old, IDENTITY.facts).nbytes for old in self.model]
            while sum(sizes) + size > self.capacity:
                del self.model[0], sizes[0]
            self.model.append(entry)

    @rule(which=st.integers(0, 1), index=st.integers(0, 5))
    def use(self, which: int, index: int) -> None:
        if self.model:
            entry = self.model.pop(index % len(self.model))
            self.model.append(entry)
            self.tiers[which].refresh()
            self.tiers[which].touch(entry.key)

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.tiers[which] = tier_of(self.directory, self.capacity)

    @invariant()
    def same(self) -> None:
        for tier in self.tiers:
            tier.refresh()
            assert holds(tier, *self.model) and len(tier) == len(self.model)
            assert tier.nbytes == sum(f.stat().st_size for f in files_in(self.directory)) <= self.capacity
            assert not tier._counters.disk_errors and not tier._counters.skipped


DiskTierMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15)
TestDiskTier = DiskTierMachine.TestCase


def test_a_smaller_cap_holds_from_the_start(directory: Path) -> None:
    tier = tier_of(directory)
    for entry in (A, B, C):
        tier.store(entry)
    tier.touch(A.key)
    tier = tier_of(directory, 2 * SIZE)
    assert holds(tier, A, C) and tier.nbytes == 2 * SIZE and tier._counters.evictions == {"disk": 1}


def test_too_large(directory: Path) -> None:
    tier = tier_of(directory, SIZE - 1)
    tier.store(A)
    assert files_in(directory) == [] and tier._counters.not_stored == {"disk_too_large": 1}


# ------------------------------------------------------------------------------------------------------- what is skipped


def only_file(tier: DiskTier) -> Path:
    (path,) = files_in(tier.directory)
    return path


def test_other_models_and_strangers_are_neither_used_nor_counted_nor_removed(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = CacheIdentity({"target": "a", "dtype": "f16"})
    tier_of(directory, identity=other).store(entry_of([1] * 100, target_bytes=50_000))
    (directory / "model.safetensors").write_bytes(bytes(50_000))
    (directory / "notes.txt").write_bytes(b"mine")
    strangers = sorted(directory.iterdir())
    tier = tier_of(directory, 2 * SIZE)
    assert len(tier) == tier.nbytes == 0
    assert tier._counters.skipped == {"identity": 1, "foreign": 1}
    assert "model.safetensors" in caplog.text
    for entry in (A, B, C):
        tier.store(entry)
    assert holds(tier, B, C) and set(strangers) < set(directory.iterdir())
    assert tier._counters.skipped == {"identity": 1, "foreign": 1}, "they were told once"


def test_an_identity_in_a_name_is_not_believed(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that was renamed to be ours says itself whose it is."""
    other = CacheIdentity({"target": "a", "dtype": "f16"})
    theirs = tier_of(directory, identity=other)
    theirs.store(A)
    path = only_file(theirs)
    path.rename(path.with_name(path.name.replace(other.digest, IDENTITY.digest)))
    tier = tier_of(directory)
    assert len(tier) == 0 and tier._counters.skipped == {"identity": 1}
    assert "dtype 'f16' (here 'q8_0')" in caplog.text


def test_a_sequence_under_another_s_name(directory: Path) -> None:
    tier = tier_of(directory)
    tier.store(A)
    first = only_file(tier)
    tier.store(B)
    (second,) = set(files_in(directory)) - {first}
    shutil.copy(first, second)
    again = tier_of(directory)
    assert holds(again, A) and len(again) == 1 and again._counters.skipped == {"corrupt": 1}


@pytest.mark.parametrize("when", ["before the start", "after the start"])
@pytest.mark.parametrize("where", ["head", "payload", "end"])
def test_damage_is_counted_told_and_mended_by_storing_again(
    where: str, when: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tier_of(directory)
    tier.store(A)
    path = only_file(tier)
    data = bytearray(path.read_bytes())
    if where == "end":
        del data[-1]
    else:
        data[60 if where == "head" else len(data) // 2] ^= 4
    if when == "before the start":
        path.write_bytes(data)
        tier = tier_of(directory)
    else:
        tier = tier_of(directory)
        path.write_bytes(data)
    assert found(tier, A) is None
    assert tier._counters.skipped == {"corrupt": 1} and "corrupt" in caplog.text and path.name in caplog.text
    assert found(tier, A) is None and tier._counters.skipped == {"corrupt": 1}, "it is tried once"
    tier.store(A)
    assert holds(tier, A) and holds(tier_of(directory), A)


def test_damaged_files_count_against_the_cap_and_go_like_others(directory: Path) -> None:
    tier = tier_of(directory)
    tier.store(A)
    path = only_file(tier)
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (1, 1))
    tier = tier_of(directory, 2 * SIZE)
    assert tier.nbytes == SIZE - 1 and len(tier) == 0
    tier.store(B)
    tier.store(C)
    assert holds(tier, B, C) and not path.exists()


def test_older_versions_are_skipped_and_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "FORMAT_VERSION", 0)
    tier_of(directory).store(A)
    monkeypatch.undo()
    tier = tier_of(directory)
    assert found(tier, A) is None and tier._counters.skipped == {"version": 1}
    tier.store(A)
    assert holds(tier_of(directory), A)


# ------------------------------------------------------------------------------------------------------- neighbours


def test_what_others_write_and_remove_is_noticed(directory: Path) -> None:
    mine, theirs = tier_of(directory), tier_of(directory)
    theirs.store(A)
    mine.refresh()
    assert holds(mine, A)
    file = next(iter(mine.nearest(A.key)))[1]
    only_file(mine).unlink()
    assert mine.load(file) is None, "gone between lookup and load"
    mine.refresh()
    assert len(mine) == mine.nbytes == 0 and not mine._counters.skipped and not mine._counters.disk_errors


def test_a_killed_writer_s_file_is_removed_at_the_next_start(directory: Path) -> None:
    tier_of(directory).store(A)
    (directory / ".prefix-x.1.0.tmp").write_bytes(b"half")
    tier = tier_of(directory)
    assert tier._counters.abandoned == 1 and [p.name for p in directory.iterdir()] == [only_file(tier).name]


# ------------------------------------------------------------------------------------------------------- failures


def test_a_file_for_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArgumentError, match="not a directory"):
        tier_of(tmp_path / "file")


def test_a_directory_that_is_removed_comes_back(directory: Path) -> None:
    tier = tier_of(directory)
    tier.store(A)
    shutil.rmtree(directory)
    assert found(tier, A) is None
    tier.refresh()
    assert len(tier) == tier.nbytes == 0
    tier.store(B)
    assert holds(tier, B) and not tier._counters.skipped


def test_a_directory_that_becomes_a_file(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = tier_of(directory)
    tier.store(A)
    shutil.rmtree(directory)
    directory.write_bytes(b"")
    for _ in range(3):
        tier.store(B)
        tier.refresh()
    assert len(tier) == 0 and sum(tier._counters.disk_errors.values()) >= 3
    assert 1 <= len([r for r in caplog.records if r.levelno == logging.WARNING]) <= 3, "not each time"


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A directory of root's, and this process without root's rights."""
    if os.geteuid() != 0:
        pytest.skip("only root can drop its rights")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_permission_denied(as_nobody: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that cannot be made is refused; in one that cannot be written to, nothing is kept."""
    with pytest.raises(ArgumentError, match=r"new cannot be used .*Permission denied; name a directory"):
        tier_of(as_nobody / "new")
    tier = tier_of(as_nobody)
    tier.store(A)
    assert len(tier) == 0 and tier._counters.disk_errors["EACCES"] >= 1 and tier._counters.stored == {}
    assert "Permission denied" in caplog.text


def test_a_read_only_directory_still_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of entries that are there; new ones cannot be kept."""
    if os.geteuid() != 0:
        pytest.skip("only root can drop its rights")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
        tier_of(folder).store(A)
        folder.chmod(0o500)
        tier = tier_of(folder)
        assert holds(tier, A)
        tier.store(B)
        tier.touch(A.key)
        assert holds(tier, A) and len(files_in(folder)) == 1 and tier._counters.disk_errors["EACCES"] == 1
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real one, of 256 KiB: what does not fit is not kept, what is there is served, and what fits again is kept again."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system")
    try:
        tier = tier_of(mount / "cache")
        tier.store(A)
        tier.store(entry_of([9] * 100, target_bytes=300_000))
        assert tier._counters.disk_errors == {"ENOSPC": 1} and "No space left" in caplog.text
        assert holds(tier, A) and len(list((mount / "cache").iterdir())) == 1, "nothing is left of it"
        tier.store(B)
        assert holds(tier, A, B)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_others_who_may_write_are_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    tier_of(directory)
    assert "others may write" in caplog.text and stat.S_IMODE(directory.stat().st_mode) == 0o777


def test_cached_file_of_a_replaced_file(directory: Path) -> None:
    """The head that was indexed may be of an older file of the same name: what is loaded says what it is."""
    mine, theirs = tier_of(directory), tier_of(directory)
    worse, better = entry_of([4] * 100, first_row=80), entry_of([4] * 100)
    theirs.store(worse)
    mine.refresh()
    file: CachedFile = next(iter(mine.nearest(worse.key)))[1]
    theirs.store(better)
    entry = mine.load(file)
    assert entry is not None and same_entry(entry, better)
