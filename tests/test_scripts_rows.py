"""scripts/bench_rows.py: what is timed by which clock, and what the goals look at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from bench_rows import SINGLE_CALL, Comparison, Shape, Timing, device_goals
from test_scripts_ab import run_script

from ggml_mirror import FeatureDtype


def test_single_calls_have_the_librarys_time_too(tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    run = run_script(
        "bench_rows.py",
        *"--width 1280 --rows 8 --cap 64 --dtypes q8_0 --repeat 5 --threads 1 --json".split(),
        str(report),
    )
    assert run.returncode == 0, run.stderr
    assert "in library us" in run.stdout
    timings = json.loads(report.read_text())["timings"]
    timed = {t["operation"] for t in timings if t["library_us"] is not None}
    assert timed == set(SINGLE_CALL)
    for t in timings:
        if t["library_us"] is not None:
            assert t["variant"] == "mirror"
            assert 0 < t["library_us"] < t["median_us"]


@pytest.mark.parametrize(
    ("operation", "library_us", "met"),
    [
        ("at once", 14.0, True),
        ("at once", 16.0, False),
        ("read", 9.0, True),
        ("read", 11.0, False),
        ("capture", None, False),
    ],
)
def test_goals_of_16_rows_are_those_of_the_library(operation: str, library_us: float | None, met: bool) -> None:
    timing = Timing(FeatureDtype.Q8_0, Shape(taps=5, n_embd=5120, rows=16, cap=64), operation, "mirror", {0: 18_000})
    if library_us is not None:
        timing.library_ns = {0: int(library_us * 1000)}
    (goal,) = device_goals(Comparison(timing, {"mirror": timing}))
    assert (goal.met, goal.reached) == (met, library_us or 18.0)
    assert ("library" in goal.what) == (library_us is not None)
