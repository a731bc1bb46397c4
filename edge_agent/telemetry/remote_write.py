"""Sends the agent's metrics to Prometheus (remote write 1.0), through outages and power cuts.

Invariants:

- a snapshot is on disk before it is sent, and leaves the queue only when the receiver took or refused it;
- one request holds one timestamp, so a refused request costs one snapshot and a repeated one is harmless;
- what is new goes before what is old: a dashboard is live again with the first request after an outage;
- 5xx, 429, redirects and network errors are tried again, with growing and jittered pauses; any other 4xx is
  final, and counted.

Back-fill arrives out of order, which the receiver must allow: ``out_of_order_time_window`` (docs/metrics.md).
A backlog of a few snapshots, such as a restart of Prometheus leaves, is sent in order and needs no window.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import random
import socket
import ssl
import time
import urllib.parse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

from edge_agent import __version__
from edge_agent.config import RemoteWriteConfig
from edge_agent.errors import ConfigError
from edge_agent.telemetry.logs import EventLog
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.telemetry.queue import Queue
from edge_agent.telemetry.write_request import HEADERS, Request, Snapshots, snappy

log = EventLog(__name__)

Result = TypeVar("Result")
Outcome = Literal["accepted", "rejected", "later"]

CATCH_UP: Final = 4  # this many waiting snapshots are sent in order; more are back-fill, after the newest
BACKFILL_PER_SECOND: Final = 20.0  # 24 h at 15 s in five minutes, without a flood from 500 devices
CONNECT_SECONDS: Final = 5.0  # at most; the agent's stop may have to wait for it
MAX_RETRY_AFTER_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts: doubled each time up to ``longest``, half to whole of it at random."""

    first: float = 1.0
    longest: float = 60.0

    def seconds(self, failures: int, rng: random.Random) -> float:
        """The pause after so many failures in a row (1 or more)."""
        return min(self.longest, self.first * 2.0 ** min(failures - 1, 30)) * rng.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the receiver said; status 0 if it could not be asked."""

    status: int
    message: str
    retry_after: float = 0.0


def outcome(status: int) -> Outcome:
    """What a status means for the samples that were sent."""
    if 200 <= status < 300:
        return "accepted"
    if 400 <= status < 500 and status != 429:
        return "rejected"
    return "later"


class RemoteWriter:
    """Takes a snapshot of the registry every interval, and sends what waits.

    Args:
        config: where to, how often, how much may wait.
        directory: of the queue; created.
        metrics: what to send, and where to count the sending.
        device: the ``device`` label of every series.
        backoff: pauses after failures.
        rng: jitter.

    Raises:
        ConfigError: the URL is not an http or https URL.
    """

    def __init__(
        self,
        config: RemoteWriteConfig,
        directory: Path,
        metrics: AgentMetrics,
        device: str,
        *,
        backoff: Backoff | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self._directory = directory
        self._metrics = metrics
        self._receiver = _Receiver(config.url, config.timeout_seconds)
        self._snapshots = Snapshots(metrics.registry, {"device": device})
        self._backoff = backoff or Backoff()
        self._rng = rng or random.Random()
        self._news = asyncio.Event()
        self._last_live = 0  # sequence of the newest snapshot that left the queue
        self._backfill_from = 0.0  # by the loop's clock
        self._unkept: Request | None = None  # the disk refused it: sent once, from memory
        self._failing = False

    async def run(self) -> None:
        """Run until cancelled. A full or broken disk and an absent receiver are waited out."""
        while True:
            try:
                await self._run()
            except* Exception as errors:  # a bug of ours here must not end the agent, which answers requests
                log.error("remote_write_broke", error=errors)
            await asyncio.sleep(self._config.interval_seconds)

    async def _run(self) -> None:
        queue = await self._open()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_snapshots(queue), name="remote-write-snapshots")
                tasks.create_task(self._send(queue), name="remote-write-send")
        finally:
            self._receiver.close()
            with contextlib.suppress(OSError):
                queue.close()

    async def _open(self) -> Queue:
        while True:
            try:
                return await _in_thread(lambda: Queue(self._directory, self._config.max_queue_bytes))
            except OSError as error:
                log.error("metrics_queue_unusable", error=error, directory=self._directory)
            await asyncio.sleep(self._config.interval_seconds)

    async def _keep_snapshots(self, queue: Queue) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await _in_thread(partial(self._keep_snapshot, queue))
            self._news.set()
            # Missed beats are skipped, not made up for: a sample is of its own time.
            due = max(due + self._config.interval_seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    def _keep_snapshot(self, queue: Queue) -> None:
        request = self._snapshots.take(time.time())
        try:
            queue.append(zlib.compress(request.body, level=1), request.samples)
        except (OSError, ValueError) as error:
            log.error("metrics_not_kept", error=error, samples=request.samples)
            self._unkept = request
        self._count(queue)

    async def _send(self, queue: Queue) -> None:
        loop = asyncio.get_running_loop()
        # After an outage, or a power cut of the whole site, all devices are back at once: each begins its
        # back-fill at its own moment.
        self._backfill_from = loop.time() + self._rng.uniform(0, self._config.interval_seconds)
        failures = 0
        while True:
            if (unkept := self._unkept) is not None:
                self._unkept = None
                reply = await self._post(unkept.body)
                self._settle(outcome(reply.status), unkept.samples, lost="full")
            newest_first = queue.newest_sequence > self._last_live and len(queue) > CATCH_UP
            backfill = not newest_first and len(queue) > CATCH_UP
            if backfill and (early := self._backfill_from - loop.time()) > 0:
                await self._wait(early)
                continue
            record = await _in_thread(queue.newest if newest_first else queue.oldest)
            if record is None:
                await self._wait(None)
                continue
            reply = await self._post(zlib.decompress(record.data))
            what = outcome(reply.status)
            self._say(what, reply)
            if what == "later":
                failures += 1
                pause = self._backoff.seconds(failures, self._rng)
                await asyncio.sleep(max(pause, min(reply.retry_after, MAX_RETRY_AFTER_SECONDS)))
                continue
            if failures and not backfill:
                self._backfill_from = loop.time() + self._rng.uniform(0, self._config.interval_seconds)
            elif backfill:
                self._backfill_from = loop.time() + 1.0 / BACKFILL_PER_SECOND
            failures = 0
            self._settle(what, record.samples, lost="rejected")
            self._last_live = max(self._last_live, record.sequence)
            await _in_thread(partial(self._acknowledge, queue, record.sequence))

    async def _post(self, body: bytes) -> Reply:
        return await _in_thread(lambda: self._receiver.post(snappy(body)), self._receiver.abort)

    async def _wait(self, seconds: float | None) -> None:
        """Until there is a new snapshot, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()

    def _acknowledge(self, queue: Queue, sequence: int) -> None:
        try:
            queue.acknowledge(sequence)
        except OSError as error:  # it is out of memory's queue; after a restart it is sent again, harmlessly
            log.error("metrics_queue_unwritable", error=error)
        self._count(queue)

    def _count(self, queue: Queue) -> None:
        self._metrics.queue_pending.set(queue.waiting_samples)
        for reason, samples in queue.take_losses().items():
            if samples:
                self._metrics.queue_dropped.labels(reason).inc(samples)
                log.warning("metrics_lost", reason=reason, samples=samples)

    def _settle(self, what: Outcome, samples: int, *, lost: Literal["full", "rejected"]) -> None:
        if what == "accepted":
            self._metrics.queue_sent.inc(samples)
            self._metrics.queue_last_success.set(time.time())
        else:
            self._metrics.queue_dropped.labels(lost).inc(samples)

    def _say(self, what: Outcome, reply: Reply) -> None:
        """One line when it begins to fail, one when it works again."""
        if (what != "accepted") == self._failing:
            return
        self._failing = not self._failing
        if self._failing:
            log.warning(
                "remote_write_failing", url=self._receiver.shown, status=reply.status, why=reply.message
            )
        else:
            log.event("remote_write_working", url=self._receiver.shown)


