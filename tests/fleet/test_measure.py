"""Readings from the agent's own exposition and from a real Prometheus; samples bound to a digest."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry

from edge_agent.contract.digest import Digest
from edge_agent.telemetry.metrics import AgentMetrics
from fleet.config import PrometheusConfig, ScrapeConfig
from fleet.errors import MeasurementError
from fleet.inventory import Device
from fleet.measure import Prometheus, Reading, Scraper, between, quantile
from tests.support.services import Prometheus as Server
from tests.support.services import eventually

ONE, TWO = Digest.of_bytes(b"1"), Digest.of_bytes(b"2")
STATES = ("idle", "probation", "committed")


class Exposed:
    """An agent's metrics behind a real socket."""

    def __init__(self, device: str) -> None:
        self.metrics = metrics = AgentMetrics(CollectorRegistry(), device, "0.1.0")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(metrics.exposition())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.device = Device(id=device, address=f"http://{self.address}")
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()
        metrics.update_results("pump", ("succeeded", "rejected"))

    def install(self, version: str, digest: Digest, state: str = "committed") -> None:
        self.metrics.model_info("pump", version, digest)
        self.metrics.update_state("pump", state, STATES)

    def answer(self, version: str, rows: int, *, reason: str = "ok", failed: int = 0) -> None:
        release = self.metrics.for_release("pump", version)
        for row in range(rows):
            release.answered(reason, 1, int(row < failed), 0.0004)

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def agent() -> Iterator[Exposed]:
    exposed = Exposed("unit-1")
    yield exposed
    exposed.close()


def _scrape(*devices: Device) -> dict[str, Reading]:
    return Scraper(ScrapeConfig(timeout_seconds=5)).read(devices, "pump")


def test_a_scrape_reads_what_the_agent_exposes(agent: Exposed) -> None:
    agent.install("1.0.0", ONE, "probation")
    agent.metrics.update_result("pump", "rejected")
    one = _scrape(agent.device)["unit-1"]
    assert (one.reachable, one.version, one.digest, one.state) == (True, "1.0.0", ONE, "probation")
    assert one.results == {"succeeded": 0, "rejected": 1}
    assert one.bad_results == 1


def test_a_sample_counts_what_the_release_did_between_two_scrapes(agent: Exposed) -> None:
    agent.install("2.0.0", TWO)
    agent.answer("1.0.0", 500, failed=400)
    agent.answer("2.0.0", 1000)
    before = _scrape(agent.device)["unit-1"]
    agent.answer("2.0.0", 90, failed=30)
    agent.answer("2.0.0", 8, reason="model_error")
    agent.answer("2.0.0", 2, reason="killed")
    agent.answer("1.0.0", 77, failed=77)  # in flight on the release before: not this one's
    agent.metrics.request("http", "ok")(96)
    agent.metrics.request("mqtt", "error")(4)
    agent.metrics.request("http", "client_error")(50)
    sample = between("unit-1", before, _scrape(agent.device)["unit-1"])
    assert sample is not None
    assert (sample.rows, sample.fallback, sample.digest) == (100, 8, TWO)
    assert sample.value("fail_ratio") == (0.30, 100)
    assert sample.value("fallback_ratio") == (0.08, 100)
    assert sample.value("error_ratio") == (0.04, 100)
    p99, rows = sample.value("p99_seconds")
    assert rows == 100
    assert p99 is not None
    assert 0.00025 < p99 <= 0.0005


def test_a_release_that_changed_in_between_gives_no_sample(agent: Exposed) -> None:
    agent.install("1.0.0", ONE)
    before = _scrape(agent.device)["unit-1"]
    agent.install("2.0.0", TWO)
    agent.answer("2.0.0", 100)
    after = _scrape(agent.device)["unit-1"]
    assert between("unit-1", before, after) is None
    assert between("unit-1", after, _scrape(agent.device)["unit-1"]) is not None


