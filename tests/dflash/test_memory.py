"""Too little memory for draft and mirror, by real limits in a process of its own: a typed error that says what would do, nothing left
behind, and a next one works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mirror.process import assert_survives
from tiny_models import write_tiny_draft, write_tiny_model

from ggml_mirror import find_device
from ggml_mirror.draft import DraftSpec, draft_bytes
from ggml_mirror.mirror import mirror_size
from ggml_mirror.model_info import ModelInfo

MIB = 2**20
WINDOW, BLOCK, N_VOCAB = 20000, 8, 288


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The draft's weights are 44 MiB, so that they cannot hide in what the allocator keeps."""
    folder = tmp_path_factory.mktemp("models")
    return (
        write_tiny_model(folder / "target.gguf", n_ctx=32768),
        write_tiny_draft(folder / "draft.gguf", n_ff=60000),
    )


@pytest.fixture(scope="module")
def needed(models: tuple[Path, Path]) -> tuple[int, int]:
    """Bytes of the draft, and of an f32 mirror."""
    spec, device = DraftSpec.read(models[1], ModelInfo.read(models[0])), find_device("cpu").index
    size = mirror_size(5, 64, WINDOW + BLOCK, "f32", device)
    return (
        draft_bytes(spec, n_vocab=N_VOCAB, device_index=device, window=WINDOW).total,
        size.ring + size.bookkeeping,
    )


def outcomes(models: tuple[Path, Path], *settings: dict[str, Any]) -> list[dict[str, Any]]:
    tests = Path(__file__).parents[1]
    arguments = [json.dumps({"draft_window": WINDOW, **s}) for s in settings]
    # Every large allocation is a mapping of its own: none is served from what earlier ones left, and none stays behind.
    # And none by what the threads of numpy's libraries have set aside, which differs with the number of cores.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dflash.tight", *map(str, models), *arguments]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(settings)
    return found


def test_too_little_memory_is_known_before_any_is_taken(models: tuple[Path, Path], needed: tuple[int, int]) -> None:
    draft, mirror = needed
    rooms = [MIB, draft // 2, draft, draft + mirror // 2, draft + mirror - 64 * 1024]
    for room, found in zip(rooms, outcomes(models, *({"limit": "RLIMIT_AS", "room": r} for r in rooms)), strict=True):
        assert found["bytes_needed"] == draft + mirror
        assert (
            found["bytes_free"] == pytest.approx(room, abs=512 * 1024) and found["bytes_free"] < found["bytes_needed"]
        )
        for number in (draft, mirror, draft + mirror, found["bytes_free"]):
            assert str(number) in found["error"]
        assert found["max_window"] < WINDOW
        assert found["max_cap"] == (found["max_window"] + BLOCK if found["max_window"] else 0)
        assert (found["max_window"] > 0) == (room >= draft)
        assert ("q8_0" in found["fitting_dtypes"]) == (room > draft + mirror // 3)
        assert "f32" not in found["fitting_dtypes"]
        assert f"draft_window {found['max_window']} fits" in found["error"] or "no draft_window fits" in found["error"]
        assert found["grown"] < 8 * MIB


def test_what_is_advised_can_be_made(models: tuple[Path, Path], needed: tuple[int, int]) -> None:
    """In a bit more room, for what the allocator takes beside; and without a limit, what was refused before."""
    tight = {"limit": "RLIMIT_AS", "room": needed[0] + needed[1] // 2}
    [refused] = outcomes(models, tight)
    more = {**tight, "room": tight["room"] + 2 * MIB}
    found = outcomes(
        models,
        {**more, "draft_window": refused["max_window"]},
        {**more, "feature_dtype": refused["fitting_dtypes"][0]},
        tight,
        {**tight, "room": None},
    )
    texts = [f.get("text") for f in found]
    assert texts[0] == texts[1] == texts[3] is not None and texts[2] is None
    assert all(f["drafted"] > 0 for f in found if "text" in f)


def test_what_the_allocator_refuses_is_the_same_error(models: tuple[Path, Path], needed: tuple[int, int]) -> None:
    """At any point: weights, keys and values, scratch, ring. Nothing says beforehand that there is a limit."""
    draft, mirror = needed
    rooms = [MIB, draft // 2, *range(draft - 14 * MIB, draft + 2 * MIB, 2 * MIB), draft + mirror // 2]
    found = outcomes(
        models, *({"limit": "RLIMIT_DATA", "room": r} for r in rooms), {"limit": "RLIMIT_DATA", "room": None}
    )
    assert "text" in found.pop()
    for f in found:
        assert ("refused" in f["error"] or "out of host memory" in f["error"]) and "try a smaller" in f["error"]
        assert f["bytes_needed"] in (draft, mirror) or "scratch" in f["error"]
    of = [f["error"] for f in found]
    assert any("refused the weights" in e for e in of) and any("(f32)" in e for e in of)
    assert any("refused the keys and values" in e or "of scratch" in e for e in of)
    # At times the C library keeps one target's memory for the next one, as it could not get it where it wanted.
    assert min(f["grown"] for f in found[-5:]) < 8 * MIB


def test_slots_that_host_memory_refuses() -> None:
    """A mirror's bookkeeping, where that is more than a piece of the heap."""
    assert_survives(
        """
import resource
taken = 1024 * int(open("/proc/self/status").read().split("VmData:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**24, resource.RLIM_INFINITY))
try:
    FeatureMirror(taps=1, n_embd=32, cap=2**21, dtype="q4_0")
except MemoryError as error:
    assert "slots" in str(error) and error.bytes_needed >= 2**21 * (18 + 24), error
else:
    raise AssertionError("there was no limit")
"""
    )
