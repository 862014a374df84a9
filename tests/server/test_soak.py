"""scripts/soak_server.py: a few hundred requests here, ten thousand in `make soak`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_server.py"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("requests", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_memory_is_flat_and_answers_are_right(requests: int, tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    # So few requests still fill pools.
    growth = "8MiB" if requests > 1000 else "32MiB"
    arguments = ["--requests", str(requests), "--growth", growth, "--json", str(report)]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["requests"] == requests and found["wrong"] == [] and found["exit_code"] == 0


def test_what_does_not_start_is_said() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--", "-m", "nowhere.gguf"], capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere.gguf" in done.stderr
