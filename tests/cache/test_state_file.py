"""State files: what safetensors itself reads, and no damage that goes unnoticed."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import stat
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ggml_mirror.cache import state_file
from ggml_mirror.cache.entry import Entry
from ggml_mirror.errors import CacheFileError

from .entries import entry_of, same_entry

FACTS = {"target": "0123", "dtype": "q8_0", "odd": 'ä " \\ \n'}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "one.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "sound.safetensors"
    state_file.write(path, entry_of(range(1, 70), first_row=60, scored=True), FACTS)
    return path


ENTRIES = {
    "whole": entry_of(range(1, 200)),
    "part": entry_of(range(1, 129), n_prompt=200, logits=False, first_row=50, first_cut=128),
    "no rows": entry_of([5] * 30, first_row=30),
    "scored": entry_of([0, 2**31 - 1, 7], scored=True),
    "odd sizes": entry_of([3], target_bytes=1),
    "pieces": entry_of(range(300), target_bytes=3 * state_file.PIECE - 10),
    "long": entry_of(np.arange(20_000) % 3000),  # its head is more than one read
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_written_comes_back(name: str, path: Path) -> None:
    entry = ENTRIES[name]
    head = state_file.write(path, entry, FACTS)
    assert (head.nbytes, head.facts) == (path.stat().st_size, FACTS)
    assert state_file.head_of(entry, FACTS).nbytes == head.nbytes  # known before anything is written
    assert state_file.read_head(path) == head
    again, back = state_file.read(path)
    assert again == head and same_entry(back, entry)


@pytest.mark.parametrize("name", ENTRIES)
def test_safetensors_reads_the_same(name: str, path: Path) -> None:
    entry = ENTRIES[name]
    state_file.write(path, entry, FACTS)
    with safe_open(path, "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    assert tensors["tokens"].astype(">u4").tobytes() == entry.key and tensors["tokens"].dtype == np.int32
    assert tensors["target"].tobytes() == entry.target
    for name in ("rows", "logits", "scores"):
        np.testing.assert_array_equal(tensors[name], getattr(entry, name))
    assert metadata["format"] == "ggml-mirror.prefix" and metadata["format_version"] == "1"
    assert json.loads(metadata["identity"]) == FACTS


def test_files_are_for_their_owner_alone_and_leave_nothing_else(path: Path) -> None:
    old = os.umask(0)
    try:
        state_file.write(path, ENTRIES["whole"], FACTS)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


# --------------------------------------------------------------------------------------------------------------- damage


def reason_of(path: Path, *, head_only: bool = False) -> str:
    with pytest.raises(CacheFileError) as error:
        (state_file.read_head if head_only else state_file.read)(path)
    assert str(path) in str(error.value)
    return error.value.reason


def test_every_byte_that_is_changed_is_noticed(sound: Path, path: Path) -> None:
    """Every third bit of the head, without reading the payload, and a bit of each byte of that."""
    data = sound.read_bytes()
    begin = state_file.read_head(sound).begin
    assert len(data) > begin + 1500
    for bit in [*range(0, 8 * begin, 3), *range(8 * begin, 8 * len(data), 9)]:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        assert reason_of(path, head_only=bit < 8 * begin) in ("corrupt", "version"), bit


def test_every_length_that_is_not_the_whole_is_noticed(sound: Path, path: Path) -> None:
    data = sound.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        assert reason_of(path, head_only=True) == "corrupt", length
    path.write_bytes(data + b"\0")
    assert reason_of(path, head_only=True) == "corrupt"


@given(st.integers(0, 10**6), st.integers(1, 300), st.sampled_from(["zero", "swap", "random"]))
def test_damaged_regions_are_noticed(sound: Path, tmp_path: Path, at: int, size: int, kind: str) -> None:
    data = bytearray(sound.read_bytes())
    at %= len(data)
    part = bytes(data[at : at + size])
    new = {"zero": bytes(len(part)), "swap": part[::-1], "random": np.random.default_rng(at).bytes(len(part))}[kind]
    data[at : at + size] = new
    (tmp_path / "x").write_bytes(data)
    if new != part:
        assert reason_of(tmp_path / "x") in ("corrupt", "version")


@pytest.mark.parametrize("length", [0, 1, 64 << 10, (64 << 10) + 1, 2**32, 2**63, 2**64 - 1])
def test_absurd_header_lengths(length: int, sound: Path, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", length) + sound.read_bytes()[8:])
    assert reason_of(path, head_only=True) == "corrupt"


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 60_000,
        b"{}",
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"format":"ggml-mirror.snapshot","format_version":"1"}}',
        b'{"__metadata__":{"format":"ggml-mirror.prefix","format_version":"1"}}',
        b"\xff\xfe",
        b"1e999999",
        b"9" * 5000,  # more digits than Python turns into a number
    ],
)
def test_strange_headers(header: bytes, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert reason_of(path, head_only=True) == "corrupt"


def edited(sound: Path, path: Path, **metadata: str) -> None:
    """The file with other metadata, otherwise well formed."""
    data = sound.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table["__metadata__"] |= metadata
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_other_versions_are_named(sound: Path, path: Path) -> None:
    edited(sound, path)
    state_file.read(path)  # the editing itself does no harm
    for version in ("0", "2"):
        edited(sound, path, format_version=version)
        assert reason_of(path, head_only=True) == "version"


@pytest.mark.parametrize(
    "metadata",
    [
        {"identity": json.dumps({**FACTS, "dtype": "f16"})},
        {"n_prompt": "70"},
        {"first_row": "59"},
        {"first_cut": "1"},
        {"first_row": "-1"},
        {"n_prompt": "99999999999999999999"},
        {"payload": "sha256:0"},
        {"more": "x"},
    ],
)
def test_metadata_cannot_be_exchanged(metadata: dict[str, str], sound: Path, path: Path) -> None:
    edited(sound, path, **metadata)
    assert reason_of(path, head_only=True) == "corrupt"


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "socket", "dangling"])
def test_what_is_no_regular_file_is_not_opened(kind: str, sound: Path, path: Path) -> None:
    if kind == "link":
        path.symlink_to(sound)
    elif kind == "dangling":
        path.symlink_to(sound.parent / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    else:
        path.mkdir()
    assert reason_of(path, head_only=True) in ("unsafe", "unreadable")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_other_users_are_not_read(sound: Path, path: Path) -> None:
    path.write_bytes(sound.read_bytes())
    os.chown(path, 12345, -1)
    assert reason_of(path, head_only=True) == "unsafe"


def test_a_file_that_shrinks_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state_file.write(path, ENTRIES["pieces"], FACTS)
    real = os.preadv

    def preadv(handle: int, buffers: list[memoryview], at: int) -> int:
        if at > state_file.PIECE:
            os.truncate(path, state_file.PIECE)
        return real(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    assert reason_of(path) == "corrupt"


def test_a_missing_file_is_an_error_of_its_own(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        state_file.read(path)


# ------------------------------------------------------------------------------------------------------------- atomicity


def test_a_reader_sees_the_old_file_or_the_new_one(path: Path) -> None:
    """While it is replaced again and again."""
    old, new = (entry_of(range(100), target_bytes=200_000, seed=seed) for seed in (1, 2))
    state_file.write(path, old, FACTS)
    done = threading.Event()

    def replace() -> None:
        for i in range(40):
            state_file.write(path, (old, new)[i % 2], FACTS)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen: list[Entry] = []
    while not done.is_set():
        seen.append(state_file.read(path)[1])
    writer.join()
    assert all(same_entry(entry, old) or same_entry(entry, new) for entry in seen) and len(seen) > 5


def test_a_write_that_fails_leaves_nothing(path: Path) -> None:
    """The system ends it in the middle of the payload."""
    state_file.write(path, ENTRIES["part"], FACTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError):
            state_file.write(path, entry_of(range(1, 129), target_bytes=200_000), FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(path.parent) == [path.name]
    assert same_entry(state_file.read(path)[1], ENTRIES["part"])


def test_abandoned_files_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    names = [".prefix-a.1.tmp", ".prefix-b.2.tmp", ".other.tmp", "prefix-c.safetensors", ".prefix-d"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".prefix-link.tmp").symlink_to(tmp_path / ".other.tmp")
    handle = os.open(tmp_path / names[1], os.O_WRONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert state_file.remove_abandoned(tmp_path, "prefix-") == 1
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], ".prefix-link.tmp"])
    os.close(handle)
    assert state_file.remove_abandoned(tmp_path, "prefix-") == 1
