"""Metrics arrive: through outages, refusals, restarts and damage, the newest first, each once."""

from __future__ import annotations

import asyncio
import http.server
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from edge_agent.config import RemoteWriteConfig
from edge_agent.contract import metric_names as names
from edge_agent.errors import ConfigError
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.telemetry.remote_write import CATCH_UP, Backoff, RemoteWriter, outcome
from edge_agent.telemetry.write_request import Snapshots
from tests.support.services import Prometheus
from tests.telemetry.test_write_request import decompressed, series

FAST = Backoff(first=0.02, longest=0.1)
PATIENCE = 30.0  # seconds; only reached when something is broken


class Receiver:
    """A receiver that answers from a script; then 204."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.always: int | None = None
        self.retry_after: str | None = None
        self.hang = threading.Event()
        self.hang.set()
        self.requests: list[tuple[dict[str, str], bytes, int]] = []  # headers, body, status answered
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.hang.wait(PATIENCE)
                status = receiver.always or (receiver.script.pop(0) if receiver.script else 204)
                receiver.requests.append((dict(self.headers.items()), body, status))
                self.send_response(status)
                if receiver.retry_after:
                    self.send_header("Retry-After", receiver.retry_after)
                if status != 204:
                    self.send_header("Content-Length", "5000")
                self.end_headers()
                if status != 204:
                    self.wfile.write(b"no\n" + b" " * 4997)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/api/v1/write"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.hang.set()
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def accepted(self) -> list[int]:
        """The timestamps of accepted requests, in order of arrival."""
        return [series(decompressed(body))[0][2] for _, body, status in self.requests if status == 204]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def agent_metrics() -> AgentMetrics:
    return AgentMetrics(CollectorRegistry(), "unit-1", "0.1.0")


def value(metrics: AgentMetrics, metric: names.Metric, *labels: str) -> float:
    found = metrics.registry.get_sample_value(metric.name, dict(zip(metric.labels, labels, strict=True)))
    assert found is not None
    return found


@asynccontextmanager
async def running(
    url: str,
    folder: Path,
    metrics: AgentMetrics,
    *,
    interval: float = 0.05,
    backoff: Backoff = FAST,
    max_queue_bytes: int = 1 << 20,
    timeout: float = 5.0,
) -> AsyncIterator[RemoteWriter]:
    config = RemoteWriteConfig(
        url=url, interval_seconds=interval, max_queue_bytes=max_queue_bytes, timeout_seconds=timeout
    )
    writer = RemoteWriter(config, folder, metrics, "unit-1", backoff=backoff, rng=random.Random(1))
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


async def test_snapshots_arrive_with_the_exact_headers(receiver: Receiver, tmp_path: Path) -> None:
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics):
        await until(lambda: len(receiver.requests) >= 3, "three requests")
    headers, body, _ = receiver.requests[0]
    assert headers["Content-Encoding"] == "snappy"
    assert headers["Content-Type"] == "application/x-protobuf"
    assert headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"
    assert headers["User-Agent"].startswith("edge-agent/")
    found = series(decompressed(body))
    assert names.HEARTBEAT.name in {labels["__name__"] for labels, _, _ in found}
    assert {labels["device"] for labels, _, _ in found} == {"unit-1"}
    assert len({at for _, _, at in found}) == 1
    times = receiver.accepted()
    assert times == sorted(set(times))
    assert value(metrics, names.QUEUE_SENT) > 0
    assert value(metrics, names.QUEUE_LAST_SUCCESS) == pytest.approx(time.time(), abs=PATIENCE)


@pytest.mark.parametrize("status", [500, 503, 429, 302])
async def test_what_may_work_later_is_tried_again_and_nothing_is_lost(
    receiver: Receiver, tmp_path: Path, status: int
) -> None:
    receiver.script = [status, status]
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics, interval=60):
        await until(lambda: len(receiver.requests) == 3, "two failures, one success")
        await until(lambda: value(metrics, names.QUEUE_PENDING) == 0, "the queue empties")
    bodies = [body for _, body, _ in receiver.requests]
    assert bodies[0] == bodies[1] == bodies[2]
    assert value(metrics, names.QUEUE_DROPPED, "rejected") == 0


@pytest.mark.parametrize("status", [400, 401, 404, 413])
async def test_what_is_refused_is_given_up_at_once_and_counted(
    receiver: Receiver, tmp_path: Path, status: int
) -> None:
    receiver.script = [status]
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics):
        await until(lambda: len(receiver.requests) >= 2, "the next snapshot")
        await until(lambda: value(metrics, names.QUEUE_SENT) > 0, "is counted")
    refused = series(decompressed(receiver.requests[0][1]))
    assert value(metrics, names.QUEUE_DROPPED, "rejected") == len(refused)
    assert refused[0][2] not in receiver.accepted()


async def test_retry_after_is_waited_for(receiver: Receiver, tmp_path: Path) -> None:
    receiver.script, receiver.retry_after = [429], "1"
    async with running(receiver.url, tmp_path / "q", agent_metrics(), interval=60):
        await until(lambda: receiver.requests, "the first request")
        since = time.monotonic()
        await until(lambda: len(receiver.requests) == 2, "the second")
    assert time.monotonic() - since > 0.9


async def test_after_an_outage_the_newest_goes_first_then_the_rest_in_order(
    receiver: Receiver, tmp_path: Path
) -> None:
    receiver.always = 503
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics, interval=0.05):
        await until(lambda: value(metrics, names.QUEUE_PENDING) > 1000, "a backlog")
        receiver.always = None
        await until(lambda: value(metrics, names.QUEUE_PENDING) == 0, "the queue empties")
    times = receiver.accepted()
    assert len(set(times)) == len(times) > CATCH_UP
    backlog_ends = times[0]
    backfilled = [at for at in times if at < backlog_ends]
    assert len(backfilled) > CATCH_UP
    assert backfilled == sorted(backfilled)
    assert value(metrics, names.QUEUE_DROPPED, "rejected") == value(metrics, names.QUEUE_DROPPED, "full") == 0


async def test_a_short_backlog_is_sent_in_order(receiver: Receiver, tmp_path: Path) -> None:
    """A receiver without an out-of-order window would refuse the older ones otherwise."""
    receiver.hang.clear()
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics, interval=0.3):
        await until(lambda: value(metrics, names.QUEUE_PENDING) > 0, "the first")
        first = value(metrics, names.QUEUE_PENDING)
        await until(lambda: value(metrics, names.QUEUE_PENDING) >= 3 * first, "three wait")
        receiver.hang.set()
        await until(lambda: len(receiver.accepted()) >= 3, "they arrive")
    times = receiver.accepted()
    assert times == sorted(times)


async def test_what_waits_survives_a_restart_of_the_agent(receiver: Receiver, tmp_path: Path) -> None:
    receiver.always = 503
    before = agent_metrics()
    async with running(receiver.url, tmp_path / "q", before):
        await until(lambda: value(before, names.QUEUE_PENDING) > 1000, "a backlog")
    waiting = {series(decompressed(body))[0][2] for _, body, _ in receiver.requests}
    receiver.always = None
    after = agent_metrics()
    async with running(receiver.url, tmp_path / "q", after):
        await until(lambda: len(receiver.accepted()) > CATCH_UP, "they arrive")
        await until(lambda: value(after, names.QUEUE_PENDING) == 0, "the queue empties")
    assert waiting <= set(receiver.accepted())
    assert len(set(receiver.accepted())) == len(receiver.accepted())


async def test_a_full_queue_drops_the_oldest_and_says_how_many(receiver: Receiver, tmp_path: Path) -> None:
    receiver.always = 503
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics, interval=0.01, max_queue_bytes=30_000):
        await until(lambda: value(metrics, names.QUEUE_DROPPED, "full") > 0, "a loss")
    assert sum(path.stat().st_size for path in (tmp_path / "q").iterdir()) <= 30_000


async def test_a_disk_that_keeps_nothing_still_lets_live_metrics_through(
    receiver: Receiver, tmp_path: Path
) -> None:
    """A queue too small for one snapshot stands in for a full disk."""
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics, max_queue_bytes=100):
        await until(lambda: len(receiver.accepted()) >= 2, "live metrics")


async def test_a_queue_folder_that_cannot_be_made_is_tried_again(receiver: Receiver, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    async with running(receiver.url, blocked / "q", agent_metrics()):
        await asyncio.sleep(0)
        assert not receiver.requests
        blocked.unlink()
        await until(lambda: receiver.requests, "it works once the folder can be made")


async def test_stopping_does_not_wait_for_a_receiver_that_hangs(receiver: Receiver, tmp_path: Path) -> None:
    receiver.hang.clear()
    metrics = agent_metrics()
    async with running(receiver.url, tmp_path / "q", metrics, timeout=PATIENCE):
        await until(lambda: value(metrics, names.QUEUE_PENDING) > 0, "a snapshot waits")
        await asyncio.sleep(0.1)
        since = time.monotonic()
    assert time.monotonic() - since < PATIENCE / 3


def test_pauses_double_with_jitter_up_to_the_longest() -> None:
    rng = random.Random(0)
    for failures, full in [(1, 1.0), (2, 2.0), (5, 16.0), (9, 60.0), (10_000, 60.0)]:
        pauses = [Backoff(1.0, 60.0).seconds(failures, rng) for _ in range(200)]
        assert full * 0.5 <= min(pauses) < full * 0.6
        assert full * 0.9 < max(pauses) <= full


@pytest.mark.parametrize(
    ("statuses", "means"),
    [((200, 204), "accepted"), ((400, 404, 409, 413), "rejected"), ((0, 301, 429, 500, 503), "later")],
)
def test_what_a_status_means(statuses: Sequence[int], means: str) -> None:
    assert {outcome(status) for status in statuses} == {means}


@pytest.mark.parametrize("url", ["prometheus:9090", "ftp://x/y", "http://", "http://x:notaport/"])
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"remote_write\.url"):
        RemoteWriter(RemoteWriteConfig(url=url), tmp_path, agent_metrics(), "d")


async def test_a_real_prometheus_shows_no_gap_after_it_was_killed(
    prometheus: Prometheus, tmp_path: Path
) -> None:
    metrics = agent_metrics()
    each = Snapshots(metrics.registry, {}).take(0.0).samples
    selector = f'{names.HEARTBEAT.name}{{device="unit-1"}}[1h]'
    async with running(prometheus.remote_write_url, tmp_path / "q", metrics, interval=0.2):
        await until(lambda: value(metrics, names.QUEUE_SENT) > 200, "it works")
        await asyncio.to_thread(prometheus.stop, kill=True)
        killed = time.time()
        await until(lambda: value(metrics, names.QUEUE_PENDING) >= 20 * each, "20 snapshots queue")
        await asyncio.to_thread(prometheus.start)
        returned = time.time()
        await until(lambda: value(metrics, names.QUEUE_PENDING) == 0, "the queue empties")
    assert value(metrics, names.QUEUE_DROPPED, "rejected") == 0
    # Nothing is lost and nothing is there twice: what was counted as sent is what the database holds, but for
    # a snapshot that was on its way when the writer was stopped.
    everything = await asyncio.to_thread(prometheus.series, '{device="unit-1"}[1h]')
    stored = sum(len(samples) for _, samples in everything)
    sent = value(metrics, names.QUEUE_SENT)
    assert sent <= stored <= sent + value(metrics, names.QUEUE_PENDING)
    ((_, samples),) = await asyncio.to_thread(prometheus.series, selector)
    times = [when for when, _ in samples]
    assert len([when for when in times if killed < when < returned]) > 20 - 1
    assert max(later - earlier for earlier, later in pairwise(times)) < (returned - killed) / 2
    assert all(abs(when - heartbeat) < 1 for when, heartbeat in samples)
