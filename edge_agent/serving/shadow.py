"""Shadow: a release that sees live requests beside the one that answers, and answers none of them.

Invariants:

- what a caller gets does not depend on it: it looks at requests that were answered already, in a thread;
- its cost is bounded: a share of the requests, a queue of fixed length, one run at a time. What does not fit
  is not looked at.

A row disagrees if it is decided otherwise, or if the shadow's result is not finite. An engine that raises
disagrees on every row of the request. Latency is the processor time of the run: a thread that waits for its
turn says nothing about the model.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.contract.manifest import Manifest
from edge_agent.errors import EngineError, InvalidInput
from edge_agent.serving.decision import fails
from edge_agent.serving.engine import Engine
from edge_agent.serving.tensors import Feeds, conform

_QUEUE: Final = 32  # requests
_KEPT: Final = 512  # durations, the newest
_TICK: Final = 0.01  # seconds
_PATIENCE: Final = 1.0  # seconds a request; beyond it the run is aborted, and every row of it disagrees


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """How the shadow did so far. Durations are medians a request, in seconds; 0 where there is none yet."""

    requests: int = 0
    rows: int = 0
    disagreeing_rows: int = 0  # those that are not finite, or were not computed, among them
    non_finite_rows: int = 0
    failed_rows: int = 0  # the engine raised
    seconds: float = 0.0
    active_seconds: float = 0.0  # of the release that answered


@dataclass(frozen=True, slots=True)
class _Seen:
    feeds: Feeds
    rows: int
    failed: Sequence[bool] | None
    seconds: float


class Shadow:
    """Compares one engine with what was answered."""

    def __init__(self, manifest: Manifest, engine: Engine, share: float) -> None:
        self.manifest = manifest
        self._engine = engine
        self._share = share
        self._due = 0.0
        self._queue: deque[_Seen] = deque()
        self._wake = asyncio.Event()
        self._requests = self._rows = self._disagreeing = self._non_finite = self._failed = 0
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._active: deque[float] = deque(maxlen=_KEPT)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="shadow")

    def offer(self, feeds: Feeds, rows: int, failed: Sequence[bool] | None, seconds: float) -> None:
        """A request that the model answered: ``failed`` is what was decided, ``seconds`` how long it took."""
        self._due += self._share
        if self._due < 1.0:
            return
        self._due -= 1.0
        if len(self._queue) < _QUEUE:
            self._queue.append(_Seen(feeds, rows, failed, seconds))
            self._wake.set()

    def report(self) -> ShadowReport:
        """What was seen so far."""
        return ShadowReport(
            self._requests, self._rows, self._disagreeing, self._non_finite, self._failed,
            statistics.median(self._seconds) if self._seconds else 0.0,
            statistics.median(self._active) if self._active else 0.0,
        )  # fmt: skip

    async def stop(self) -> None:
        """Look at nothing more; returns when the engine is no longer in use."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                looking = asyncio.create_task(asyncio.to_thread(self._look, self._queue.popleft()))
                try:
                    while not (await asyncio.wait([looking], timeout=_PATIENCE))[0]:
                        self._engine.abort()
                except asyncio.CancelledError:
                    # A thread cannot be cancelled, only waited for; a run can.
                    while not (await asyncio.wait([looking], timeout=_TICK))[0]:
                        self._engine.abort()
                    raise
                looking.result()

    def _look(self, seen: _Seen) -> None:
        """In a thread: run the request once more, and compare."""
        try:
            feeds, _ = conform(self.manifest.inputs, seen.feeds, seen.rows)
            before = time.thread_time()
            outputs = self._engine.run(feeds)
            self._seconds.append(time.thread_time() - before)
            self._active.append(seen.seconds)
        except (EngineError, InvalidInput):
            self._failed += seen.rows
            disagreeing = seen.rows
        else:
            disagreeing = self._compare(seen, outputs)
        self._disagreeing += disagreeing
        self._rows += seen.rows
        self._requests += 1

    def _compare(self, seen: _Seen, outputs: Feeds) -> int:
        decision = self.manifest.decision
        if decision is None:
            finite = np.ones(seen.rows, bool)
            for values in outputs.values():
                if values.dtype.kind == "f" and values.shape[:1] == (seen.rows,):
                    finite &= np.isfinite(values.reshape(seen.rows, -1)).all(axis=1)
            lost = int(seen.rows - np.count_nonzero(finite))
            self._non_finite += lost
            return lost
        scores = outputs[decision.output].astype(np.float64).reshape(-1)
        if len(scores) != seen.rows:
            self._failed += seen.rows
            return seen.rows
        finite = np.isfinite(scores)
        self._non_finite += int(seen.rows - np.count_nonzero(finite))
        if seen.failed is None:
            return int(seen.rows - np.count_nonzero(finite))
        decided = [fails(score, decision) for score in scores.tolist()]
        return sum(
            not sound or mine != answered
            for sound, mine, answered in zip(finite.tolist(), decided, seen.failed, strict=True)
        )
