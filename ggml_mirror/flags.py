"""Values of llama.cpp's flags that its Python API writes otherwise."""

from __future__ import annotations

from .byte_size import parse_bytes
from .errors import ArgumentError

_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")  # llama.cpp's


def layers(text: str) -> int:
    """``-ngl``: a number; -1, "all" or "auto": every layer."""
    if text in ("all", "auto"):
        return -1
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"-ngl {text}: a number of layers, all or auto was expected") from None


def switch(text: str, flag: str) -> bool | None:
    """``on`` or ``off``; None for "auto"."""
    known = {"on": True, "1": True, "true": True, "off": False, "0": False, "false": False, "auto": None}
    if text not in known:
        raise ArgumentError(f"{flag} {text}: on, off or auto was expected")
    return known[text]


def cache_type(text: str, flag: str) -> int:
    """A type of the KV cache: ggml's number of that name."""
    from gguf.constants import GGMLQuantizationType

    if text.lower() not in _CACHE_TYPES:
        raise ArgumentError(f"{flag} {text}: one of {', '.join(_CACHE_TYPES)} was expected")
    return int(GGMLQuantizationType[text.upper()])


def mebibytes(text: str) -> int:
    """Bytes from a size such as 2GiB. A bare number is MiB, as llama-server's ``--cache-ram`` has it."""
    return int(text) << 20 if text.strip().isdigit() else parse_bytes(text)


def split_number(text: str, flag: str) -> int:
    """How a model is split over devices: llama.cpp's number of that name."""
    modes = {"none": 0, "layer": 1, "row": 2}
    if text not in modes:
        raise ArgumentError(f"{flag} {text}: one of {', '.join(modes)} was expected")
    return modes[text]


def shares(text: str, flag: str) -> list[float]:
    """Numbers with commas between them, as 3,1."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{flag} {text}: numbers with commas between them were expected") from None
