"""What the rules of one model remember of each source of rows, so that alarms over time can answer.

Invariants:

- the rules see every accepted row once, in the order in which the rows of a source came, with the time when
  they came, whoever answered it: a latch or a delay has no gap where the model was well;
- a request is judged as of its own place in that order, also when its model failed much later;
- bounded: a fixed number of sources, the one not heard of longest goes first; a fixed number of rows wait to
  be seen. Nothing is left out: whoever adds rows beyond it works off as many;
- a request costs a note; the rules look later, a few rows in a turn of the loop.

Rows that came in one request came at one moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from edge_agent.rules.evaluate import RuleSet, RuleState
from edge_agent.serving.decision import Scores
from edge_agent.serving.tensors import Tensor

log = logging.getLogger(__name__)

SLICE: Final = 16  # rows seen in one go: about 50 us each, and the loop answers nobody meanwhile
PAUSE_SECONDS: Final = 0.002  # between two of them, for those who want answers
MOST_WAITING: Final = 256  # rows; beyond it those who add rows work them off


@dataclass(slots=True, eq=False)
class _Source:
    state: RuleState = field(default_factory=RuleState)
    waiting: deque[Noted] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class Noted:
    """The rows of one request, in their place."""

    history: History
    source: _Source
    rows: Tensor
    now: float
    scores: Scores
    seen: int = 0  # rows of it that the rules have seen


class History:
    """The sources of one model. Lives on one event loop."""

    def __init__(self, rules: RuleSet, most_sources: int) -> None:
        self._rules = rules
        self._most_sources = most_sources
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._waiting: deque[Noted] = deque()  # of all sources; those that were seen meanwhile, too
        self._waiting_rows = 0
        self._timer: asyncio.TimerHandle | None = None
        self._complained = False

    def note(self, name: str, rows: Tensor, now: float) -> Noted:
        """Rows of a source came.

        Args:
            name: of the source.
            rows: (n, f), not altered any more by anybody.
            now: seconds, never less than before.
        """
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source()
            if len(self._sources) > self._most_sources:
                self._forget_one()
        else:
            self._sources.move_to_end(name)
        noted = Noted(self, source, rows, now, np.zeros(len(rows)))
        source.waiting.append(noted)
        self._waiting.append(noted)
        self._waiting_rows += len(rows)
        due = min(self._waiting_rows - MOST_WAITING, len(rows))
        while due > 0:
            due -= self._look()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._turn)
        return noted

    def judge(self, noted: Noted) -> Scores:
        """The rules' scores of these rows, (n,): above 1 fails."""
        while noted.seen < len(noted.rows):
            self._show(noted.source, len(noted.rows))
        return noted.scores

    def adopt(self, rules: RuleSet) -> None:
        """Go on with the rules of another release: alarms that both have keep what they remember."""
        self.see_all()
        self._rules = rules

    def see_all(self) -> None:
        """Let the rules see whatever waits."""
        while self._look():
            pass

    def alarms(self) -> dict[str, tuple[str, ...]]:
        """The active alarms of each source that has some."""
        active = ((name, source.state.names) for name, source in self._sources.items())
        return {name: names for name, names in active if names}

    def _turn(self) -> None:
        self._timer = None
        self._look()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._turn)

    def _look(self) -> int:
        """Let the rules see some rows of whoever waits longest; returns how many."""
        while self._waiting and self._waiting[0].seen == len(self._waiting[0].rows):
            self._waiting.popleft()
        return self._show(self._waiting[0].source, SLICE) if self._waiting else 0

    def _show(self, source: _Source, most: int) -> int:
        """Let the rules see up to so many rows of a source; returns how many."""
        parts: list[tuple[Noted, int, int]] = []
        count = 0
        while source.waiting and count < most:
            noted = source.waiting[0]
            begin = noted.seen
            noted.seen = min(len(noted.rows), begin + most - count)
            count += noted.seen - begin
            parts.append((noted, begin, noted.seen))
            if noted.seen == len(noted.rows):
                source.waiting.popleft()
        self._waiting_rows -= count
        rows = [noted.rows[begin:end] for noted, begin, end in parts]
        times = np.repeat([noted.now for noted, _, _ in parts], [len(part) for part in rows])
        try:
            verdicts = self._rules.evaluate(np.concatenate(rows), state=source.state, now=times)
            source.state = verdicts.state or source.state
            scores = verdicts.score
        except Exception:  # a fault of ours: the rows are judged by themselves, and so is what comes
            log.exception("the history of a source was lost")
            source.state = RuleState()
            scores = self._rules.evaluate(np.concatenate(rows)).score
        at = 0
        for noted, begin, end in parts:
            noted.scores[begin:end] = scores[at : at + end - begin]
            at += end - begin
        return count

    def _forget_one(self) -> None:
        self._sources.popitem(last=False)
        if not self._complained:
            self._complained = True
            log.warning(
                "rows of more than %d sources: the one not heard of longest is forgotten, its alarms begin "
                "anew; name fewer, or set serving.max_sources",
                self._most_sources,
            )
