"""What a prefix cache did: counts since it was made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CacheCounters:
    """Counts that only grow; each by what it happened to.

    Attributes:
        hits: prompts that began with tokens already evaluated, by where those were: "context" (the model still had them), "ram", "disk".
        misses: prompts of which nothing was found.
        reused_tokens: prompt tokens that were not evaluated, by the same names.
        restores, restore_s: states that were put into the model, and seconds from the lookup on, by "ram" or "disk".
        stored: prompts taken, by "ram" or "disk".
        evictions: prompts that had to go for others, by "ram" or "disk".
        not_stored: prompts that were not taken, by reason: "ram_too_large", "disk_too_large" (than the whole budget), "disk_no_room" (files
            could not be removed), "disk_slow" (memory is full of what still waits to be written), "not_a_prompt" (tokens were generated
            since), "without_rows", "other_order" (:func:`ggml_mirror.rollback.moves_by_blocks`), "failed" (to be saved), "closed".
        skipped: files and entries that were not used, by reason: "corrupt", "version", "identity" (of another model or other parameters),
            "unsafe" (no regular file of this user), "unreadable", "foreign", "memory" (no room for it), "refused" (by llama.cpp).
        disk_errors: failures to write, remove or list, by name of the system's error (ENOSPC, EACCES, ...).
        abandoned: temporary files of writers that were killed, removed.
    """

    hits: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    reused_tokens: Counter[str] = field(default_factory=Counter)
    restores: Counter[str] = field(default_factory=Counter)
    restore_s: dict[str, float] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)
    not_stored: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    disk_errors: Counter[str] = field(default_factory=Counter)
    abandoned: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
