"""Metrics for Prometheus. Gateways route by the names of vLLM (gateway-api-inference-extension, proposal 003); the others are our own."""

from collections.abc import Iterator, Mapping, Sequence
from math import log
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from elmwood.serve.live import Live

if TYPE_CHECKING:
    from elmwood.serve.answers import Choice

FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ENTROPY = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6931, 1.0, 1.3863, 2.0)  # nats


class Meter:
    """The metrics of one server."""

    def __init__(self, live: Live):
        self.registry, model = CollectorRegistry(), live.now.name
        self._live, self._label = live, [model]

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, what, ["model_name"], buckets=buckets, registry=self.registry).labels(model)

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, ["model_name"], registry=self.registry).labels(model)

        self._first = histogram("vllm:time_to_first_token_seconds", "from the request to its first token", FIRST)
        self._between = histogram("vllm:inter_token_latency_seconds", "between two tokens of a choice", BETWEEN)
        self._entropy = histogram("elmwood_route_entropy_nats", "entropy of the weights of a token's experts", ENTROPY)
        self._prompt = counter("vllm:prompt_tokens", "tokens of prompts")
        self._made = counter("vllm:generation_tokens", "tokens generated")
        self._requests = Counter("elmwood_http_requests", "requests by path and status", ["path", "status"], registry=self.registry)
        self.registry.register(self)

    def token(self, seconds: float, first: bool, weights: Mapping[str, float]) -> None:
        """A token was generated, so long after the one before it or after its request."""
        (self._first if first else self._between).observe(seconds)
        if len(weights) > 0:
            self._entropy.observe(max(0.0, -sum(weight * log(weight) for weight in weights.values() if weight > 0)))

    def finished(self, choices: "Sequence[Choice]", first: float | None) -> None:
        self._prompt.inc(sum({id(choice.tokens): len(choice.tokens) for choice in choices}.values()))
        self._made.inc(sum(choice.completion for choice in choices))

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, status).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's own counts, as they are now."""
        now, adopted = self._live.counts(), self._live.adopted
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        for family, name, what, value in (
            (gauge, "vllm:num_requests_waiting", "requests that wait", now.waiting),
            (gauge, "vllm:num_requests_running", "requests at work", now.running),
            (gauge, "vllm:kv_cache_usage_perc", "share of the key-value cache in use, 0 to 1", now.cache_share),
            (gauge, "elmwood_rows", "pairs of request and expert at work", now.rows),
            (gauge, "elmwood_experts", "experts that the router may choose", now.experts),
            (gauge, "elmwood_experts_resident", "experts on the device", now.resident),
            (gauge, "elmwood_experts_loading", "experts on their way to it", now.loading),
            (gauge, "elmwood_experts_refused", "experts whose adapter is damaged, of another seed, or not what was scored", now.refused),
            (counter, "elmwood_expert_loads", "experts loaded", now.loads),
            (counter, "elmwood_expert_load_seconds", "seconds of loading experts", now.load_seconds),
            (
                counter,
                "elmwood_generation_mismatches",
                "requests ended since a slot held another generation: must stay 0",
                now.mismatches,
            ),
            (counter, "elmwood_requests_failed", "requests ended by an error", now.failed),
            (
                gauge,
                "elmwood_engines",
                "models in memory: the one that is served, and those whose requests have not ended",
                self._live.engines,
            ),
            (counter, "elmwood_adoptions", "newer models that took the place of the one before", adopted.models),
            (counter, "elmwood_adoption_failures", "looks for a newer model that failed, or found one that was refused", adopted.failed),
            (
                gauge,
                "elmwood_adoption_seconds",
                "seconds from the look at the source of the newest model to its first request",
                adopted.seconds,
            ),
            (gauge, "elmwood_adopted_timestamp_seconds", "when the newest model took its place; 0 for the first", adopted.at),
        ):
            metric = family(name, what, labels=["model_name"])
            metric.add_metric(self._label, value)
            yield metric
        info = GaugeMetricFamily("elmwood_snapshot_info", "digest of the model that is served", labels=["model_name", "digest"])
        info.add_metric([*self._label, self._live.now.record.digest], 1)
        yield info

    def text(self) -> bytes:
        return generate_latest(self.registry)