def test_a_silent_device_is_unreachable_and_the_others_are_read(agent: Exposed) -> None:
    agent.install("1.0.0", ONE)
    gone = Exposed("unit-2")
    gone.close()
    readings = _scrape(agent.device, gone.device, Device(id="unit-3"))
    assert readings["unit-1"].reachable
    assert not readings["unit-2"].reachable
    assert "refused" in readings["unit-2"].problem
    assert readings["unit-3"].problem == "no address in devices.yaml"
    assert between("unit-2", readings["unit-2"], readings["unit-2"]) is None


def test_an_agent_that_restarted_counts_from_zero() -> None:
    key = ("1.0.0", "model", "ok")
    before = Reading(1.0, reachable=True, version="1.0.0", digest=ONE, rows={key: 1000.0})
    after = Reading(2.0, reachable=True, version="1.0.0", digest=ONE, rows={key: 30.0})
    sample = between("d", before, after)
    assert sample is not None
    assert sample.rows == 30


def test_quantile_is_what_promql_computes() -> None:
    buckets = {0.1: 10.0, 0.5: 50.0, 1.0: 90.0, math.inf: 100.0}
    assert quantile(0.5, buckets) == pytest.approx(0.5)
    assert quantile(0.3, buckets) == pytest.approx(0.1 + 0.4 * (30 - 10) / 40)
    assert quantile(0.99, buckets) == 1.0  # beyond the last finite bound
    assert quantile(0.99, dict.fromkeys(buckets, 0.0)) is None
    assert quantile(0.99, {}) is None


def test_prometheus_gives_the_same_readings_as_a_scrape(agent: Exposed, prometheus: Server) -> None:
    agent.install("1.0.0", ONE)
    agent.answer("1.0.0", 100, failed=20)
    agent.metrics.request("http", "ok")(100)
    prometheus.scrape({agent.address: {"device": "unit-1"}})
    source = Prometheus(PrometheusConfig(address=prometheus.url, stale_after_seconds=30))
    devices = (agent.device, Device(id="unit-2"))
    eventually(lambda: source.read(devices, "pump")["unit-1"].reachable, "the first scrape")
    agent.install("2.0.0", TWO, "probation")
    agent.answer("2.0.0", 50, failed=5)
    eventually(lambda: source.read(devices, "pump")["unit-1"].digest == TWO, "the scrape after the swap")

    readings = source.read(devices, "pump")
    direct = _scrape(agent.device)["unit-1"]
    from_prometheus = readings["unit-1"]
    for name in ("version", "digest", "state", "results", "rows", "decisions", "requests"):
        assert getattr(from_prometheus, name) == getattr(direct, name), name
    assert {(v, float(le)): n for (v, le), n in from_prometheus.buckets.items()} == {
        (v, float(le)): n for (v, le), n in direct.buckets.items()
    }
    assert not readings["unit-2"].reachable
    assert readings["unit-2"].problem == "no sample in Prometheus"


def test_a_device_whose_newest_sample_is_old_is_unreachable(agent: Exposed, prometheus: Server) -> None:
    agent.install("1.0.0", ONE)
    prometheus.scrape({agent.address: {"device": "unit-1"}})
    fresh = Prometheus(PrometheusConfig(address=prometheus.url, stale_after_seconds=60))
    eventually(lambda: fresh.read([agent.device], "pump")["unit-1"].reachable, "the first scrape")
    strict = Prometheus(PrometheusConfig(address=prometheus.url, stale_after_seconds=1e-9))
    one = strict.read([agent.device], "pump")["unit-1"]
    assert not one.reachable
    assert "old in Prometheus" in one.problem


def test_a_prometheus_that_is_away_is_an_error_of_the_measurement(prometheus: Server) -> None:
    prometheus.stop()
    source = Prometheus(PrometheusConfig(address=prometheus.url))
    with pytest.raises(MeasurementError, match=r"cannot be asked: .*refused"):
        source.read([], "pump")


def test_something_else_on_the_port_is_an_error_of_the_measurement(agent: Exposed) -> None:
    source = Prometheus(PrometheusConfig(address=agent.device.address))
    with pytest.raises(MeasurementError, match="does not answer like a Prometheus"):
        source.read([], "pump")
