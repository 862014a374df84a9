"""Snapshot and restore of a mirror: storage bytes of the live rows, under a header that must match.

File format, version 1 (a safetensors file; its metadata values are strings):

=================  ======================  ==========================================================================
tensor             type, shape             content
=================  ======================  ==========================================================================
``positions``      I64 ``[n]``             token positions, strictly ascending, distinct modulo cap
``tap_masks``      U64 ``[n]``             bit k: tap k of the row was written (at least one is)
``rows``           U8 ``[n, row_bytes]``   stored rows as ggml lays them out; slices of taps that were not written are 0
=================  ======================  ==========================================================================

Metadata: ``format`` ("ggml-mirror.snapshot"), ``format_version``, ``rows`` ("raw", "fused"), ``dtype``, ``taps``, ``n_embd``, ``cap``,
``row_bytes``, ``first_position``, ``count``, ``target``, ``draft`` (fingerprints; empty: unknown) and ``checksum``: SHA-256 over the
other metadata and the three tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ._native import check, ffi, lib
from .dtype import FeatureDtype, row_bytes
from .errors import GgmlMirrorError, SnapshotError, SnapshotMismatchError
from .row_kind import FUSED, RAW

if TYPE_CHECKING:
    from .mirror import FeatureMirror

FORMAT = "ggml-mirror.snapshot"
FORMAT_VERSION = 1

#: Header fields that a mirror must share with a snapshot to take it. ``target`` and ``draft`` are compared apart.
_IDENTITY = ("rows", "dtype", "taps", "n_embd", "cap")


@dataclass(frozen=True)
class SnapshotHeader:
    """What a snapshot is of. ``first_position`` is -1 if it holds no row."""

    rows: str
    dtype: str
    taps: int
    n_embd: int
    cap: int
    row_bytes: int
    first_position: int
    count: int
    target: str | None
    draft: str | None
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, mirror: FeatureMirror, positions: npt.NDArray[np.int64]) -> SnapshotHeader:
        """Of rows of these positions, ascending, as the mirror stores them."""
        return cls(
            rows=mirror.rows,
            dtype=mirror.dtype.value,
            taps=mirror.taps,
            n_embd=mirror.n_embd,
            cap=mirror.cap,
            row_bytes=mirror.row_nbytes,
            first_position=int(positions[0]) if len(positions) else -1,
            count=len(positions),
            target=mirror.target,
            draft=mirror.draft,
        )

    def to_metadata(self) -> dict[str, str]:
        values = {name: "" if value is None else str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **values}

    def require_sound(self, where: str) -> None:
        """Raise SnapshotError unless the fields agree with each other."""
        try:
            FeatureDtype.parse(self.dtype)
            fits = row_bytes(self.dtype, self.n_embd) * self.taps == self.row_bytes
        except GgmlMirrorError as error:
            raise SnapshotError(f"{where} has a broken header: {error}") from None
        first = self.first_position
        if not (
            fits
            and 1 <= self.taps <= 64
            and 0 <= self.count <= self.cap < 2**31
            and self.cap >= 1
            and (self.rows == RAW or (self.rows == FUSED and self.taps == 1))
        ) or not (0 <= first < _MAX_POSITION if self.count else first == -1):
            raise SnapshotError(f"{where} has a broken header: its fields contradict each other: {self}")

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None, where: str) -> SnapshotHeader:
        metadata = metadata or {}
        if metadata.get("format") != FORMAT:
            raise SnapshotError(f"{where} is a safetensors file but not a mirror snapshot")
        version = metadata.get("format_version")
        if version != str(FORMAT_VERSION):
            raise SnapshotError(
                f"{where} has snapshot format version {version}; this package reads version {FORMAT_VERSION}"
            )
        try:
            values: dict[str, Any] = {}
            for field in fields(cls):
                text = metadata[field.name]
                values[field.name] = (
                    int(text) if field.type == "int" else (text or None if "None" in str(field.type) else text)
                )
            return cls(**values)
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"{where} has a broken header: {error!r}") from None


@dataclass(frozen=True)
class Snapshot:
    """Live rows of a mirror at one moment, in storage bytes.

    Attributes:
        header: what it is of.
        positions: int64 ``[n]``, ascending.
        tap_masks: uint64 ``[n]``, which taps of each row were written.
        rows: uint8 ``[n, row_bytes]``.

    Example:
        >>> import numpy as np
        >>> from ggml_mirror import FeatureMirror
        >>> with FeatureMirror(taps=1, n_embd=32, cap=8, dtype="q8_0") as m, FeatureMirror(taps=1, n_embd=32, cap=8, dtype="q8_0") as twin:
        ...     m.write_rows(start=0, rows=np.ones((10, 32), np.float32))
        ...     twin.restore(m.snapshot())
        ...     twin.positions.tolist()
        [2, 3, 4, 5, 6, 7, 8, 9]
    """

    header: SnapshotHeader
    positions: npt.NDArray[np.int64]
    tap_masks: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.positions.nbytes + self.tap_masks.nbytes

    @classmethod
    def take(cls, mirror: FeatureMirror) -> Snapshot:
        """Snapshot a mirror; partly written rows are kept with what they have."""
        with mirror._lock:
            positions, masks = mirror._live(complete_only=False)
            rows = mirror._new_rows(len(positions))
            check(
                lib.gm_mirror_save(
                    mirror._open(),
                    len(positions),
                    ffi.cast("int64_t *", positions.ctypes.data),
                    ffi.cast("uint8_t *", rows.ctypes.data),
                )
            )
            header = SnapshotHeader.of(mirror, positions)
        return cls(header, positions, masks, rows)

    def put(self, mirror: FeatureMirror) -> None:
        """Restore into a mirror: see :meth:`FeatureMirror.restore`."""
        with mirror._lock:
            handle = mirror._open()
            self.require_fit(mirror)
            self._require_sound("the snapshot")
            positions, masks, rows = (np.ascontiguousarray(a) for a in (self.positions, self.tap_masks, self.rows))
            check(
                lib.gm_mirror_load(
                    handle,
                    len(positions),
                    ffi.cast("int64_t *", positions.ctypes.data),
                    ffi.cast("uint64_t *", masks.ctypes.data),
                    ffi.cast("uint8_t *", rows.ctypes.data),
                )
            )
            mirror._tokens = mirror._source = None
            mirror.target, mirror.draft = mirror.target or self.header.target, mirror.draft or self.header.draft

    def require_fit(self, mirror: FeatureMirror) -> None:
        """Raise SnapshotMismatchError unless ``mirror`` could take this snapshot."""
        ours = {
            "rows": mirror.rows,
            "dtype": mirror.dtype.value,
            "taps": mirror.taps,
            "n_embd": mirror.n_embd,
            "cap": mirror.cap,
        }
        wrong = [
            f"{name} {getattr(self.header, name)} (mirror: {ours[name]})"
            for name in _IDENTITY
            if getattr(self.header, name) != ours[name]
        ]
        # A mirror that has not been told its models takes the snapshot's; one that has accepts no other.
        for name, own in (("target", mirror.target), ("draft", mirror.draft)):
            theirs = getattr(self.header, name)
            if own is not None and own != theirs:
                wrong.append(f"{name} {theirs or 'unknown'} (mirror: {own})")
        if wrong:
            raise SnapshotMismatchError(f"the snapshot is of another mirror: {', '.join(wrong)}; nothing was changed")

    # -------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot file, atomically: readers see the old file or the new one, whole.

        Raises:
            SnapshotError: the file cannot be written; an older file of that name is left as it was.
        """
        path = Path(path)
        tensors: dict[str, npt.NDArray[Any]] = {
            "positions": self.positions,
            "tap_masks": self.tap_masks,
            "rows": self.rows,
        }
        metadata = self.header.to_metadata()
        metadata["checksum"] = _checksum(metadata, tensors)
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            os.close(handle)
            save_file(tensors, temporary, metadata)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise SnapshotError(f"cannot write snapshot {path}: {error}") from error
        finally:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read a snapshot file and verify it whole.

        Raises:
            SnapshotError: missing, truncated, corrupt, foreign, or of another format version.
        """
        header, tensors = _read(path, _TENSORS)
        snapshot = cls(header, tensors["positions"], tensors["tap_masks"], tensors["rows"])
        snapshot._require_sound(str(path))
        return snapshot

    def _require_sound(self, where: str) -> None:
        """Arrays that are what the header says, and that a mirror can take."""
        h = self.header
        h.require_sound(where)
        for name, (dtype, shape) in _layout(h).items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                raise SnapshotError(
                    f"{where} is broken: {name} is not {dtype.__name__} {list(shape)}, as its header says"
                )
        positions, masks = self.positions, self.tap_masks
        if h.count == 0:
            return
        if positions[0] != h.first_position or positions[-1] > _MAX_POSITION or not (np.diff(positions) > 0).all():
            raise SnapshotError(f"{where} is broken: its positions do not ascend from {h.first_position}")
        # Ascending positions that span no more than cap share none.
        if positions[-1] - positions[0] >= h.cap and len(np.unique(positions % h.cap)) != h.count:
            raise SnapshotError(f"{where} is broken: two of its positions share a slot of {h.cap}")
        if not masks.all() or (h.taps < 64 and (masks >> np.uint64(h.taps)).any()):
            raise SnapshotError(f"{where} is broken: a row has no tap, or one beyond {h.taps}")


_MAX_POSITION = 2**62

_TENSORS = ("positions", "tap_masks", "rows")


def _layout(h: SnapshotHeader) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    return {
        "positions": (np.int64, (h.count,)),
        "tap_masks": (np.uint64, (h.count,)),
        "rows": (np.uint8, (h.count, h.row_bytes)),
    }


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A snapshot file's header as a dictionary, without reading its rows; also its size in bytes and its checksum.

    Raises:
        SnapshotError: as in :meth:`Snapshot.load`, but for damage inside the tensors, which only loading finds.
    """
    header, _ = _read(path, ())
    with safe_open(path, "numpy") as file:
        checksum = file.metadata()["checksum"]
    return {**asdict(header), "file_bytes": os.path.getsize(path), "checksum": checksum}


def _read(path: str | os.PathLike[str], names: tuple[str, ...]) -> tuple[SnapshotHeader, dict[str, npt.NDArray[Any]]]:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            header = SnapshotHeader.from_metadata(metadata, str(path))
            header.require_sound(str(path))
            if sorted(file.keys()) != sorted(_TENSORS) or "checksum" not in metadata:
                raise SnapshotError(f"{path} lacks parts of a snapshot")
            for name, (_, shape) in _layout(header).items():
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise SnapshotError(
                        f"{path} is broken: {name} has not the shape {list(shape)} that its header says"
                    )
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"cannot read snapshot {path}: {error}") from None
    if names and metadata["checksum"] != _checksum(metadata, tensors):
        raise SnapshotError(f"{path} is corrupt: its checksum does not match its content")
    return header, tensors


def _checksum(metadata: dict[str, str], tensors: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != "checksum"}, sort_keys=True).encode())
    for name in _TENSORS:
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return f"sha256:{digest.hexdigest()}"
