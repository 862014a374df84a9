"""safetensors files that are written whole or not at all, straight from memory, and verified whole when they are read.

A checksum over everything stands in the metadata; it is there to find damage, and proves nothing about who wrote the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from .errors import SnapshotError

Tensors = Mapping[str, npt.NDArray[Any]]

_CODES = {"uint8": "U8", "int32": "I32", "int64": "I64", "uint64": "U64", "float32": "F32"}
_CHECKSUM = "checksum"


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a file for its owner alone: readers see the old file of that name or the new one, whole.

    ``safetensors.numpy.save_file`` would copy every tensor once more; a state can be most of the memory.

    Raises:
        SnapshotError: it cannot be written; an older file is left as it was.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    table: dict[str, Any] = {"__metadata__": {**metadata, _CHECKSUM: _checksum(metadata, arrays)}}
    at = 0
    for name, array in arrays.items():
        table[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    real = Path(os.path.realpath(path))
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}.", suffix=".tmp")  # mode 0600
        with open(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except OSError as error:
        raise SnapshotError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read_tensors(path: Path, format: str, version: int, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors that are there of ``names``, and the metadata.

    Raises:
        SnapshotError: missing, truncated, corrupt, of another format or version, or with other tensors.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != format:
                raise SnapshotError(f"{path} is a safetensors file, but not of format {format}")
            if metadata.get("format_version") != str(version):
                raise SnapshotError(
                    f"{path} has format version {metadata.get('format_version')}; this package reads version {version}"
                )
            tensors = {name: file.get_tensor(name) for name in names if name in file.keys()}
            foreign = set(file.keys()) - set(tensors)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"cannot read {path}: {error}") from None
    if foreign:
        raise SnapshotError(f"{path} is corrupt: it has a tensor named {sorted(foreign)[0]!r}")
    if metadata.pop(_CHECKSUM, None) != _checksum(metadata, tensors):
        raise SnapshotError(f"{path} is corrupt: its checksum does not match its content")
    return tensors, metadata


def _checksum(metadata: Mapping[str, str], tensors: Tensors) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}".encode())
        digest.update(array.data)
    return f"sha256:{digest.hexdigest()}"
