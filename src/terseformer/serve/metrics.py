"""What is counted, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from terseformer.serve.job import Job
from terseformer.serve.models import ServedModel

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_COUNTED_BEFORE = ("terse_requests", "terse_requests_created")
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "terse_requests", "Requests answered, by route and status.", ("route", "status"), registry=registry
        )
        self.running = Gauge("terse_running_texts", "Texts that are read or written.", ("model",), registry=registry)
        self.first_token = Histogram(
            "terse_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "terse_request_seconds",
            "From a request's arrival to its last token.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._rate = Histogram(
            "terse_request_tokens_per_second",
            "Tokens of all texts of a request, over the time from its first token to its last.",
            ("model",),
            buckets=_RATES,
            registry=registry,
        )
        self._prompt = Counter("terse_prompt_tokens", "Tokens of prompts.", ("model",), registry=registry)
        self._cached = Counter(
            "terse_cached_tokens", "Tokens of prompts that the prefix cache knew.", ("model",), registry=registry
        )
        self._written = Counter(
            "terse_completion_tokens", "Tokens written; their rate is tokens per second.", ("model",), registry=registry
        )
        self._units_read = Counter(
            "terse_feed_forward_units_read",
            "Feed-forward units that were read to write tokens, by the model's accounting.",
            ("model",),
            registry=registry,
        )
        self._units_stored = Counter(
            "terse_feed_forward_units_passed",
            "Feed-forward units that a dense model of the same width would have read.",
            ("model",),
            registry=registry,
        )

    def count(self, name: str, meaning: str) -> Counter:
        """Adds a counter."""
        return Counter(name, meaning, registry=self._registry)

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is asked for."""
        Gauge(name, meaning, registry=self._registry).set_function(value)

    def read(self, model: str, tokens: int, cached: int) -> None:
        """Counts a prompt that has been read."""
        self._prompt.labels(model).inc(tokens)
        self._cached.labels(model).inc(cached)

    def wrote(self, model: ServedModel, tokens: int) -> None:
        """Counts tokens that were written."""
        self._written.labels(model.name).inc(tokens)
        self._units_read.labels(model.name).inc(tokens * model.units_read)
        self._units_stored.labels(model.name).inc(tokens * model.units_stored)

    def finished(self, model: str, job: Job) -> None:
        """Counts a job that has come to its end."""
        now = time.monotonic()
        self._seconds.labels(model).observe(now - job.arrived)
        if job.first_token is not None and now > job.first_token:
            self._rate.labels(model).observe(job.completion_tokens / (now - job.first_token))

    def show(self, replicas: Mapping[str, str] | None = None) -> bytes:
        """All of them, in Prometheus' text format.

        Args:
            replicas: by name, what each shows of its own, which gets the label `replica`; but the answers are counted
                where they are handed on.
        """
        if not replicas:
            return generate_latest(self._registry)
        return generate_latest(_Merged(self._registry, replicas))


class _Merged(CollectorRegistry):
    """A registry's metrics and those of replicas."""

    def __init__(self, own: CollectorRegistry, replicas: Mapping[str, str]) -> None:
        super().__init__()
        self._own, self._replicas = own, replicas

    def collect(self) -> Iterable[Metric]:
        """All metrics by name."""
        merged = {metric.name: metric for metric in self._own.collect()}
        for replica, page in self._replicas.items():
            for metric in text_string_to_metric_families(page):
                if metric.name in _COUNTED_BEFORE:
                    continue
                samples = [s._replace(labels={**s.labels, "replica": replica}) for s in metric.samples]
                merged.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                ).samples += samples
        return merged.values()
