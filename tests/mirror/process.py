"""What may end a process is tried in one of its own."""

from __future__ import annotations

import subprocess
import sys

_START = "import numpy as np\nfrom ggml_mirror import FeatureMirror, GgmlMirrorError\n"


def assert_survives(code: str) -> None:
    """``code`` runs through, without a crash and without an exception."""
    done = subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-500:]}"
