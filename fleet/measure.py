"""What the devices say about themselves, from Prometheus or from their own ``/metrics``.

Both sources give the same ``Reading``: the present value of the series of ``contract/metric_names.py``. A
``Sample`` is the difference of two readings of one device.

Invariants:

- a sample is bound to a digest: the device reported that digest in both readings, and its rows are those of
  that release's version. A device that runs anything else gives no sample (Argo CD #29410 is what happens
  otherwise: a stage passed on the health of the release before);
- a device that does not answer is *unreachable*, which is not *failed*;
- a counter that went back (the agent restarted) starts again from 0.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from edge_agent.contract import metric_names as names
from fleet.config import PrometheusConfig, ScrapeConfig
from fleet.errors import MeasurementError
from fleet.inventory import Device

# An update that ended like this says something about the release; others are about the network or the disk.
BAD_RESULTS: Final = ("rejected", "failed_rollback_complete", "failed_unable_to_rollback")
# Fallback answers that an operator asked for say nothing about the model.
_NOT_THE_MODEL: Final = ("unloaded", "killed")
_MAX_BYTES: Final = 64 << 20  # of one answer; 50,000 devices x 20 series of a query stay below

Series = tuple[Mapping[str, str], float]  # labels, value
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Reading:
    """The present values of one device. Mappings hold cumulative counters."""

    at: float  # seconds since the epoch, by the clock of whoever read them
    reachable: bool
    problem: str = ""  # why it is not reachable
    version: str = ""
    digest: str = ""  # of the release that answers now
    state: str = ""  # of the update machine
    results: Mapping[str, float] = field(default_factory=dict)  # finished updates by result
    rows: Mapping[tuple[str, str, str], float] = field(default_factory=dict)  # by version, source, reason
    decisions: Mapping[tuple[str, str], float] = field(default_factory=dict)  # rows by version, decision
    buckets: Mapping[tuple[str, str], float] = field(default_factory=dict)  # requests by version, le
    requests: Mapping[str, float] = field(default_factory=dict)  # by status

    @property
    def bad_results(self) -> float:
        """Updates that ended badly because of the release, since the agent started."""
        return sum(self.results.get(result, 0.0) for result in BAD_RESULTS)


@dataclass(frozen=True, slots=True)
class Sample:
    """One device, one release, one stretch of time."""

    device: str
    digest: str
    seconds: float
    rows: float  # answered, by model or rules
    fallback: float  # of those, by the rules because of the model
    decided: float
    failed: float  # of those, decided fail
    requests: float  # well-formed requests
    errors: float  # of those, without an answer
    p99: float | None  # seconds; None without requests

    def value(self, metric: str) -> tuple[float | None, float]:
        """A metric's value (None: undefined) and how many observations are behind it."""
        if metric == "fallback_ratio":
            return _ratio(self.fallback, self.rows), self.rows
        if metric == "fail_ratio":
            return _ratio(self.failed, self.decided), self.decided
        if metric == "error_ratio":
            return _ratio(self.errors, self.requests), self.requests
        if metric == "p99_seconds":
            return self.p99, self.rows
        raise ValueError(metric)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


class Source(Protocol):
    """Where readings come from."""

    def read(self, devices: Sequence[Device], model: str) -> dict[str, Reading]:
        """A reading of every device.

        Raises:
            MeasurementError: the source itself cannot be asked; a single device never raises.
        """
        ...


def between(device: str, before: Reading, after: Reading) -> Sample | None:
    """What happened on ``device`` between two readings; None unless both were under the same digest."""
    if not (before.reachable and after.reachable and after.digest) or after.at <= before.at:
        return None
    if before.digest != after.digest:
        return None
    version = after.version
    rows = {key[1:]: n for key, n in _grown(before.rows, after.rows).items() if key[0] == version}
    decisions = {
        key[1]: n for key, n in _grown(before.decisions, after.decisions).items() if key[0] == version
    }
    buckets = {key[1]: n for key, n in _grown(before.buckets, after.buckets).items() if key[0] == version}
    requests = _grown(before.requests, after.requests)
    return Sample(
        device=device,
        digest=after.digest,
        seconds=after.at - before.at,
        rows=sum(rows.values()),
        fallback=sum(
            n for (source, reason), n in rows.items() if source == "fallback" and reason not in _NOT_THE_MODEL
        ),
        decided=sum(decisions.values()),
        failed=decisions.get("fail", 0.0),
        requests=sum(n for status, n in requests.items() if status != "client_error"),
        errors=requests.get("error", 0.0) + requests.get("unavailable", 0.0),
        p99=quantile(0.99, {float(le): n for le, n in buckets.items()}),
    )


def _grown(before: Mapping[K, float], after: Mapping[K, float]) -> dict[K, float]:
    grown = {}
    for key, now in after.items():
        then = before.get(key, 0.0)
        grown[key] = now - then if now >= then else now
    return grown


