"""What the updater decides, apart from doing it. Pure: facts come in, a decision with its reason goes out."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass
from typing import Final

from edge_agent.config import ProbationConfig, ShadowConfig
from edge_agent.contract.assignments import Release, Share, Split
from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import Manifest
from edge_agent.contract.metric_names import LATENCY_BUCKETS
from edge_agent.contract.version import Version
from edge_agent.errors import UpdateRejected
from edge_agent.store.state import Rejected, UpdateRecord
from edge_agent.update.holds import Hold
from edge_agent.update.machine import Event, Result
from edge_agent.update.serving import ServedRows

_ENOUGH: Final = 50  # rows or requests on either side; a share of fewer says little
_LOOKS: Final = 3  # at what is too slow: a device that is busy for a moment is no slow release
_MAY_BE_THE_MACHINE: Final = ("latency", "deadline")
_UNHURRIED: Final = 0.002  # seconds; what answers faster is not too slow, whatever it is compared with


@dataclass(frozen=True, slots=True)
class Decision:
    """What a check means for one model. ``result`` is None where an update begins."""

    event: Event
    result: Result | None = None
    reason: str = ""
    message: str = ""


def decide(
    share: Share | None, current: Digest | None, intact: bool, record: UpdateRecord, hold: Hold | None = None
) -> Decision:
    """Compare what this device should run with what it runs.

    Args:
        share: this device's part of the assignments; None if they do not speak of the model.
        current: the digest that ``current`` points at.
        intact: whether every byte of it is what it was.
        record: what was rejected here before.
        hold: the device's own say, if it says no.
    """
    if share is None or share.release is None:
        return Decision(
            Event.NOTHING_NEW, Result.NO_ARTIFACT, "no_artifact", "the assignments name no release"
        )
    release = share.release
    rejection = record.rejection(release.digest)
    if release.digest == current:
        if rejection is not None:  # it failed here, and there was nothing to go back to: its rules answer
            return _rejected_before(release, rejection)
        if intact:
            return Decision(
                Event.NOTHING_NEW,
                Result.ALREADY_INSTALLED,
                "already_installed",
                f"{release.version} is installed",
            )
        return Decision(Event.NEW_RELEASE, reason="repair", message=f"{release.version} is damaged on disk")
    if share.held:
        return Decision(
            Event.HOLD, None, "held", f"{release.version} waits: the assignments hold this device"
        )
    if share.beside and current is None:
        text = f"{release.version} waits: there is nothing yet that it could be compared with"
        return Decision(Event.HOLD, None, "shadow", text)
    if rejection is not None:
        return _rejected_before(release, rejection)
    try:
        check_floor(release.version, share.minimum_version)
    except UpdateRejected as error:
        return Decision(Event.NOTHING_NEW, Result.REJECTED, error.reason, str(error))
    if hold is not None:
        return Decision(Event.HOLD, None, hold.kind, f"{release.version} waits: {hold}")
    return Decision(Event.NEW_RELEASE)


def _rejected_before(release: Release, rejection: Rejected) -> Decision:
    message = f"{release.version} was rejected here before: {rejection.message}"
    return Decision(Event.NOTHING_NEW, Result.REJECTED, rejection.reason, message)


def check_floor(version: Version, minimum: Version | None) -> None:
    """Refuse a release below the signed floor.

    Raises:
        UpdateRejected: ``reason`` is ``below_floor``.
    """
    if minimum is not None and version < minimum:
        raise UpdateRejected(
            f"version {version} is below the signed minimum {minimum}; choose a newer release",
            reason="below_floor",
        )


def check_fit(manifest: Manifest, machine: str, agent: Version, max_bytes: int) -> None:
    """Refuse what this device cannot run, before a byte of it is fetched.

    Raises:
        UpdateRejected: ``reason`` is ``wrong_arch``, ``agent_too_old`` or ``too_large``.
    """
    requires = manifest.requires
    if requires.arch and machine not in requires.arch:
        raise UpdateRejected(
            f"{manifest.name} {manifest.version} is for {', '.join(requires.arch)}, this device is {machine}",
            reason="wrong_arch",
        )
    if requires.agent is not None and agent < requires.agent:
        raise UpdateRejected(
            f"{manifest.name} {manifest.version} needs agent {requires.agent}, this is {agent}; update it",
            reason="agent_too_old",
        )
    if manifest.size > max_bytes:
        raise UpdateRejected(
            f"{manifest.name} {manifest.version} has {manifest.size} bytes, "
            f"updates.max_bundle_bytes allows {max_bytes}",
            reason="too_large",
        )


class Verdict(enum.Enum):
    """What probation says."""

    WAIT = "wait"
    AGAIN = "again"  # once more from here: what was seen may be the machine's doing
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a release answered, in the numbers that two releases are compared by.

    Attributes:
        rows: rows that its model answered.
        failed_rows: of those, the ones decided fail.
        latencies: requests by ``bounds``, not cumulated, those beyond the last bound last.
        scores: rows by whole doublings of score / threshold, ascending; a sample.
        late_rows: rows that the rules answered because its time was over.
    """

    rows: int
    failed_rows: int
    latencies: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    late_rows: int = 0

    @classmethod
    def of(cls, served: ServedRows) -> Answered:
        """Of what a release has served so far."""
        by_model = max(served.rows - served.fallback_rows, 0)
        return cls(
            by_model, served.failed_rows, tuple(served.latencies), tuple(served.scores), served.late_rows
        )

    @property
    def late_share(self) -> float:
        """The share of rows that its time was over for; 0 without rows."""
        return self.late_rows / max(self.rows + self.late_rows, 1)

    def since(self, then: Answered) -> Answered:
        """What came on top of ``then``, an earlier count of the same release."""
        return Answered(
            self.rows - then.rows,
            self.failed_rows - then.failed_rows,
            _minus(self.latencies, then.latencies),
            _minus(self.scores, then.scores),
            self.late_rows - then.late_rows,
        )

    def latency(self, quantile: float, bounds: tuple[float, ...] = LATENCY_BUCKETS) -> float:
        """The upper bound of the bucket that the quantile lies in, in seconds; 0 without requests."""
        wanted = quantile * sum(self.latencies)
        reached = 0
        for count, bound in zip(self.latencies, (*bounds, float("inf")), strict=False):
            reached += count
            if count and reached >= wanted:
                return bound
        return 0.0


