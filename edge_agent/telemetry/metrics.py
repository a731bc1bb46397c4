"""Every metric of the agent, built once from a registry that is a parameter.

Invariant: label sets exist at 0 from the start: a rate over a new series never misses its first event.
Hot paths hold the children they increment; no label is looked up per request. What is observed per request
is counted in plain lists and made into a family at scrape: the agent's loop is the only writer.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from edge_agent.contract import metric_names as names
from edge_agent.contract.metric_names import Metric

# A _created series beside every counter doubles what is scraped and sent, and nobody reads it.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the package has no annotation there


class AgentMetrics:
    """All families of one agent. ``registry`` holds nothing else."""

    def __init__(self, registry: CollectorRegistry, device: str, agent_version: str) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        _Clock(registry)
        self._answers = _Counts(registry, names.ANSWERS)
        self._decisions = _Counts(registry, names.DECISIONS)
        self._inference = _Histograms(registry, names.INFERENCE_SECONDS, names.LATENCY_BUCKETS)
        self._batch = _Histograms(registry, names.BATCH_ROWS, names.BATCH_BUCKETS)
        self._requests = _Counts(registry, names.REQUESTS)
        self._model_info = self._gauge(names.MODEL_INFO)
        self._model_state = self._gauge(names.MODEL_STATE)
        self._model_load = self._gauge(names.MODEL_LOAD_SECONDS)
        self._serving_gap = self._gauge(names.SERVING_GAP)
        self._split_share = self._gauge(names.SPLIT_SHARE)
        self._drift_score = self._gauge(names.DRIFT_SCORE)
        self._drift_features = self._gauge(names.DRIFT_FEATURES)
        self._drift_rows = self._gauge(names.DRIFT_WINDOW_ROWS)
        self._update_state = self._gauge(names.UPDATE_STATE)
        self._update_results = self._counter(names.UPDATE_RESULTS)
        self.update_check_time = self._gauge(names.UPDATE_CHECK_TIME)
        self.metadata_expiry = self._gauge(names.METADATA_EXPIRY)
        self.assignments_serial = self._gauge(names.ASSIGNMENTS_SERIAL)
        self.store_writable = self._gauge(names.STORE_WRITABLE)
        self.queue_pending = self._gauge(names.QUEUE_PENDING)
        self.queue_sent = self._counter(names.QUEUE_SENT)
        self.queue_dropped = self._counter(names.QUEUE_DROPPED)
        self.queue_last_success = self._gauge(names.QUEUE_LAST_SUCCESS)
        for reason in ("full", "rejected", "corrupt"):
            self.queue_dropped.labels(reason)
        for protocol in ("http", "mqtt"):
            for status in ("ok", "client_error", "unavailable", "error"):
                self._requests.labels(protocol, status)
        self._gauge(names.AGENT_INFO).labels(device, agent_version).set(1)
        self._gauge(names.START_TIME).set(time.time())
        self._info: dict[str, tuple[str, str]] = {}

    def for_release(self, model: str, version: str) -> ReleaseMetrics:
        """The counters of one release, every label set created at 0."""
        return ReleaseMetrics(
            ok=self._answers.labels(model, version, "model", "ok").inc,
            fallback={
                reason: self._answers.labels(model, version, "fallback", reason).inc
                for reason in names.REASONS
                if reason != "ok"
            },
            passed=self._decisions.labels(model, version, "pass").inc,
            failed=self._decisions.labels(model, version, "fail").inc,
            observe=self._inference.labels(model, version).observe_all,
            batch=self._batch.labels(model, version).observe,
            latencies=self._inference.labels(model, version).counts,
        )

    def last_answer(self, model: str, version: str) -> float:
        """When this release answered last, seconds since 1970; 0: never."""
        return self._inference.labels(model, version).last

    def request(self, protocol: str, status: str) -> Callable[[], None]:
        """The increment of one (protocol, status); hold it, do not look it up per request."""
        return self._requests.labels(protocol, status).inc

    def model_state(self, model: str, state: str) -> None:
        """Say which state the model is in."""
        for name in names.MODEL_STATES:
            self._model_state.labels(model, name).set(name == state)

    def model_info(self, model: str, version: str, digest: str) -> None:
        """Say which release answers; the one before is taken back."""
        if model in self._info:
            self._model_info.remove(model, *self._info[model])
        self._info[model] = (version, digest)
        self._model_info.labels(model, version, digest).set(1)

    def model_loaded(self, model: str, seconds: float) -> None:
        """How long load and warm-up took."""
        self._model_load.labels(model).set(seconds)

    def serving_gap(self, model: str, seconds: float) -> None:
        """The longest time the engine was kept from answering during the last swap."""
        self._serving_gap.labels(model).set(seconds)

    def split_share(self, model: str, version: str, share: float | None) -> None:
        """How much a candidate answers beside the release; None: it is gone."""
        if share is None:
            self._split_share.remove(model, version)
        else:
            self._split_share.labels(model, version).set(share)

    def drift(self, model: str, statistics: dict[str, float], drifting: int) -> None:
        """The verdict on a full window."""
        for statistic, value in statistics.items():
            self._drift_score.labels(model, statistic).set(value)
        self._drift_features.labels(model).set(drifting)

    def drift_rows(self, model: str, rows: int) -> None:
        """Rows in the window being filled."""
        self._drift_rows.labels(model).set(rows)

    def update_state(self, model: str, state: str, states: Iterable[str]) -> None:
        """Which state of the update machine (of all ``states``) the model is in."""
        for name in states:
            self._update_state.labels(model, name).set(name == state)

    def update_results(self, model: str, results: Iterable[str]) -> None:
        """Create the label sets of every result at 0."""
        for result in results:
            self._update_results.labels(model, result)

    def update_result(self, model: str, result: str) -> None:
        """Count a finished update."""
        self._update_results.labels(model, result).inc()

    def exposition(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self.registry)

    async def exposition_in_turns(self) -> bytes:
        """The same, giving way after each family: at once it takes milliseconds on a small core."""
        parts = []
        for family in self.registry.collect():
            parts.append(generate_latest(_One(family)))
            await asyncio.sleep(0)
        return b"".join(parts)

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.help, metric.labels, registry=self.registry)


class ReleaseMetrics:
    """What the service counts for one release. Every attribute is a bound method of a ready child."""

    __slots__ = ("_failed", "_fallback", "_observe", "_ok", "_passed", "batch", "latencies")

    def __init__(
        self,
        *,
        ok: Callable[[float], None],
        fallback: dict[str, Callable[[float], None]],
        passed: Callable[[float], None],
        failed: Callable[[float], None],
        observe: Callable[[Sequence[float]], None],
        batch: Callable[[float], None],
        latencies: Sequence[int],
    ) -> None:
        self._ok, self._fallback = ok, fallback
        self._passed, self._failed, self._observe = passed, failed, observe
        self.batch = batch
        self.latencies = latencies  # requests by LATENCY_BUCKETS, not cumulated; for reading

    def answered(self, reason: str, rows: int, failed_rows: int, seconds: float) -> None:
        """Count one answered request: its rows, and how many of them were decided fail."""
        self.all_answered(reason, rows, failed_rows, (seconds,))

    def all_answered(self, reason: str, rows: int, failed_rows: int, seconds: Sequence[float]) -> None:
        """Count the requests of one batch: their rows together, and what each of them took."""
        (self._ok if reason == "ok" else self._fallback[reason])(rows)
        if passed_rows := rows - failed_rows:
            self._passed(passed_rows)
        if failed_rows:
            self._failed(failed_rows)
        self._observe(seconds)


class _Buckets:
    """The counts of one label set; those of the buckets are not cumulated."""

    __slots__ = ("_bounds", "counts", "last", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.last = 0.0  # when a value came last, seconds since 1970; 0: never

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Count every value."""
        bounds, counts = self._bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)
        self.last = time.time()


