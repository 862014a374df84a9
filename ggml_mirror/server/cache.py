"""The prefix cache of a served model: made as the flags say, and what it counts as metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

from ..cache.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from .model import Served
    from .settings import ServeConfig

_DEFAULT_DISK = 16 << 30
_TIERS = ("ram", "disk")


def make_cache(config: ServeConfig, llm: Served) -> PrefixCache | None:
    """The cache that ``--cache-ram`` and ``--cache-disk`` ask for, or None.

    Raises:
        ArgumentError: the folder is a file, or cannot be used.
    """
    if llm.settings.no_text is not None or (not config.cache_ram and config.cache_disk is None):
        return None
    return PrefixCache(
        llm,
        ram_bytes=config.cache_ram or 0,
        directory=config.cache_disk,
        disk_bytes=_DEFAULT_DISK if config.cache_disk_max is None else config.cache_disk_max,
    )


def cache_metrics(cache: PrefixCache | None) -> Iterator[Any]:
    """Prometheus' metric families; zeros without a cache."""
    counters = None if cache is None else cache.counters
    held = {} if cache is None else cache.bytes_held()
    entries = {} if cache is None else cache.entries_held()

    def counter(name: str, what: str, label: str, counts: dict[str, int], always: tuple[str, ...] = ()) -> Any:
        family = CounterMetricFamily(f"ggml_mirror_cache_{name}", what, labels=(label,))
        counts = dict(counts)  # at once: another thread may be counting
        for key in sorted({*always, *counts}):
            family.add_metric([key], counts.get(key, 0))
        return family

    empty: dict[str, int] = {}
    yield counter(
        "hits",
        "Prompts that began with evaluated tokens, by where those were (context: the model still had them).",
        "tier",
        counters.hits if counters else empty,
        ("context", *_TIERS),
    )
    yield CounterMetricFamily(
        "ggml_mirror_cache_misses", "Prompts of which nothing was found.", counters.misses if counters else 0
    )
    yield counter(
        "reused_tokens",
        "Prompt tokens that were not evaluated again.",
        "tier",
        counters.reused_tokens if counters else empty,
        ("context", *_TIERS),
    )
    yield counter("stored", "Prompts that were kept.", "tier", counters.stored if counters else empty, _TIERS)
    yield counter(
        "evictions", "Prompts that had to go for others.", "tier", counters.evictions if counters else empty, _TIERS
    )
    yield counter("not_stored", "Prompts that were not kept.", "reason", counters.not_stored if counters else empty)
    yield counter(
        "skipped", "Files and entries that could not be used.", "reason", counters.skipped if counters else empty
    )
    yield counter(
        "disk_errors", "Failures to write, remove or list files.", "error", counters.disk_errors if counters else empty
    )
    restores = SummaryMetricFamily(
        "ggml_mirror_cache_restore_seconds", "From the lookup until the model has the state.", labels=("tier",)
    )
    size = GaugeMetricFamily("ggml_mirror_cache_bytes", "Bytes that are held.", labels=("tier",))
    count = GaugeMetricFamily("ggml_mirror_cache_entries", "Prompts that are held.", labels=("tier",))
    for tier in _TIERS:
        done = (counters.restores.get(tier, 0), counters.restore_s.get(tier, 0.0)) if counters else (0, 0.0)
        restores.add_metric([tier], *done)
        size.add_metric([tier], held.get(tier, 0))
        count.add_metric([tier], entries.get(tier, 0))
    yield from (restores, size, count)
