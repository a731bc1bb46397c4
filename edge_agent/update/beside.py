"""A candidate beside what answers: in its shadow, or answering a share of its requests (A/B).

What answers is not touched from here. When the candidate takes over, and the self-test before it, are
``updater.py``'s; the limits are ``policy.py``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from edge_agent.config import UpdatesConfig
from edge_agent.contract.assignments import Split
from edge_agent.contract.bundle import Bundle
from edge_agent.update.ledger import InShadow, Ledger, UpdateOutcome
from edge_agent.update.machine import Event, Result
from edge_agent.update.policy import Answered, Shadowed, Tried, Verdict, judge_shadow, judge_split
from edge_agent.update.serving import Serving

logger = logging.getLogger(__name__)


class Beside:
    """The candidates of every model.

    Args:
        config: how long they are looked at, and what they are allowed.
        serving: who answers; None where no agent runs: then nothing begins here.
        ledger: where it is written down.
        monotonic: a clock that never goes back, seconds.
    """

    def __init__(
        self, config: UpdatesConfig, serving: Serving | None, ledger: Ledger, monotonic: Callable[[], float]
    ) -> None:
        self._config = config
        self._serving = serving
        self._ledger = ledger
        self._monotonic = monotonic

    async def begin(self, model: str, bundle: Bundle, prepared: Any, ab: Split | None) -> None:
        """Let it answer a share, or none.

        Raises:
            StoreError: the disk refused; nothing has begun.
            EngineError: it cannot stand beside what answers.
        """
        assert self._serving is not None
        await self._ledger.step(model, Event.SHADOW)
        if ab is None:
            self._serving.shadow(prepared, self._config.shadow.share)
        else:
            self._serving.split(prepared, ab.share)
        shadow = self._ledger.models[model].shadow = InShadow(bundle, prepared, self._monotonic(), ab)
        logger.info("model %s: %s begins: %s", model, bundle.manifest.version, shadow.doing)

    def judge(self, model: str, shadow: InShadow) -> tuple[Verdict, str, str]:
        """The verdict so far, its reason in one word and in one sentence."""
        assert self._serving is not None
        elapsed = self._monotonic() - shadow.since
        if shadow.ab is not None:
            both = self._serving.split_report(model)
            if both is None:
                return Verdict.UNHEALTHY, "superseded", "what it ran beside was replaced"
            its = both.candidate
            tried = Tried(
                elapsed, sum(its.latencies), its.rows, its.fallback_rows - its.late_rows,
                its.non_finite_rows, Answered.of(its), Answered.of(both.active), both.ended,
            )  # fmt: skip
            return judge_split(self._config.probation, shadow.ab, tried)
        report = self._serving.shadow_report(model)
        seen = Shadowed(
            elapsed, report.requests, report.rows, report.disagreeing_rows, report.seconds,
            report.active_seconds,
        )  # fmt: skip
        return judge_shadow(self._config.shadow, seen)

    async def leave(self, model: str, result: Result, reason: str, message: str) -> UpdateOutcome:
        """Give the candidate up."""
        tracked = self._ledger.models[model]
        shadow, tracked.shadow = tracked.shadow, None
        if self._serving:
            await self._serving.end_shadow(model)
            self._serving.end_split(model)
            if shadow is not None:
                self._serving.forget(shadow.prepared)
        if result is Result.REJECTED and tracked.record.candidate is not None:
            self._ledger.reject(model, tracked.record.candidate, reason, message)
        return await self._ledger.finish(model, Event.FAIL, result, reason, message)

    def as_dict(self, model: str) -> dict[str, Any] | None:
        """Plain values, for ``edge-agent status``; None where there is no candidate."""
        shadow = self._ledger.models[model].shadow
        if shadow is None or self._serving is None:
            return None
        about = {
            "version": str(shadow.bundle.manifest.version),
            "seconds": round(self._monotonic() - shadow.since, 1),
        }
        if shadow.ab is not None:  # how both do is said where the models are
            return {**about, "share": shadow.ab.share}
        report = self._serving.shadow_report(model)
        return {
            **about,
            "requests": report.requests,
            "rows": report.rows,
            "disagreeing_rows": report.disagreeing_rows,
            "median_seconds": report.seconds,
            "active_median_seconds": report.active_seconds,
        }
