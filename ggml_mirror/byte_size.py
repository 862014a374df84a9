"""Sizes in bytes as text."""

from __future__ import annotations

import re

from .errors import ArgumentError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_bytes(text: str) -> int:
    """Bytes from text: ``8GiB``, ``8G`` (the same), ``8GB`` (powers of 1000), ``512 MiB``, ``1.5GiB``, ``4096``.

    Raises:
        ArgumentError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+)(?:\.(\d+))?\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(match[3].upper()) if match else None
    if match is None or unit is None:
        raise ArgumentError(f"{text!r} is not a size; write for example 8GiB, 512MiB or 4096")
    whole, fraction = match[1], match[2] or ""
    digits: int = int(whole + fraction)
    return digits * unit // int("1" + "0" * len(fraction))  # in integers: exact beyond 2^53


def format_bytes(count: int) -> str:
    """Bytes for people, in powers of 1024: ``25 GiB``, ``106.25 MiB``, ``900 B``."""
    power = 0
    while power < 5 and abs(count) >= 1024 ** (power + 1):
        power += 1
    if power == 0:
        return f"{count} B"
    text = f"{count / 1024**power:,.2f}".rstrip("0").rstrip(".")
    return f"{text} {'KMGTP'[power - 1]}iB"