class _Histograms(Collector):
    """A histogram that is cheap to write to, for what happens at every request."""

    def __init__(self, registry: CollectorRegistry, metric: Metric, bounds: tuple[float, ...]) -> None:
        self._metric, self._bounds = metric, bounds
        self._children: dict[tuple[str, ...], _Buckets] = {}
        registry.register(self)

    def labels(self, *labels: str) -> _Buckets:
        return self._children.setdefault(labels, _Buckets(self._bounds))

    def collect(self) -> Iterable[Family]:
        family = HistogramMetricFamily(self._metric.name, self._metric.help, labels=self._metric.labels)
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, child in self._children.items():
            counts = accumulate(child.counts)
            family.add_metric(labels, list(zip(bounds, map(float, counts), strict=True)), child.total)
        yield family


class _One(CollectorRegistry):
    """What ``generate_latest`` takes, with one family in it."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family

    def collect(self) -> Iterable[Family]:
        return (self._family,)


class _Count:
    """The counter of one label set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Count."""
        self.value += amount


class _Counts(Collector):
    """A counter that is cheap to write to: no lock, no check; as ``_Histograms``."""

    def __init__(self, registry: CollectorRegistry, metric: Metric) -> None:
        self._metric = metric
        self._children: dict[tuple[str, ...], _Count] = {}
        registry.register(self)

    def labels(self, *labels: str) -> _Count:
        return self._children.setdefault(labels, _Count())

    def collect(self) -> Iterable[Family]:
        family = CounterMetricFamily(self._metric.name, self._metric.help, labels=self._metric.labels)
        for labels, child in self._children.items():
            family.add_metric(labels, child.value)
        yield family


class _Clock(Collector):
    """The heartbeat: read at scrape, so that it is never older than the scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)

    def collect(self) -> Iterable[Family]:
        yield GaugeMetricFamily(names.HEARTBEAT.name, names.HEARTBEAT.help, value=time.time())
