"""Batching that adds no waiting.

Whatever arrived in one turn of the event loop, or while the engine was busy, goes through the model
together; a request that comes alone goes alone, at once. A fast model runs on the loop itself (a thread hop
costs more than its run), a slow one in a thread of its own, where requests whose time runs out are given back
and a run that outlives all of its requests is aborted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edge_agent.errors import EngineError
from edge_agent.serving.engine import Engine
from edge_agent.serving.tensors import Feeds


@dataclass(slots=True, eq=False)
class Pending:
    """A request on its way through the engine. Times are ``time.monotonic()``, in seconds."""

    feeds: Feeds
    rows: int
    started: float
    deadline: float
    done: bool = False


Finish = Callable[[Pending, Feeds | EngineError | None], None]
"""Told once per request: the outputs, the engine's error, or None if the time ran out."""


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
    ) -> None:
        self._engine = engine
        self._max_rows = max_rows if joinable else 1
        self._joinable = joinable
        self._inline = inline
        self._finish = finish
        self._observe_rows = observe_rows
        self._queue: deque[Pending] = deque()
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._running: list[Pending] = []
        self._thread: ThreadPoolExecutor | None = None
        self._closing: Callable[[], None] | None = None
        self.pending_rows = 0

    def add(self, request: Pending) -> None:
        """Queue a request; it is computed at the end of this turn of the loop."""
        self._queue.append(request)
        self.pending_rows += request.rows
        if not self._inline:
            self._loop.call_later(max(request.deadline - request.started, 0.0), self._expire, request)
        if not self._scheduled and not self._running:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def close(self, then: Callable[[], None]) -> None:
        """Let the queue run dry, then call ``then``; nothing is added any more."""
        self._closing = then
        if not self._scheduled and not self._running and not self._queue:
            self._shut()

    def _flush(self) -> None:
        self._scheduled = False
        batch = self._take()
        if not batch:
            if self._closing:
                self._shut()
            return
        self._observe_rows(sum(request.rows for request in batch))
        if self._inline:
            self._give(batch, _compute(self._engine, batch))
            self._next()
            return
        self._running = batch
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        future = self._loop.run_in_executor(self._thread, _compute, self._engine, batch)
        future.add_done_callback(lambda done: self._returned(batch, done.result()))

    def _returned(self, batch: list[Pending], results: list[Feeds | EngineError]) -> None:
        self._running = []
        self._give(batch, results)
        self._next()

    def _next(self) -> None:
        if (self._queue or self._closing) and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _take(self) -> list[Pending]:
        batch: list[Pending] = []
        rows = 0
        now = time.monotonic()
        while self._queue:
            request = self._queue[0]
            if request.done or request.deadline <= now:
                self._queue.popleft()
                self._end(request, None)
                continue
            if batch and (not self._joinable or rows + request.rows > self._max_rows):
                break
            batch.append(self._queue.popleft())
            rows += request.rows
        return batch

    def _give(self, batch: list[Pending], results: list[Feeds | EngineError]) -> None:
        for request, result in zip(batch, results, strict=True):
            self._end(request, result)

    def _end(self, request: Pending, result: Feeds | EngineError | None) -> None:
        if not request.done:
            request.done = True
            self.pending_rows -= request.rows
            self._finish(request, result)

    def _expire(self, request: Pending) -> None:
        self._end(request, None)
        if self._running and all(waiting.done for waiting in self._running):
            self._engine.abort()  # nobody waits for it: a stuck model must not take the service along

    def _shut(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        closing, self._closing = self._closing, None
        if closing is not None:
            closing()


def _compute(engine: Engine, batch: list[Pending]) -> list[Feeds | EngineError]:
    if len(batch) == 1:
        return [_compute_one(engine, batch[0])]
    names = batch[0].feeds.keys()
    try:
        joined = engine.run(
            {name: np.concatenate([request.feeds[name] for request in batch]) for name in names}
        )
    except EngineError:
        # One request may have poisoned the batch: each gets its own chance and its own error.
        return [_compute_one(engine, request) for request in batch]
    results: list[Feeds | EngineError] = []
    begin = 0
    for request in batch:
        end = begin + request.rows
        results.append({name: value[begin:end] for name, value in joined.items()})
        begin = end
    return results


def _compute_one(engine: Engine, request: Pending) -> Feeds | EngineError:
    try:
        return engine.run(request.feeds)
    except EngineError as error:
        return error
