"""Files of a prefix cache: one prompt each, the target's state and the mirror's rows, in safetensors format.

Format version 1:

===========  ========================  ==================================================================================
tensor       type, shape               content
===========  ========================  ==================================================================================
``tokens``   I32 ``[n]``               token ids
``target``   U8 ``[target_bytes]``     llama.cpp's state of the sequence
``rows``     U8 ``[m, row_bytes]``     rows of the last ``m`` positions as ggml lays them out
``logits``   F32 ``[0, 1; n_vocab]``   behind the last token, if that ends the prompt
``scores``   F32 ``[0, n; n_vocab]``   logits behind each token, of a model with ``logits_all``
===========  ========================  ==================================================================================

The tensors lie in this order, without gaps. Metadata (strings): ``format`` ("ggml-mirror.prefix"), ``format_version``, ``identity`` (JSON,
see :mod:`ggml_mirror.cache.identity`), ``n_prompt``, ``first_row``, ``first_cut`` (:class:`ggml_mirror.cache.entry.Coverage`),
``payload``: a checksum over everything behind the tokens, and ``head``: one over the other metadata, the shapes and the tokens. So a
file's head can be trusted before the rest is read.

A checksum is SHA-256 over the SHA-256 sums of pieces of 4 MiB, which several threads read and check at once. It is there
to find damage; it proves nothing about who wrote the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CacheFileError
from .entry import Coverage, Entry
from .prefix_index import key_tokens, token_key

FORMAT = "ggml-mirror.prefix"
FORMAT_VERSION = 1

PIECE = 4 << 20
_MAX_HEADER = 64 << 10
_MAX_BYTES = 2**62
_FIRST_READ = 32 << 10  # header and some thousand tokens in one read
_TEMPORARY = ".tmp"

_threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="ggml-mirror-file")


@dataclass(frozen=True)
class Head:
    """What a file says before its payload: read, checked, and kept in an index.

    Attributes:
        facts: of the identity.
        key: the tokens.
        scored: are there scores?
        payload: its checksum.
        begin: where the payload begins in the file.
    """

    facts: dict[str, str]
    key: bytes
    coverage: Coverage
    target_bytes: int
    row_bytes: int
    n_vocab: int
    scored: bool
    payload: str
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.begin + self.payload_bytes

    @property
    def payload_bytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.tensors().values())

    def tensors(self) -> dict[str, tuple[str, list[int], int]]:
        """Type, shape and bytes of the payload's tensors, in order."""
        n, width = self.coverage.n_tokens, self.n_vocab
        n_rows, n_logits, n_scores = n - self.coverage.first_row, int(self.coverage.logits), n * self.scored
        return {
            "target": ("U8", [self.target_bytes], self.target_bytes),
            "rows": ("U8", [n_rows, self.row_bytes], n_rows * self.row_bytes),
            "logits": ("F32", [n_logits, width], 4 * n_logits * width),
            "scores": ("F32", [n_scores, width], 4 * n_scores * width),
        }

    def encode(self) -> bytes:
        """The file up to its payload."""
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "identity": json.dumps(self.facts, sort_keys=True),
            "n_prompt": str(self.coverage.n_prompt),
            "first_row": str(self.coverage.first_row),
            "first_cut": str(self.coverage.first_cut),
            "payload": self.payload,
        }
        tensors, tokens = self.tensors(), key_tokens(self.key).astype("<i4").tobytes()
        head = hashlib.sha256(json.dumps([metadata, tensors]).encode())
        head.update(tokens)
        table: dict[str, Any] = {"__metadata__": {**metadata, "head": f"sha256:{head.hexdigest()}"}}
        at = 0
        for name, (kind, shape, nbytes) in {"tokens": ("I32", [len(tokens) // 4], len(tokens)), **tensors}.items():
            table[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + tokens

    def complete(self) -> Head:
        """With ``begin``."""
        return replace(self, begin=len(self.encode()))


def head_of(entry: Entry, facts: dict[str, str], payload: str = "") -> Head:
    """The head of an entry's file. Without the payload's checksum it has the same size."""
    return Head(
        facts=facts,
        key=entry.key,
        coverage=entry.coverage,
        target_bytes=len(entry.target),
        row_bytes=entry.rows.shape[1],
        n_vocab=entry.logits.shape[1],
        scored=bool(len(entry.scores)),
        payload=payload or _sum_of_sums([]),
    ).complete()


# --------------------------------------------------------------------------------------------------------------- writing


def write(path: Path, entry: Entry, facts: dict[str, str]) -> Head:
    """Write an entry's file, atomically and for its owner alone: readers see a whole file or none, a crash included.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    buffers = [_bytes_of(part) for part in (entry.target, entry.rows, entry.logits, entry.scores)]
    head = head_of(entry, facts, _checksum(buffers))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(4).hex()}{_TEMPORARY}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # The lock says that somebody is still at it: see remove_abandoned. It goes with the process, whatever ends that.
        with contextlib.suppress(OSError):  # some file systems have no locks; their abandoned files stay
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for buffer in (memoryview(head.encode()), *buffers):
            _write_all(handle, buffer)
        os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise
    finally:
        os.close(handle)
    _sync_directory(path.parent)
    return head


def remove_abandoned(directory: Path, prefix: str) -> int:
    """Remove the temporary files of ``prefix*`` whose writer is gone; return how many there were."""
    removed = 0
    for name in os.listdir(directory):
        if not (name.startswith(f".{prefix}") and name.endswith(_TEMPORARY)):
            continue
        try:
            handle = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(directory / name)
            removed += 1
        except OSError:
            pass  # in use, or no longer there
        finally:
            os.close(handle)
    return removed


def _write_all(handle: int, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        at += os.write(handle, buffer[at : at + (64 << 20)])


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


# --------------------------------------------------------------------------------------------------------------- reading


def read_head(path: Path) -> Head:
    """A file's head, verified; its payload is not read.

    Raises:
        CacheFileError: ``reason`` is "corrupt", "version", "unsafe" or "unreadable".
        FileNotFoundError: it is gone.
    """
    with _opened(path) as file:
        return _read_head(file)


def read(path: Path) -> tuple[Head, Entry]:
    """A whole file, verified. Arrays share one buffer.

    Raises:
        CacheFileError, FileNotFoundError: as :func:`read_head`.
        MemoryError: there is no room for it.
    """
    with _opened(path) as file:
        head = _read_head(file)
        # Read, not mapped: of a map, a file that is cut short or a failing disk would end the process.
        payload = np.empty(head.payload_bytes, np.uint8)
        starts = range(0, len(payload), PIECE)
        pieces = [_threads.submit(file.read_piece, payload[at : at + PIECE], head.begin + at) for at in starts]
        wait(pieces)  # all of them: none may read on when the file is closed
        if _sum_of_sums([piece.result() for piece in pieces]) != head.payload:
            raise CacheFileError(f"{path} is corrupt: its checksum does not match its content", reason="corrupt")
    return head, _entry(head, payload)


class _opened:
    """A regular file of this user, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _opened:
        try:
            # O_NONBLOCK: a pipe of that name must not hold up a start.
            self.handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = "unsafe" if self.path.is_symlink() else "unreadable"
            raise CacheFileError(f"cannot read {self.path}: {error.strerror}", reason=reason) from None
        info = os.fstat(self.handle)
        self.size = info.st_size
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            os.close(self.handle)
            raise CacheFileError(f"{self.path} is not a regular file of this user", reason="unsafe")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def read(self, count: int, at: int) -> bytes:
        try:
            return os.pread(self.handle, count, at)
        except OSError as error:
            raise self._unreadable(error) from None

    def read_piece(self, out: npt.NDArray[np.uint8], at: int) -> bytes:
        """Fill ``out`` from position ``at``; its SHA-256."""
        view, done = out.data, 0
        while done < len(view):
            try:
                got = os.preadv(self.handle, [view[done:]], at + done)
            except OSError as error:
                raise self._unreadable(error) from None
            if got == 0:
                raise CacheFileError(f"{self.path} ends early", reason="corrupt")
            done += got
        return hashlib.sha256(view).digest()

    def _unreadable(self, error: OSError) -> CacheFileError:
        return CacheFileError(f"cannot read {self.path}: {error.strerror}", reason="unreadable")


def _read_head(file: _opened) -> Head:
    def corrupt(what: str) -> CacheFileError:
        return CacheFileError(f"{file.path} is corrupt: {what}", reason="corrupt")

    start = file.read(_FIRST_READ, 0)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 0 < length <= min(_MAX_HEADER, file.size - 8):
        raise corrupt(f"its header is {length} bytes long, in a file of {file.size}")
    if len(start) < 8 + length:
        start = file.read(8 + length, 0)
    try:
        table = json.loads(start[8 : 8 + length])
        metadata = table["__metadata__"]
        kind, version = metadata["format"], metadata["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise corrupt("its header is not that of a cache file") from None
    if kind != FORMAT:
        raise corrupt(f"its format is {kind!r:.80}")
    if version != str(FORMAT_VERSION):
        raise CacheFileError(
            f"{file.path} has format version {version!r:.80}; this package reads version {FORMAT_VERSION}",
            reason="version",
        )
    try:
        (n,), (target_bytes,), (_, row_bytes) = (table[name]["shape"] for name in ("tokens", "target", "rows"))
        (n_logits, n_vocab), (n_scores, _) = (table[name]["shape"] for name in ("logits", "scores"))
        n_prompt, first_row, first_cut = (int(metadata[name]) for name in ("n_prompt", "first_row", "first_cut"))
        facts, payload = json.loads(metadata["identity"]), metadata["payload"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise corrupt("its header lacks parts") from None
    numbers = (n, target_bytes, row_bytes, n_vocab, n_logits, n_scores)
    if not all(type(x) is int and 0 <= x < _MAX_BYTES for x in numbers) or not isinstance(facts, dict):
        raise corrupt("its header is broken")
    if not (0 < n <= n_prompt < 2**31 and 0 <= first_row <= n and 0 <= first_cut <= n and 4 * n < file.size):
        raise corrupt("its header contradicts itself")
    end = 8 + length + 4 * n
    if len(start) < end:
        start = file.read(end, 0)
    if len(start) < end:
        raise corrupt("it ends early")
    head = Head(
        facts=facts,
        key=token_key(np.frombuffer(start[8 + length : end], "<i4")),
        coverage=Coverage(n, n_prompt, first_row, first_cut, logits=bool(n_logits)),
        target_bytes=target_bytes,
        row_bytes=row_bytes,
        n_vocab=n_vocab,
        scored=bool(n_scores),
        payload=payload,
    ).complete()
    # One comparison for all of it: names, types, shapes, offsets, padding, tokens and the head's checksum.
    if head.encode() != start[:end]:
        raise corrupt("its header does not match its checksum")
    if head.nbytes != file.size:
        raise corrupt(f"it has {file.size} bytes, {head.nbytes} were written")
    return head


def _entry(head: Head, payload: npt.NDArray[np.uint8]) -> Entry:
    parts: dict[str, Any] = {}
    at = 0
    for name, (kind, shape, nbytes) in head.tensors().items():
        parts[name] = payload[at : at + nbytes].view(np.uint8 if kind == "U8" else np.float32).reshape(shape)
        at += nbytes
    return Entry(head.key, head.coverage, **parts)


# ------------------------------------------------------------------------------------------------------------- checksums


def _checksum(buffers: Sequence[memoryview]) -> str:
    # By this thread alone: it works beside others that evaluate, and at exit, when pools no longer take work.
    return _sum_of_sums([_sum(piece) for piece in _pieces(buffers)])


def _pieces(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Pieces of the buffers' concatenation, without concatenating them."""
    piece: list[memoryview] = []
    room = PIECE
    for buffer in buffers:
        at = 0
        while at < len(buffer):
            part = buffer[at : at + room]
            piece.append(part)
            at, room = at + len(part), room - len(part)
            if room == 0:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece


def _sum(parts: list[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _sum_of_sums(sums: Sequence[bytes]) -> str:
    return f"sha256:{hashlib.sha256(b''.join(sums)).hexdigest()}"


def _bytes_of(part: Any) -> memoryview:
    return memoryview(part) if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
