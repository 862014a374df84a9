"""The disk tier of a prefix cache: a directory of state files, shared by any number of processes without locks.

Files are only ever created whole, renamed into place and unlinked, never changed, and their names say whose they are and of which
tokens: ``prefix-<identity>-<digest of the tokens>.safetensors``. Two processes that write the same sequence write the same file. What
another process has added or removed is found when the directory's time of change moves.

The size cap counts files of this identity, those that turned out to be damaged included. Files of other identities or kinds are neither
counted nor removed. The files that were used last are kept: a use sets a file's modification time, so the order is common to all
processes. Processes that write at the same moment may exceed the cap by what they are writing.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..byte_size import format_bytes
from ..errors import ArgumentError, CacheFileError
from ..prompt_grid import PromptGrid
from . import state_file
from .counters import CacheCounters
from .entry import Coverage, Entry
from .identity import CacheIdentity
from .prefix_index import PrefixIndex

log = logging.getLogger("ggml_mirror.cache.prefix_cache")

_PREFIX = "prefix-"
_NAME = re.compile(rf"{_PREFIX}([0-9a-f]{{16}})-[0-9a-f]{{32}}\.safetensors")
_TIME_STEP_NS = 50_000_000  # file systems keep times in steps of some milliseconds


@dataclass(frozen=True)
class CachedFile:
    """A file of the index: what its head says."""

    name: str
    key: bytes
    coverage: Coverage
    nbytes: int


class DiskTier:
    """State files of one identity in a directory.

    Once it is made, nothing here raises for what the file system does: errors are counted, and logged as warnings.

    Args:
        directory: created, readable by its owner alone, if it does not exist.
        capacity_bytes: for the files of this identity together.

    Raises:
        ArgumentError: the path is something else than a directory, or cannot be made or used as one.
    """

    def __init__(
        self, directory: Path, capacity_bytes: int, identity: CacheIdentity, grid: PromptGrid, counters: CacheCounters
    ) -> None:
        self.directory = Path(os.path.abspath(os.path.expanduser(directory)))
        self.capacity_bytes = capacity_bytes
        self._identity, self._grid, self._counters = identity, grid, counters
        self._lock = threading.RLock()
        self._index: PrefixIndex[CachedFile] = PrefixIndex()
        self._sizes: dict[str, int] = {}  # of this identity's files, the unusable ones too
        self._keys: dict[str, bytes] = {}  # of those in the index
        self._others: set[str] = set()  # names that are not ours, told once
        self._scanned: int | None = None  # the directory's time of change, at the last look
        self._failing: set[str] = set()  # kinds of errors that were told since the last success
        if self.directory.exists() and not self.directory.is_dir():
            raise ArgumentError(f"{self.directory} is not a directory; name one for the prefix cache")
        try:
            self._make_directory()
            info = self.directory.stat()
            if info.st_mode & 0o022:
                log.warning("others may write to the cache directory %s; chmod 700 it", self.directory)
            self._counters.abandoned += state_file.remove_abandoned(self.directory, _PREFIX)
        except OSError as error:
            raise ArgumentError(
                f"{self.directory} cannot be used for the prefix cache: {error.strerror or error}; name a directory that can be written"
            ) from error
        self._make_room(0)  # the cap may have been larger

    # -------------------------------------------------------------------------------------------------------- reading

    @property
    def nbytes(self) -> int:
        """Bytes of this identity's files."""
        with self._lock:
            return sum(self._sizes.values())

    def __len__(self) -> int:
        with self._lock:
            return len(self._index)

    def nearest(self, key: bytes) -> Iterator[tuple[int, CachedFile]]:
        """As :meth:`PrefixIndex.nearest`; hold :attr:`lock` meanwhile."""
        return self._index.nearest(key)

    @property
    def lock(self) -> threading.RLock:
        return self._lock

    def load(self, file: CachedFile) -> Entry | None:
        """The file's entry, verified whole; None: it is gone or cannot be used, and no longer in the index."""
        path = self.directory / file.name
        try:
            head, entry = state_file.read(path)
            self._require_own(head, file.name)
            return entry
        except FileNotFoundError:
            self._scanned = None  # somebody else is at work here
        except CacheFileError as error:
            self._counters.skipped[error.reason] += 1
            log.warning("skipped: %s", error)
        except MemoryError:
            self._counters.skipped["memory"] += 1
            log.warning("skipped: %s needs %s of memory", path, format_bytes(file.nbytes))
            return None
        self.forget(file.key)
        return None

    def forget(self, key: bytes) -> None:
        """A sequence's file is not to be served again; it stays until its space is needed, or the sequence is stored anew."""
        with self._lock:
            self._index.remove(key)

    def touch(self, key: bytes) -> None:
        """A sequence was used: its file, if there is one, is kept longest."""
        with self._lock:
            file = self._index.get(key)
        if file is not None:
            self._set_time(file.name, time.time_ns())

    def _set_time(self, name: str, ns: int) -> None:
        """Say when a file was used. (The system's own times come in steps of some milliseconds.)"""
        try:
            os.utime(self.directory / name, ns=(ns, ns))
        except FileNotFoundError:
            self._scanned = None
        except OSError as error:
            self._failed("keep the time of use in", error)

    def refresh(self) -> None:
        """Take notice of files that came and went since the last look."""
        with self._lock:
            try:
                changed = self.directory.stat().st_mtime_ns
                if changed == self._scanned:
                    return
                with os.scandir(self.directory) as found:
                    files = {f.name: f for f in found if f.name.endswith(".safetensors")}
            except OSError as error:
                files, changed = {}, 0
                if error.errno != errno.ENOENT or self._sizes:
                    self._failed("list", error)
            self._take_notice(files)
            # A change within the same step of the clock would not show.
            self._scanned = changed if time.time_ns() - changed > _TIME_STEP_NS else None

    def _take_notice(self, files: dict[str, os.DirEntry[str]]) -> None:
        for name in self._sizes.keys() - files.keys():
            self._drop(name)
        skipped: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for name in files.keys() - self._sizes.keys() - self._others:
            try:
                self._admit(files[name])
            except FileNotFoundError:
                pass
            except CacheFileError as error:
                skipped[error.reason] += 1
                examples.setdefault(error.reason, str(error))
        self._others &= files.keys()
        self._counters.skipped.update(skipped)
        for reason, count in skipped.items():
            log.warning(
                "skipped %d %s in the cache directory (%s): %s",
                count,
                "file" if count == 1 else "files",
                reason,
                examples[reason],
            )

    def _admit(self, found: os.DirEntry[str]) -> None:
        name = found.name
        match = _NAME.fullmatch(name)
        if match is None or match[1] != self._identity.digest:
            self._others.add(name)
            if match is None:
                raise CacheFileError(f"{name} is none of a prefix cache", reason="foreign")
            raise CacheFileError(f"{name} is of another model or other parameters", reason="identity")
        self._sizes[name] = found.stat(follow_symlinks=False).st_size
        head = state_file.read_head(self.directory / name)
        self._require_own(head, name)
        self._add(head, name)

    def _add(self, head: state_file.Head, name: str) -> None:
        self._sizes[name], self._keys[name] = head.nbytes, head.key
        self._index.add(head.key, CachedFile(name, head.key, head.coverage, head.nbytes))

    def _require_own(self, head: state_file.Head, name: str) -> None:
        if head.facts != self._identity.facts:
            differences = self._identity.differences(head.facts)
            raise CacheFileError(f"{name} is of another model or other parameters: {differences}", reason="identity")
        if name != self._name(head.key):
            raise CacheFileError(f"{name} holds another sequence than its name says", reason="corrupt")

    # -------------------------------------------------------------------------------------------------------- writing

    def store(self, entry: Entry) -> None:
        """Write an entry's file, making room for it, unless the directory has one that brings back as much."""
        with self._lock:
            there = self._index.get(entry.key)
        if there is not None and there.coverage.covers(entry.coverage):
            self.touch(entry.key)
            return
        size = state_file.head_of(entry, self._identity.facts).nbytes
        if size > self.capacity_bytes:
            self._counters.not_stored["disk_too_large"] += 1
            return
        name = self._name(entry.key)
        try:
            self._make_directory()
            if not self._make_room(size, [file.name for file in self._superseded(entry)], replaced=name):
                self._counters.not_stored["disk_no_room"] += 1
                return
            head = state_file.write(self.directory / name, entry, self._identity.facts)
        except OSError as error:
            self._failed("write to", error)
            return
        self._failing.clear()
        self._counters.stored["disk"] += 1
        with self._lock:
            self._add(head, name)
            self._set_time(name, time.time_ns())
            for file in self._superseded(entry):
                self._set_time(file.name, 0)  # it goes first

    def _make_room(self, size: int, superseded: Sequence[str] = (), replaced: str = "") -> bool:
        """Remove ``superseded`` files, then those used longest ago, until ``size`` bytes fit; False: they do not."""
        with self._lock:
            self._scanned = None
            self.refresh()
            used = sum(self._sizes.values()) - self._sizes.get(replaced, 0)
            candidates = [*superseded, *(n for n in self._by_use() if n not in superseded and n != replaced)]
            while used + size > self.capacity_bytes and candidates:
                name = candidates.pop(0)
                used -= self._remove(name)
            return used + size <= self.capacity_bytes

    def _superseded(self, entry: Entry) -> list[CachedFile]:
        with self._lock:
            found = self._index.prefixes(entry.key)
        return [file for file in found if entry.coverage.supersedes(file.coverage, self._grid)]

    def _by_use(self) -> list[str]:
        """Names of this identity's files, the one used longest ago first."""
        times = {}
        for name in self._sizes:
            try:
                times[name] = os.stat(self.directory / name, follow_symlinks=False).st_mtime_ns
            except OSError:
                times[name] = 0
        return sorted(times, key=lambda name: times[name])

    def _remove(self, name: str) -> int:
        try:
            os.unlink(self.directory / name)
            self._counters.evictions["disk"] += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed("remove a file from", error)
            return 0
        return self._drop(name)

    def _drop(self, name: str) -> int:
        key = self._keys.pop(name, None)
        if key is not None:
            self._index.remove(key)
        return self._sizes.pop(name, 0)

    # ------------------------------------------------------------------------------------------------------------ names

    def _name(self, key: bytes) -> str:
        return f"{_PREFIX}{self._identity.digest}-{hashlib.sha256(key).hexdigest()[:32]}.safetensors"

    def _make_directory(self) -> None:
        if not self.directory.is_dir():
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)

    def _failed(self, what: str, error: OSError) -> None:
        kind = errno.errorcode.get(error.errno or 0, "unknown")
        self._counters.disk_errors[kind] += 1
        if kind not in self._failing:
            self._failing.add(kind)
            log.warning("cannot %s the cache directory %s: %s", what, self.directory, error.strerror or error)
