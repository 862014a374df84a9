"""The cache of prefixes that a served model is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_cpp.llama_cache import LlamaRAMCache

from ..errors import ArgumentError

if TYPE_CHECKING:
    from .model import Served
    from .settings import ServeConfig


def make_cache(config: ServeConfig, llm: Served) -> Any:
    """A ``BaseLlamaCache`` as the flags ask for it, or None.

    Raises:
        ArgumentError: a cache that this version does not have.
    """
    if config.cache_disk is not None:
        raise ArgumentError("--cache-disk is not available in this version")
    return LlamaRAMCache(config.cache_ram) if config.cache_ram else None


def cache_counts(cache: Any) -> dict[str, float]:
    """hits, misses, ram_bytes, disk_bytes, restore_seconds, skipped_files; what the cache does not count is left out."""
    return {} if cache is None else {"ram_bytes": cache.cache_size}
