"""What a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

from ggml_mirror import devices
from ggml_mirror.prompt_run import default_threads


def describe(threads: int) -> str:
    """The processor with its threads (0: llama.cpp's own number), and the GPUs."""
    count = threads or default_threads()
    gpus = [f"{d.name}: {d.description}" for d in devices() if not d.is_host]
    return "; ".join([f"{_processor()}, {count} thread{'s' * (count > 1)}", *gpus])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
