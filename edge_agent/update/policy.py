"""What the updater decides, apart from doing it. Pure: facts come in, a decision with its reason goes out."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from edge_agent.config import ProbationConfig
from edge_agent.contract.assignments import Mode, Release, Share
from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import Manifest
from edge_agent.contract.version import Version
from edge_agent.errors import UpdateRejected
from edge_agent.store.state import Rejected, UpdateRecord
from edge_agent.update.machine import Event, Result


@dataclass(frozen=True, slots=True)
class Decision:
    """What a check means for one model. ``result`` is None where an update begins."""

    event: Event
    result: Result | None = None
    reason: str = ""
    message: str = ""


def decide(share: Share | None, current: Digest | None, intact: bool, record: UpdateRecord) -> Decision:
    """Compare what this device should run with what it runs.

    Args:
        share: this device's part of the assignments; None if they do not speak of the model.
        current: the digest that ``current`` points at.
        intact: whether every byte of it is what it was.
        record: what was rejected here before.
    """
    if share is None or share.release is None:
        return Decision(
            Event.NOTHING_NEW, Result.NO_ARTIFACT, "no_artifact", "the assignments name no release"
        )
    release = share.release
    rejection = record.rejection(release.digest)
    if release.digest == current:
        if intact and rejection is not None:  # it failed here, and there was nothing to go back to
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
    if share.mode is Mode.SHADOW:
        return Decision(Event.HOLD, None, "shadow", f"{release.version} waits: shadow is not supported yet")
    if rejection is not None:
        return _rejected_before(release, rejection)
    try:
        check_floor(release.version, share.minimum_version)
    except UpdateRejected as error:
        return Decision(Event.NOTHING_NEW, Result.REJECTED, error.reason, str(error))
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
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class Observed:
    """What a release did since it was activated.

    Attributes:
        seconds: since activation, or since this process started if that was later.
        rows: rows answered.
        fallback_rows: of those, the ones that the rules had to answer through a fault of the model.
        state: the serving state of the model (``metric_names.MODEL_STATES``).
        right: whether what is served is the release on probation.
    """

    seconds: float
    rows: int
    fallback_rows: int
    state: str
    right: bool


def judge(config: ProbationConfig, seen: Observed) -> tuple[Verdict, str, str]:
    """The verdict on a release on probation, its reason in one word and in one sentence.

    Unhealthy as soon as it is certain: when the failures are more than ``max_fallback_ratio`` allows for
    all the requests it must answer, even if every further one went well.
    """
    if seen.state == "unloaded":
        return Verdict.WAIT, "unloaded", "an operator unloaded the model"
    if not seen.right or seen.state not in ("ready", "loading"):
        return Verdict.UNHEALTHY, "not_running", f"the release is not what runs: the model is {seen.state}"
    rows = max(seen.rows, seen.fallback_rows)
    if seen.fallback_rows > config.max_fallback_ratio * max(rows, config.requests, 1):
        return (
            Verdict.UNHEALTHY,
            "fallback",
            f"the rules had to answer {seen.fallback_rows} of {rows} rows",
        )
    if (seen.seconds >= config.seconds and rows >= config.requests) or seen.seconds >= config.max_seconds:
        if seen.fallback_rows > config.max_fallback_ratio * max(rows, 1):
            return (
                Verdict.UNHEALTHY,
                "fallback",
                f"the rules had to answer {seen.fallback_rows} of {rows} rows",
            )
        return Verdict.HEALTHY, "healthy", f"{rows} rows in {seen.seconds:.0f} s"
    return Verdict.WAIT, "probation", f"{rows} of {config.requests} rows, {seen.seconds:.0f} s"