def quantile(q: float, buckets: Mapping[float, float]) -> float | None:
    """A quantile from cumulative bucket counts, as PromQL's ``histogram_quantile`` computes it.

    Linear inside the bucket; the highest finite bound if it falls into the +Inf bucket; None without counts.
    """
    ascending = sorted(buckets.items())
    if len(ascending) < 2 or ascending[-1][0] != math.inf or ascending[-1][1] <= 0:
        return None
    rank = q * ascending[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in ascending:
        if count >= rank:
            if bound == math.inf:
                return lower
            inside = count - below
            return lower + (bound - lower) * ((rank - below) / inside if inside > 0 else 1.0)
        lower, below = bound, count
    return lower


class Scraper:
    """Reads ``{address}/metrics`` of every device, several at a time."""

    def __init__(self, config: ScrapeConfig, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock

    def read(self, devices: Sequence[Device], model: str) -> dict[str, Reading]:
        """See ``Source``."""
        workers = min(self._config.connections, max(1, len(devices)))
        with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="scrape") as pool:
            readings = pool.map(lambda device: self._read_one(device, model), devices)
            return dict(zip((device.id for device in devices), readings, strict=True))

    def _read_one(self, device: Device, model: str) -> Reading:
        if not device.address:
            return Reading(self._clock(), reachable=False, problem="no address in devices.yaml")
        try:
            text = _get(f"{device.address.rstrip('/')}/metrics", self._config.timeout_seconds).decode()
            return reading(self._clock(), _parse(text), model)
        except (_Unreachable, ValueError) as error:
            return Reading(self._clock(), reachable=False, problem=str(error))


class Prometheus:
    """Reads the newest sample of every device by instant queries; ``device`` is the label that names it."""

    def __init__(self, config: PrometheusConfig) -> None:
        self._config = config

    def read(self, devices: Sequence[Device], model: str) -> dict[str, Reading]:
        """See ``Source``."""
        heartbeat = names.HEARTBEAT.name
        now, seen = self._query(f"timestamp({heartbeat})")
        newest: dict[str, float] = {}
        for labels, stamp in seen:
            name = labels.get("device", "")
            newest[name] = max(stamp, newest.get(name, 0.0))
        series: dict[str, dict[str, list[Series]]] = {}
        for wanted in _WANTED:
            # The release info of before a swap stays visible for five minutes; the newest one holds.
            query = f"timestamp({wanted})" if wanted == names.MODEL_INFO.name else wanted
            for labels, value in self._query(query)[1]:
                per_device = series.setdefault(labels.get("device", ""), {})
                per_device.setdefault(wanted, []).append((labels, value))
        readings: dict[str, Reading] = {}
        for device in devices:
            at = newest.get(device.id)
            if at is None or now - at > self._config.stale_after_seconds:
                age = "no sample" if at is None else f"newest sample {now - at:.0f} s old"
                readings[device.id] = Reading(now, reachable=False, problem=f"{age} in Prometheus")
                continue
            readings[device.id] = reading(at, series.get(device.id, {}), model)
        return readings

    def _query(self, query: str) -> tuple[float, list[Series]]:
        """Evaluation time and the vector of an instant query."""
        url = f"{self._config.address.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            content: Any = json.loads(_get(url, self._config.timeout_seconds))
            if content["status"] != "success":
                raise MeasurementError(f"Prometheus {self._config.address} refused {query!r}: {content}")
            result = content["data"]["result"]
            vector = [(item["metric"], float(item["value"][1])) for item in result]
        except _Unreachable as error:
            raise MeasurementError(f"Prometheus {self._config.address} cannot be asked: {error}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MeasurementError(f"{self._config.address} does not answer like a Prometheus") from error
        # The evaluation time comes with every value; an empty answer is as of now.
        return float(result[0]["value"][0]) if result else time.time(), vector


_BUCKETS: Final = f"{names.INFERENCE_SECONDS.name}_bucket"
_WANTED: Final = (
    names.MODEL_INFO.name,
    names.UPDATE_STATE.name,
    names.UPDATE_RESULTS.name,
    names.ANSWERS.name,
    names.DECISIONS.name,
    names.REQUESTS.name,
    _BUCKETS,
)


def reading(at: float, series: Mapping[str, Sequence[Series]], model: str) -> Reading:
    """One device's reading from its series; those of other models are left out."""

    def of(name: str) -> list[Series]:
        return [
            (labels, value) for labels, value in series.get(name, ()) if labels.get("model", model) == model
        ]

    info = max(of(names.MODEL_INFO.name), key=lambda one: one[1], default=({}, 0.0))[0]
    requests: dict[str, float] = {}
    for labels, value in of(names.REQUESTS.name):
        requests[labels["status"]] = requests.get(labels["status"], 0.0) + value
    return Reading(
        at,
        reachable=True,
        version=info.get("version", ""),
        digest=info.get("digest", ""),
        state=next((labels["state"] for labels, value in of(names.UPDATE_STATE.name) if value == 1), ""),
        results={labels["result"]: value for labels, value in of(names.UPDATE_RESULTS.name)},
        rows={
            (labels["version"], labels["source"], labels["reason"]): value
            for labels, value in of(names.ANSWERS.name)
        },
        decisions={
            (labels["version"], labels["decision"]): value for labels, value in of(names.DECISIONS.name)
        },
        buckets={(labels["version"], labels["le"]): value for labels, value in of(_BUCKETS)},
        requests=requests,
    )


def _parse(text: str) -> dict[str, list[Series]]:
    """The series we want from the text exposition format."""
    # The parser takes 10 us a line; an agent exposes ten times the lines that are wanted here.
    wanted = "".join(line for line in text.splitlines(keepends=True) if line.startswith(_WANTED))
    series: dict[str, list[Series]] = {}
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            series.setdefault(sample.name, []).append((sample.labels, sample.value))
    return series


class _Unreachable(Exception):
    """No answer, with the reason in words."""


# No proxy: devices and Prometheus are inside the plant, and a proxy of the environment would see the traffic.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _get(url: str, timeout: float) -> bytes:
    place = url.partition("?")[0]
    try:
        with _OPENER.open(url, timeout=timeout) as answer:
            data: bytes = answer.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        said = error.read(200).decode(errors="replace")
        raise _Unreachable(f"{place} answered {error.code}: {' '.join(said.split())}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _Unreachable(f"{place}: {reason}") from error
    if len(data) > _MAX_BYTES:
        raise _Unreachable(f"{place} answered more than {_MAX_BYTES} bytes")
    return data
