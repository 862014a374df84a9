"""Resident memory of this process, and what repetitions add to it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import psutil


def resident() -> int:
    """Bytes, without what Python's collector and the C library keep for later: the latter jumps by tens of MiB, up or down,
    with the order in which large buffers are freed."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)
    return int(psutil.Process().memory_info().rss)


def growth(cycle: Callable[[int], object], cycles: int, *, warm_up: int) -> int:
    """Bytes that the cycles leave behind, once the first few have filled every cache."""
    for i in range(warm_up):
        cycle(i)
    before = resident()
    for i in range(cycles):
        cycle(i)
    return resident() - before