def _minus(counts: tuple[int, ...], then: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count - before for count, before in itertools.zip_longest(counts, then, fillvalue=0))


def too_late(config: ProbationConfig, now: Answered, usual: float) -> tuple[str, str] | None:
    """Whether its time was over for many more rows than usual, in one word and in a sentence; None if not.

    ``usual`` is the share of rows for which that is so anyway: callers may give less time than any model
    needs.
    """
    if now.late_share <= config.max_fallback_ratio + usual:
        return None
    return "deadline", f"its time was over for {now.late_share:.1%} of the rows, usually for {usual:.1%}"


def compare(config: ProbationConfig, now: Answered, before: Answered) -> tuple[str, str] | None:
    """What is much worse or quite different than before, in one word and in a sentence; None if nothing is.

    Only where both have answered enough rows to say so. Latency is compared at the 95th percentile, in whole
    buckets; scores by how many doublings, relative to the threshold, their distribution moved on average
    (the Wasserstein distance).
    """
    if min(sum(now.latencies), sum(before.latencies)) >= _ENOUGH and config.max_latency_ratio:
        late, usual = now.latency(0.95), before.latency(0.95)
        if late > max(config.max_latency_ratio * usual, _UNHURRIED):
            return "latency", f"95 % of its answers took up to {late * 1e3:g} ms, before {usual * 1e3:g} ms"
    if min(now.rows, before.rows) >= _ENOUGH and config.max_fail_shift:
        share, usual = now.failed_rows / now.rows, before.failed_rows / before.rows
        if abs(share - usual) > config.max_fail_shift:
            return "decisions", f"it decides fail on {share:.1%} of the rows, before it was {usual:.1%}"
    if min(sum(now.scores), sum(before.scores)) >= _ENOUGH and config.max_score_shift:
        moved = _wasserstein(now.scores, before.scores)
        if moved > config.max_score_shift:
            return "scores", f"its scores are {moved:.1f} doublings from those of the release before"
    return None


def _wasserstein(ours: tuple[int, ...], theirs: tuple[int, ...]) -> float:
    """Mean distance between two histograms over the same bins, in bins."""
    distance = here = 0.0
    for a, b in zip(ours, theirs, strict=False):
        here += a / sum(ours) - b / sum(theirs)
        distance += abs(here)
    return distance


@dataclass(frozen=True, slots=True)
class Observed:
    """What a release did since it was activated.

    Attributes:
        seconds: since activation, or since this process started if that was later.
        rows: rows answered.
        fallback_rows: of those, the ones that the rules had to answer through a fault of the model other
            than that its time was over.
        state: the serving state of the model (``metric_names.MODEL_STATES``).
        right: whether what is served is the release on probation.
        non_finite_rows: of ``fallback_rows``, the ones where the model's result was not finite.
        now: what it answered since this look began.
        before: what the release before had answered; None if nobody knows.
        look: which one this is, from 1; another begins with ``AGAIN``, and ``seconds`` with it.
    """

    seconds: float
    rows: int
    fallback_rows: int
    state: str
    right: bool
    non_finite_rows: int = 0
    now: Answered | None = None
    before: Answered | None = None
    look: int = 1


