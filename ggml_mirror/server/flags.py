"""Values of flags that are written otherwise than llama_cpp.server's settings."""

from __future__ import annotations

import gguf

from ..byte_size import parse_bytes
from ..errors import ArgumentError

_KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")  # llama-server's


def layers(text: str | None) -> int | None:
    """``-ngl``: a number, or "all" or "auto" (all)."""
    if text is None:
        return None
    if text in ("all", "auto"):
        return -1
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"-ngl {text}: a number of blocks, all or auto was expected") from None


def switch(text: str | None, flag: str) -> bool | None:
    """``on`` or ``off``; "auto" leaves it to the default."""
    known = {"on": True, "1": True, "true": True, "off": False, "0": False, "false": False, "auto": None, None: None}
    if text not in known:
        raise ArgumentError(f"{flag} {text}: on, off or auto was expected")
    return known[text]


def kv_type(text: str | None, flag: str) -> int | None:
    """A type of the KV cache by its name."""
    if text is None:
        return None
    if text.upper() not in _KV_TYPES:
        raise ArgumentError(f"{flag} {text}: one of {', '.join(_KV_TYPES).lower()} was expected")
    return int(gguf.GGMLQuantizationType[text.upper()])


def cache_bytes(text: str | None) -> int | None:
    """A size such as 2GiB. A bare number is MiB, as llama-server's ``--cache-ram`` has it; 0 is none."""
    if text is None:
        return None
    return int(text) << 20 if text.strip().isdigit() else parse_bytes(text)
