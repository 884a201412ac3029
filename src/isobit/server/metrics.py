"""What the server counts, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from isobit.runtime.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Of one service; ``vllm:`` names are those that routers of requests read."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "isobit_requests",
            "Requests by route and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.prompt = self._counter("isobit_prompt_tokens", "Tokens of prompts.")
        self.cached = self._counter("isobit_cached_tokens", "Of these, found in the cache.")
        self.generated = self._counter("isobit_generated_tokens", "Tokens generated.")
        self.first = self._histogram(
            "isobit_time_to_first_token_seconds", "From a request to the first piece of its answer."
        )
        self.whole = self._histogram(
            "isobit_answer_seconds", "From a request to the end of its answer."
        )
        self._registry.register(_State(engine, model))

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(name, what, registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        """All of them now."""
        return generate_latest(self._registry)


class _State(Collector):
    """The engine's state at the moment of asking."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Gauges."""
        now = self._engine.load()
        for name, what, count in (
            ("isobit_requests_running", "Generations in the passes.", now.running),
            ("isobit_requests_waiting", "Generations in the queue.", now.waiting),
            ("isobit_cache_pages_held", "Pages of the KV cache in use.", now.held),
            ("isobit_cache_pages_cached", "Pages kept for whoever begins alike.", now.cached),
            ("isobit_cache_pages_free", "Pages that hold nothing.", now.free),
        ):
            yield GaugeMetricFamily(name, what, value=count)
        used = now.held / (now.held + now.cached + now.free)
        shares: list[tuple[str, str, float]] = [
            ("vllm:num_requests_running", "isobit_requests_running.", now.running),
            ("vllm:num_requests_waiting", "isobit_requests_waiting.", now.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the cache in use.", used),
        ]
        for name, what, value in shares:
            gauge = GaugeMetricFamily(name, what, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
