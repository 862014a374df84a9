"""Snapshot files built by hand from the documented format: safetensors, its metadata, and the checksum over both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]

_NAMES = {np.dtype(np.int64): "I64", np.dtype(np.uint64): "U64", np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}


def good_tensors(cap: int = 4, taps: int = 2, n_embd: int = 32) -> tuple[dict[str, str], Tensors]:
    """(metadata without checksum, tensors) of an f32 mirror that wrapped: positions 3..6, row 6 without tap 1."""
    values = np.arange(4 * taps * n_embd, dtype=np.float32).reshape(4, taps, n_embd) / 8
    values[3, 1] = 0
    tensors: Tensors = {
        "positions": np.array([3, 4, 5, 6], np.int64),
        "tap_masks": np.array([3, 3, 3, 1], np.uint64),
        "rows": values.reshape(4, -1).view(np.uint8),
    }
    metadata = {
        "format": "ggml-mirror.snapshot", "format_version": "1", "rows": "raw", "dtype": "f32", "taps": str(taps),
        "n_embd": str(n_embd), "cap": str(cap), "row_bytes": str(taps * n_embd * 4), "first_position": "3",
        "count": "4", "target": "golden-target", "draft": "",
    }  # fmt: skip
    return metadata, tensors


def checksum(metadata: dict[str, str], tensors: Tensors) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in ("positions", "tap_masks", "rows"):
        if name in tensors:
            digest.update(tensors[name].tobytes())
    return f"sha256:{digest.hexdigest()}"


def encode(metadata: dict[str, str] | None, tensors: Tensors) -> bytes:
    """A safetensors file: length of the header, JSON header, data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in tensors.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write(path: Path, metadata: dict[str, str], tensors: Tensors) -> Path:
    """With a checksum that is right, whatever the rest says."""
    path.write_bytes(encode({**metadata, "checksum": checksum(metadata, tensors)}, tensors))
    return path
