"""Resident memory of this process, and whether it grows with what is done again and again."""

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


def assert_no_growth(
    cycle: Callable[[int], object], *, cycles: int, allowed: int, warm_up: int = 10, rounds: int = 3
) -> None:
    """``cycles`` of them leave no more than ``allowed`` bytes behind, once the first few have filled every cache.

    What leaks does so each time, what a thread or a library takes once does not: it is too much only if it is in every round.
    """
    for i in range(warm_up):
        cycle(i)
    grown: list[int] = []
    while len(grown) < rounds:
        before = resident()
        for i in range(cycles):
            cycle(i)
        grown.append(resident() - before)
        if grown[-1] < allowed:
            return
    raise AssertionError(f"{cycles} cycles left {grown} bytes behind, {allowed} are allowed")
