"""Files that a command writes: checked before the work, written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ArgumentError

STDOUT = "-"


def check_writable(path: str | Path) -> None:
    """Raise ArgumentError if a file cannot be written at ``path``; nothing is created or changed.

    Long work is worthless if its result cannot be kept, so commands ask before they begin.
    """
    if str(path) == STDOUT:
        return
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise ArgumentError(f"cannot write {path}: it is a directory")
    if real.exists() and not os.access(real, os.W_OK):
        raise ArgumentError(f"cannot write {path}: permission denied")
    if real.exists() and not real.is_file():
        return  # a device or pipe is written in place
    if not real.parent.is_dir():
        raise ArgumentError(f"cannot write {path}: there is no directory {real.parent}")
    try:
        # The proof, where access bits say too much: read-only file systems, root.
        handle, probe = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    os.unlink(probe)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place."""
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        write(real)
        return
    try:
        # The suffix stays last: matplotlib takes the format from it.
        handle, name = tempfile.mkstemp(prefix=f".{real.stem}.", suffix=real.suffix, dir=real.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            mode = real.stat().st_mode & 0o777 if real.exists() else 0o666 & ~_umask()
            temporary.chmod(mode)  # mkstemp's own mode is for secrets
            temporary.replace(real)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(value: Any, path: str | Path) -> None:
    """Write ``value`` as JSON to a file, or to standard output for ``-``. Infinity and NaN are a bug and raise."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_atomically(path, lambda file: _write_text(file, text))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
