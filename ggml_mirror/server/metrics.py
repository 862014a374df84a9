"""What ``GET /metrics`` says, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from .cache import cache_metrics

if TYPE_CHECKING:
    from .request import ServedRequest
    from .state import ServerState

_PHASES = ("prefill", "decode", "draft", "verify", "capture", "read", "sample", "rollback")
_TAU_BUCKETS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16)
_SHARE_BUCKETS = (0, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 1)
_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Counted since the server started. Safe to use from several threads."""

    def __init__(self, state: ServerState) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"ggml_mirror_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: Any = _SECONDS_BUCKETS) -> Histogram:
            return Histogram(f"ggml_mirror_{name}", what, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that were answered.", "path", "status")
        self._errors = counter("errors", "Requests that failed, by the kind of error.", "type")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens, cached ones included.")
        self._cached_tokens = counter("prompt_cached_tokens", "Prompt tokens that were in the context or the cache.")
        self._generated_tokens = counter("generated_tokens", "Tokens that were generated.")
        self._draft_steps = counter("draft_steps", "Draft passes, each with one verification.")
        self._plain_steps = counter("plain_steps", "Tokens that were evaluated without a draft.")
        self._drafted_tokens = counter("drafted_tokens", "Tokens that the draft proposed.")
        self._accepted_tokens = counter("accepted_tokens", "Drafted tokens that the target accepted.")
        self._phases = counter(
            "phase_seconds", "Seconds per phase; capture is a part of prefill and verify, read of draft.", "phase"
        )
        self._tau = histogram("tau", "Mean committed tokens per draft step of a request.", _TAU_BUCKETS)
        self._acceptance = histogram("acceptance", "Accepted / proposed tokens of a request.", _SHARE_BUCKETS)
        self._seconds = histogram("request_seconds", "From a request's first byte to its answer's last.")
        self._queue_seconds = histogram("queue_seconds", "How long a request waited for its turn.")
        self._first_token_seconds = histogram(
            "time_to_first_token_seconds", "From a request's first byte to its first token."
        )
        Gauge("ggml_mirror_requests_running", "Requests that are being answered.", registry=registry).set_function(
            lambda: state.turns.running is not None
        )
        Gauge("ggml_mirror_requests_waiting", "Requests that wait for their turn.", registry=registry).set_function(
            lambda: state.turns.waiting
        )
        registry.register(_StateCollector(state))
        ProcessCollector(registry=registry)
        for phase in _PHASES:
            self._phases.labels(phase)

    def observe(self, request: ServedRequest, path: str, status: int, error_type: str | None, seconds: float) -> None:
        """A request has been answered."""
        self._requests.labels(path, str(status)).inc()
        if error_type is not None:
            self._errors.labels(error_type).inc()
        if not request.generations:
            return
        stats = request.stats
        self._seconds.observe(seconds)
        self._queue_seconds.observe(request.queue_s)
        if request.first_token_s is not None:
            self._first_token_seconds.observe(request.first_token_s)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._cached_tokens.inc(stats.prefix_reused)
        self._generated_tokens.inc(stats.tokens)
        self._draft_steps.inc(stats.draft_steps)
        self._plain_steps.inc(stats.plain_steps)
        self._drafted_tokens.inc(stats.proposed)
        self._accepted_tokens.inc(stats.accepted)
        for phase in _PHASES:
            self._phases.labels(phase).inc(getattr(stats, f"{phase}_s"))
        if stats.draft_steps:
            self._tau.observe(stats.tau)
            self._acceptance.observe(stats.acceptance)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _StateCollector:
    """What is asked when it is read: the mirror's memory, and the cache's own counts."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Any]:
        state = self._state
        ready = GaugeMetricFamily("ggml_mirror_ready", "1 if requests are answered.")
        ready.add_metric([], float(state.not_ready is None))
        yield ready
        drafting = GaugeMetricFamily("ggml_mirror_drafting", "1 if the model that is loaded is drafted for.")
        drafting.add_metric([], float(state.card is not None and state.card.mirror is not None))
        yield drafting
        size = GaugeMetricFamily("ggml_mirror_mirror_bytes", "Bytes of the feature mirror.", labels=("dtype", "device"))
        rows = GaugeMetricFamily("ggml_mirror_mirror_rows", "Rows that the mirror can hold.")
        if state.card is not None and state.card.mirror is not None:
            mirror = state.card.mirror
            size.add_metric([mirror["dtype"], mirror["device"]], mirror["bytes"])
            rows.add_metric([], mirror["cap"])
        yield size
        yield rows
        yield from cache_metrics(state.cache)
