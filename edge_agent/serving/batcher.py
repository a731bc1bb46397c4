"""Batching that adds no waiting.

Whatever arrived in one turn of the event loop, or while the engine was busy, goes through the model
together; a request that comes alone goes alone, at once. A fast model runs on the loop itself (a thread hop
costs more than its run), a slow one in a thread of its own, where requests whose time runs out are given back
and a run that outlives all of its requests is aborted.

Where a delay is configured, a request waits up to so long for company, unless the batch is full before, or
somebody in it has little time. Event loops keep time in whole milliseconds: the rest of a delay is passed by
turning the loop, which also is when company arrives.

The rows of a batch are laid into one buffer that is used again, and its outcome is told once for all of its
requests: what costs a microsecond a call is paid per batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from edge_agent.errors import EngineError
from edge_agent.serving.engine import Engine
from edge_agent.serving.tensors import Feeds

_ABORT_AGAIN: Final = 0.01  # seconds
_TICK: Final = 0.001  # seconds; what the timers of asyncio and uvloop can tell apart


class Pending(msgspec.Struct, eq=False):
    """A request on its way through the engine. Times are ``time.monotonic()``, in seconds."""

    feeds: Feeds
    rows: int
    started: float
    deadline: float
    done: bool = False
    begin: int = 0  # its first row in the batch
    joined: bool = False  # the outputs hold the rows of others, too


@dataclass(slots=True)
class Timings:
    """Where the time of computed requests went, in seconds, by request: a batch of three counts thrice."""

    requests: int = 0
    waiting: float = 0.0  # until the engine took them up
    computing: float = 0.0


Finish = Callable[[list[Pending], Feeds | EngineError | None], None]
"""Told once per request: requests, and the outputs of their whole batch, the engine's error, or None if the
time ran out. The rows of a request are ``begin`` to ``begin + rows``."""

_Outcome = tuple[list[Pending], Feeds | EngineError]


class Batcher:
    """The queue in front of one engine. Not thread-safe: it lives on the loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int,
        joinable: bool,
        inline: bool,
        finish: Finish,
        observe_rows: Callable[[float], None],
        delay: float = 0.0,
    ) -> None:
        self._engine = engine
        self._max_rows = max_rows if joinable else 1
        self._joinable = joinable
        self._inline = inline
        self._finish = finish
        self._observe_rows = observe_rows
        self._delay = delay if joinable else 0.0  # seconds that a request may wait for others
        self._hurry = False  # somebody in the queue has no time for that
        self._timer: asyncio.TimerHandle | None = None
        self._aborting: asyncio.TimerHandle | None = None
        self._queue: deque[Pending] = deque()
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._running: list[Pending] = []
        self._thread: ThreadPoolExecutor | None = None
        self._closing: Callable[[], None] | None = None
        self._buffers: Feeds = {}
        self.pending_rows = 0
        self.timings = Timings()  # written where the engine runs, one batch at a time

    def add(self, request: Pending) -> None:
        """Queue a request; it is computed at the end of this turn of the loop, or after the delay."""
        self._queue.append(request)
        self.pending_rows += request.rows
        if self._delay:
            self._hurry |= request.deadline - request.started < 2 * self._delay
            self._hasten()
        if not self._inline:
            self._loop.call_later(max(request.deadline - request.started, 0.0), self._expire, request)
        if not self._scheduled and not self._running:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def close(self, then: Callable[[], None]) -> None:
        """Let the queue run dry, then call ``then``; nothing is added any more."""
        self._closing = then
        self._hasten()
        if not self._scheduled and not self._running and not self._queue:
            self._shut()

    def _wait(self) -> float:
        """How much longer the queue may wait for company, in seconds."""
        if not self._queue or self._hurry or self._closing or self.pending_rows >= self._max_rows:
            return 0.0
        return self._queue[0].started + self._delay - time.monotonic()

    def _hasten(self) -> None:
        """End a wait that has lost its reason."""
        if self._timer is not None and self._wait() <= 0:
            self._timer.cancel()
            self._timer = None
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._delay and (wait := self._wait()) > 0:
            if wait < _TICK:
                self._loop.call_soon(self._flush)
            else:
                self._timer = self._loop.call_later(wait // _TICK * _TICK, self._flush)
            return
        self._scheduled = self._hurry = False
        batch = self._take()
        if not batch:
            if self._closing:
                self._shut()
            return
        self._observe_rows(batch[-1].begin + batch[-1].rows)
        if self._inline:
            self._give(self._compute(batch))
            self._next()
            return
        self._running = batch
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        future = self._loop.run_in_executor(self._thread, self._compute, batch)
        future.add_done_callback(lambda done: self._returned(done.result()))

    def _returned(self, outcomes: list[_Outcome]) -> None:
        self._running = []
        self._give(outcomes)
        self._next()

    def _next(self) -> None:
        if (self._queue or self._closing) and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _take(self) -> list[Pending]:
        batch: list[Pending] = []
        late: list[Pending] = []
        rows = 0
        now = time.monotonic()
        while self._queue:
            request = self._queue[0]
            if request.done or request.deadline <= now:
                late.append(self._queue.popleft())
                continue
            if batch and (not self._joinable or rows + request.rows > self._max_rows):
                break
            batch.append(self._queue.popleft())
            request.begin = rows
            rows += request.rows
        self._end(late, None)
        return batch

    def _give(self, outcomes: list[_Outcome]) -> None:
        for requests, result in outcomes:
            self._end(requests, result)

    def _end(self, requests: list[Pending], result: Feeds | EngineError | None) -> None:
        waiting = [request for request in requests if not request.done]
        for request in waiting:
            request.done = True
            self.pending_rows -= request.rows
        if waiting:
            self._finish(waiting, result)

    def _expire(self, request: Pending) -> None:
        self._end([request], None)
        if self._aborting is None:
            self._abort()

    def _abort(self) -> None:
        """End a run that nobody waits for: a stuck model must not take the service along."""
        self._aborting = None
        if self._running and all(waiting.done for waiting in self._running):
            self._engine.abort()
            # It may have been between two runs, and then noticed nothing.
            self._aborting = self._loop.call_later(_ABORT_AGAIN, self._abort)

    def _shut(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        closing, self._closing = self._closing, None
        if closing is not None:
            closing()

    # -- in the engine's thread, or on the loop if it runs inline: one at a time -----------------------------

    def _compute(self, batch: list[Pending]) -> list[_Outcome]:
        began = time.monotonic()
        outcomes = self._compute_together(batch)
        requests, timings = len(batch), self.timings
        timings.requests += requests
        timings.waiting += requests * began - sum([request.started for request in batch])
        timings.computing += requests * (time.monotonic() - began)
        return outcomes

    def _compute_together(self, batch: list[Pending]) -> list[_Outcome]:
        if len(batch) > 1:
            for request in batch:
                request.joined = True
            try:
                return [(batch, self._engine.run(self._join(batch)))]
            except EngineError:
                # One request may have poisoned the batch: each gets its own chance and its own error.
                for request in batch:
                    request.begin, request.joined = 0, False
        return [([request], self._compute_one(request)) for request in batch if not request.done]

    def _compute_one(self, request: Pending) -> Feeds | EngineError:
        try:
            return self._engine.run(request.feeds)
        except EngineError as error:
            return error

    def _join(self, batch: list[Pending]) -> Feeds:
        rows = batch[-1].begin + batch[-1].rows
        feeds: Feeds = {}
        for name, first in batch[0].feeds.items():
            buffer = self._buffers.get(name)
            if buffer is None:
                buffer = self._buffers[name] = np.empty((self._max_rows, *first.shape[1:]), first.dtype)
            feeds[name] = np.concatenate([request.feeds[name] for request in batch], out=buffer[:rows])
        return feeds
