"""Is the agent alive, can it answer, must someone look? Pure: facts in, a verdict with reasons out.

- *live*: this process makes progress. If not, only a restart helps.
- *ready*: every model is answered for, by the model or by its rules. If not, send requests elsewhere.
- *degraded*: it answers, but not as intended. Never a reason to restart or to stop sending requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

LOOP_STALL_SECONDS: Final = 30.0  # an event loop that is late by this much is stuck, not busy
EXPIRY_WARNING_SECONDS: Final = 24 * 3600.0  # time for a person to renew the release metadata
QUEUE_WARNING_SHARE: Final = 0.9
DISK_WARNING_BYTES: Final = 64 << 20  # an update of a 12 MB bundle, twice, and the metrics queue

_STATES: Final = {
    "loading": "is loading",
    "absent": "is not installed; its rules answer",
    "corrupt": "is corrupt; its rules answer",
    "unloaded": "was unloaded; its rules answer",
    "failed": "failed to load; its rules answer",
    "rejected": "failed on probation with no release to go back to; its rules answer",
}


@dataclass(frozen=True, slots=True)
class Health:
    """The verdict. ``reasons`` are sentences for people, most urgent first; none if all is well."""

    live: bool
    ready: bool
    degraded: bool
    reasons: tuple[str, ...]


def judge(
    models: Mapping[str, str],
    *,
    now: float,
    metadata_expires: float | None = None,
    loop_late_seconds: float = 0.0,
    queue_share: float | None = None,
    disk_free_bytes: int | None = None,
) -> Health:
    """Judge an agent.

    Args:
        models: state of each model (``contract.metric_names.MODEL_STATES``); rules answer in all but loading.
        now: seconds since 1970.
        metadata_expires: when the trusted release metadata expires, seconds since 1970; None without updates.
        loop_late_seconds: by how much the event loop was late the last time it was watched.
        queue_share: how full the metrics queue is, 0 to 1; None without one.
        disk_free_bytes: free on the store's file system; None if unknown.
    """
    live = loop_late_seconds < LOOP_STALL_SECONDS
    reasons = [] if live else [f"the event loop is {loop_late_seconds:.0f} s late"]
    loading = [name for name, state in models.items() if state == "loading"]
    for name, state in sorted(models.items(), key=lambda item: item[1] != "loading"):
        if state != "ready":
            reasons.append(f"model {name} {_STATES.get(state, f'is {state}')}")
    if not models:
        reasons.append("no model is installed")
    if metadata_expires is not None:
        left = metadata_expires - now
        if left <= 0:
            reasons.append("the release metadata has expired: no updates until it is refreshed")
        elif left < EXPIRY_WARNING_SECONDS:
            reasons.append(f"the release metadata expires in {left / 3600:.1f} h")
    if queue_share is not None and queue_share >= QUEUE_WARNING_SHARE:
        reasons.append(f"the metrics queue is {queue_share:.0%} full: the oldest samples will be dropped")
    if disk_free_bytes is not None and disk_free_bytes < DISK_WARNING_BYTES:
        reasons.append(f"only {disk_free_bytes / 1e6:.0f} MB are free in the store")
    return Health(
        live=live,
        ready=live and not loading,
        degraded=bool(reasons),
        reasons=tuple(reasons),
    )


def as_dict(health: Health) -> dict[str, Any]:
    """For ``edge-agent status --json``."""
    return {
        "live": health.live,
        "ready": health.ready,
        "degraded": health.degraded,
        "reasons": list(health.reasons),
    }
