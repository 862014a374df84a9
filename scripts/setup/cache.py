"""The per-user cache that all checkouts share, and the lock and the rename that keep it whole."""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_dir(name: str) -> Path:
    """Directory `name` of the cache: $GGML_MIRROR_CACHE, or ggml-mirror under $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("GGML_MIRROR_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ggml-mirror")
    path = Path(root).absolute() / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. The kernel releases it however this process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def work_dir(parent: Path, name: str) -> Iterator[Path]:
    """A directory inside `parent`, so that a rename from it is atomic; removed afterwards. Call with the lock held."""
    prefix = f".{name}."
    for left in parent.glob(f"{prefix}*"):  # from a process that was killed: nobody else holds the lock
        shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def say(message: str) -> None:
    """Progress goes to stderr: stdout carries paths for make."""
    print(f"setup: {message}", file=sys.stderr, flush=True)
