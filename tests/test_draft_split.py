"""A draft and its target on two devices: see twin_device.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_with_two_devices() -> None:
    file = Path(__file__).with_name("twin_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