class _Receiver:
    """One keep-alive connection to the receiver. ``post`` blocks and never raises."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"remote_write.url is {url!r}, expected an address such as http://prometheus:9090/api/v1/write"
            )
        self._tls = parts.scheme == "https"
        self._host = parts.hostname
        try:
            self._port = parts.port or (443 if self._tls else 80)
        except ValueError as error:
            raise ConfigError(f"remote_write.url is {url!r}: {error}") from error
        self._path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self._timeout = timeout
        self._headers = {**HEADERS, "User-Agent": f"edge-agent/{__version__}"}
        if parts.username is not None:
            name, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            credentials = base64.b64encode(f"{name}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {credentials}"
        self.shown = f"{parts.scheme}://{self._host}:{self._port}{parts.path}"  # without credentials
        self._connection: http.client.HTTPConnection | None = None
        self._aborted = False

    def post(self, body: bytes) -> Reply:
        """Send one compressed request."""
        reused = self._connection is not None
        try:
            return self._exchange(body)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            # A connection kept alive may have ended meanwhile, which says nothing about the receiver now.
            if not reused or self._aborted or isinstance(error, TimeoutError):
                return Reply(0, str(error) or type(error).__name__)
        try:
            return self._exchange(body)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Reply(0, str(error) or type(error).__name__)

    def abort(self) -> None:
        """End a ``post`` that runs in another thread; this receiver is not used again."""
        self._aborted = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next ``post`` opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _exchange(self, body: bytes) -> Reply:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connected()
        connection.request("POST", self._path, body, self._headers)
        response = connection.getresponse()
        message = response.read(1000).decode(errors="replace").strip()
        if not response.isclosed():
            self.close()  # the rest of its body is of no interest
        after = response.headers.get("Retry-After", "")
        return Reply(response.status, message or response.reason, float(after) if after.isdecimal() else 0.0)

    def _connected(self) -> http.client.HTTPConnection:
        connect_timeout = min(self._timeout, CONNECT_SECONDS)
        connection: http.client.HTTPConnection
        if self._tls:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=connect_timeout, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=connect_timeout)
        connection.connect()
        connection.sock.settimeout(self._timeout)
        if self._aborted:
            connection.close()
            raise ConnectionAbortedError("stopping")
        return connection


async def _in_thread(work: Callable[[], Result], abort: Callable[[], None] = lambda: None) -> Result:
    """Run blocking work in a thread; on cancellation wait for its end, so that nobody closes what it uses."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        abort()
        with contextlib.suppress(Exception):
            await task
        raise