def judge(config: ProbationConfig, seen: Observed) -> tuple[Verdict, str, str]:
    """The verdict on a release on probation, its reason in one word and in one sentence.

    Unhealthy as soon as it is certain: when the failures are more than ``max_fallback_ratio`` allows for
    all the requests it must answer, even if every further one went well. What is too slow, or late, must be
    so at ``_LOOKS`` looks one after the other: that may be the machine's doing, and the rules answer
    meanwhile.
    """
    if seen.state == "unloaded":
        return Verdict.WAIT, "unloaded", "an operator unloaded the model"
    if seen.state == "corrupt":
        return Verdict.UNHEALTHY, "corrupt", "its files were damaged on this device's disk"
    if not seen.right or seen.state not in ("ready", "loading"):
        return Verdict.UNHEALTHY, "not_running", f"the release is not what runs: the model is {seen.state}"
    rows = max(seen.rows, seen.fallback_rows)
    if seen.fallback_rows > config.max_fallback_ratio * max(rows, config.requests, 1):
        return (
            Verdict.UNHEALTHY,
            "fallback",
            f"the rules had to answer {seen.fallback_rows} of {rows} rows",
        )
    if seen.non_finite_rows > config.max_non_finite_ratio * max(rows, config.requests, 1):
        return (
            Verdict.UNHEALTHY,
            "non_finite",
            f"it answered NaN or infinity for {seen.non_finite_rows} of {rows} rows",
        )
    fresh = seen.look == 1 or (seen.now is not None and sum(seen.now.latencies) >= config.requests)
    full = seen.seconds >= config.seconds and rows >= config.requests and fresh
    if full or seen.seconds >= config.max_seconds:
        if seen.fallback_rows > config.max_fallback_ratio * max(rows, 1):
            return (
                Verdict.UNHEALTHY,
                "fallback",
                f"the rules had to answer {seen.fallback_rows} of {rows} rows",
            )
        worse = None
        if seen.now is not None:
            worse = too_late(config, seen.now, seen.before.late_share if seen.before else 0.0)
        if worse is None and seen.now and seen.before:
            worse = compare(config, seen.now, seen.before)
        if worse is not None:
            again = worse[0] in _MAY_BE_THE_MACHINE and seen.look < _LOOKS
            return Verdict.AGAIN if again else Verdict.UNHEALTHY, *worse
        return Verdict.HEALTHY, "healthy", f"{rows} rows in {seen.seconds:.0f} s"
    return Verdict.WAIT, "probation", f"{rows} of {config.requests} rows, {seen.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Shadowed:
    """How a candidate did in the shadow of the release that answers; seconds are medians of a request."""

    elapsed: float  # seconds since it began
    requests: int
    rows: int
    disagreeing_rows: int
    seconds: float
    active_seconds: float


def judge_shadow(config: ShadowConfig, seen: Shadowed) -> tuple[Verdict, str, str]:
    """The verdict on a candidate in the shadow, its reason in one word and in one sentence."""
    compared = f"{seen.disagreeing_rows} of {seen.rows} rows were decided otherwise"
    if seen.disagreeing_rows > config.max_disagreement * max(seen.rows, config.requests):
        return Verdict.UNHEALTHY, "disagreement", compared
    if seen.requests < config.requests and seen.elapsed < config.seconds:
        return Verdict.WAIT, "shadow", f"{seen.requests} of {config.requests} requests compared"
    if seen.disagreeing_rows > config.max_disagreement * seen.rows:
        return Verdict.UNHEALTHY, "disagreement", compared
    limit = max(config.max_latency_ratio * seen.active_seconds, _UNHURRIED)
    if config.max_latency_ratio and seen.seconds > limit:
        took = f"a request takes {seen.seconds * 1e3:.2f} ms, {seen.active_seconds * 1e3:.2f} ms as it is"
        return Verdict.UNHEALTHY, "shadow_slow", took
    return Verdict.HEALTHY, "agreed", compared


@dataclass(frozen=True, slots=True)
class Tried:
    """How a candidate did that answers a share of the requests, and the release beside it meanwhile."""

    elapsed: float  # seconds since it began
    requests: int  # that the candidate got
    rows: int
    fallback_rows: int  # but for those that its time was over for
    non_finite_rows: int
    now: Answered  # by the candidate
    beside: Answered
    ended: str = ""  # why it answers nothing more


def judge_split(config: ProbationConfig, split: Split, seen: Tried) -> tuple[Verdict, str, str]:
    """The verdict on a candidate that answers a share, its reason in one word and in one sentence.

    What a release on probation is allowed, it is allowed; but it is compared with what answers at the same
    time, not with what answered before.
    """
    if seen.ended:
        return Verdict.UNHEALTHY, seen.ended, f"it failed too often in a row, after {seen.rows} rows"
    over = seen.requests >= split.requests or seen.elapsed >= split.seconds
    of = max(seen.rows, 1) if over else max(seen.rows, split.requests)
    for reason, rows, most, text in (
        ("fallback", seen.fallback_rows, config.max_fallback_ratio, "the rules had to answer"),
        ("non_finite", seen.non_finite_rows, config.max_non_finite_ratio, "it answered NaN or infinity for"),
    ):
        if rows > most * of:
            return Verdict.UNHEALTHY, reason, f"{text} {rows} of {seen.rows} rows"
    if not over:
        return Verdict.WAIT, "ab", f"{seen.requests} of {split.requests} requests answered"
    # One look: what is beside it runs on the same machine at the same time.
    worse = too_late(config, seen.now, seen.beside.late_share) or compare(config, seen.now, seen.beside)
    if worse is not None:
        return Verdict.UNHEALTHY, *worse
    return Verdict.HEALTHY, "agreed", f"{seen.requests} requests in {seen.elapsed:.0f} s"
