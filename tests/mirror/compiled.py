"""Parts of the native library that are compiled by themselves, for tests that reach what its C ABI does not show."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def compiled(library: Path, sources: Sequence[Path], *flags: str) -> ctypes.CDLL:
    """``library``, made of C++ ``sources``; without a compiler the test is skipped. ``flags``: libraries too, so they come last."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    common = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra"]
    subprocess.run([compiler, *common, *map(str, sources), "-o", str(library), *flags], check=True)
    return ctypes.CDLL(str(library))
