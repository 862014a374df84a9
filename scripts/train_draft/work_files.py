"""Files in the work directory: written whole or not at all, so that a run that was cut off can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InputError

_HEAD = 16 << 20  # metadata, the vocabulary included, and the first tensors


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it into place.

    Raises:
        InputError: it cannot be written there.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # numpy and matplotlib look at the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    write_whole(path, lambda file: _write_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def identity(path: Path) -> str:
    """What tells one target from another: a digest of the file's size and first 16 MiB, its vocabulary among them.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256(str(path.stat().st_size).encode())
            digest.update(file.read(_HEAD))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
