"""Who gets the candidate first, and what that can show.

Pure and deterministic: the same roll-out id, devices and policy give the same plan on every machine, and the
plan says why each device is in it.

The canary is chosen in proportion from every stratum (a combination of the labels in ``stratify_by``), at
least one each while there are enough, and inside a stratum by a hash of the roll-out's id and the device's:
never alphabetically, never the fastest to poll, and another roll-out begins with others. Later waves are
shares of the same hash order that the devices themselves evaluate (``contract.assignments.place``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from edge_agent.contract.assignments import Cohort, place
from fleet.config import Policy
from fleet.errors import RolloutError
from fleet.inventory import Device

CONFIDENCE = 0.95  # of the power statement


class Wave(msgspec.Struct, frozen=True):
    """A step of the roll-out: every device of the waves before, and more."""

    name: str
    share: float  # of the hash order, besides the canary
    devices: int  # devices of the inventory that then run the candidate


class Plan(msgspec.Struct, frozen=True):
    """What a roll-out will do. ``waves[0]`` is the canary, the last wave is everyone."""

    canary: tuple[str, ...]
    waves: tuple[Wave, ...]
    reasons: tuple[str, ...]  # one line a stratum: how many of how many, and which
    power: str  # what the canary can and cannot show

    def cohort(self, rollout: str, wave: int) -> Cohort:
        """The cohort of ``wave``, as the assignments say it."""
        return Cohort(self.canary, self.waves[wave].share, rollout)


def rules_out(devices: int, confidence: float = CONFIDENCE) -> float:
    """The failure rate that ``devices`` without a failure rule out: ``1 - (1 - confidence)^(1/n)``.

    The exact (Clopper-Pearson) one-sided upper bound for zero failures in n independent trials.
    """
    return 1.0 - math.pow(1.0 - confidence, 1.0 / devices)


def plan(rollout: str, devices: Sequence[Device], policy: Policy) -> Plan:
    """Choose the canary and the waves after it.

    Args:
        rollout: the roll-out's id, the salt of every choice.
        devices: those that may take part (held ones are left out by the caller).
        policy: how many, and by which labels.

    Raises:
        RolloutError: no devices, or a label that no device has.
    """
    if not devices:
        raise RolloutError("no device can take part: devices.yaml is empty, or every device is held")
    for label in policy.canary.stratify_by:
        if not any(label in device.labels for device in devices):
            known = sorted({label for device in devices for label in device.labels})
            raise RolloutError(
                f"policy.canary.stratify_by names {label!r}, which no device has; labels: "
                f"{', '.join(known) or 'none'}"
            )
    strata: dict[tuple[str, ...], list[str]] = {}
    for device in devices:
        key = tuple(device.labels.get(label, "") for label in policy.canary.stratify_by)
        strata.setdefault(key, []).append(device.id)
    total = min(policy.canary.devices, len(devices))
    chosen: list[str] = []
    reasons: list[str] = []
    for key, size in _shares(rollout, {key: len(ids) for key, ids in strata.items()}, total).items():
        ids = sorted(strata[key], key=lambda device: place(rollout, device))[:size]
        chosen += ids
        name = ", ".join(f"{k}={v}" for k, v in zip(policy.canary.stratify_by, key, strict=True))
        reasons.append(
            f"{name or 'all devices'}: {size} of {len(strata[key])}, first by hash of {rollout}: "
            f"{', '.join(ids) or 'none'}"
        )
    canary = tuple(sorted(chosen))
    waves = [Wave("canary", 0.0, len(canary))]
    for share in (*policy.waves, 1.0):
        covered = sum(device.id in canary or place(rollout, device.id) < share for device in devices)
        if covered > waves[-1].devices:
            waves.append(Wave("everyone" if share == 1.0 else f"{share:.0%}", share, covered))
    # The last wave is everyone even if it adds nobody: devices that are not in the inventory follow too.
    waves[-1] = Wave("everyone", 1.0, len(devices))
    return Plan(canary, tuple(waves), tuple(reasons), power(len(canary), len(devices)))


def power(canary: int, devices: int) -> str:
    """The statement printed with a plan: what a clean canary proves."""
    bound = rules_out(canary)
    text = (
        f"{canary} of {devices} devices without a failure rule out, at {CONFIDENCE:.0%}, only a device "
        f"failure rate above {bound:.1%}"
    )
    needed = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - 0.05))
    if canary < needed:
        text += f"; for 5 % it takes {needed}, so the abort rules stay on while the rest follows"
    return text


def _shares(rollout: str, sizes: dict[tuple[str, ...], int], total: int) -> dict[tuple[str, ...], int]:
    """Seats by size, largest remainder, one for every stratum first while there are enough."""
    order = sorted(sizes, key=lambda key: (-sizes[key], place(rollout, "\0".join(key))))
    seats = dict.fromkeys(order, 0)
    for key in order[:total]:
        seats[key] = 1
    everyone = sum(sizes.values())
    while sum(seats.values()) < total:
        # Whoever is furthest below its proportion gets the next seat.
        open_strata = [key for key in order if seats[key] < sizes[key]]
        neediest = max(open_strata, key=lambda key: total * sizes[key] / everyone - seats[key])
        seats[neediest] += 1
    return seats
