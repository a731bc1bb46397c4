"""The phases of a roll-out, as a table.

::

    Pending --> Progressing --(wave after wave)--> Promoting --> Succeeded
                  |  ^                               |   |
                  v  |                               |   |
                 Paused <----------------------------+   |
                  |                                      |
                  +----> RollingBack <-------------------+
                             |-> RolledBack   the roll-out failed
                             `-> Aborted      a person stopped it

A pair that is not in the table is a bug of ours and raises. The record with its new phase is written before
what the phase wants is signed; ``RESUME`` says where a controller goes on after a crash in between: in the
same phase, because ``controller.wanted`` computes the assignments from the record alone.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class Phase(enum.Enum):
    """Where a roll-out stands."""

    PENDING = "Pending"  # recorded, nothing assigned
    PROGRESSING = "Progressing"  # a wave runs the candidate and is judged
    PAUSED = "Paused"  # assigned as it is; a person decides; the abort rules stay on
    PROMOTING = "Promoting"  # everyone gets the candidate
    SUCCEEDED = "Succeeded"  # the candidate is the stable release
    ROLLING_BACK = "RollingBack"  # the candidate is taken back, devices return
    ROLLED_BACK = "RolledBack"
    ABORTED = "Aborted"


class Event(enum.Enum):
    """What moves it."""

    STARTED = "started"
    WIDENED = "widened"  # the wave is good: the next one
    COVERED = "covered"  # the last wave before everyone is good
    CONVERGED = "converged"  # every reachable device runs the candidate
    FAILED = "failed"  # an abort rule
    INCONCLUSIVE = "inconclusive"  # the rules cannot tell
    PAUSED = "paused"  # a person
    RESUMED = "resumed"  # a person
    PROMOTED = "promoted"  # a person: everyone, without waiting for the analysis
    ABORTED = "aborted"  # a person
    RESTORED = "restored"  # after a failure, the devices run the stable release again
    STOPPED = "stopped"  # after a person's abort, the same


TRANSITIONS: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (Phase.PENDING, Event.STARTED): Phase.PROGRESSING,
    (Phase.PENDING, Event.ABORTED): Phase.ABORTED,
    (Phase.PROGRESSING, Event.WIDENED): Phase.PROGRESSING,
    (Phase.PROGRESSING, Event.COVERED): Phase.PROMOTING,
    (Phase.PROGRESSING, Event.PROMOTED): Phase.PROMOTING,
    (Phase.PROGRESSING, Event.FAILED): Phase.ROLLING_BACK,
    (Phase.PROGRESSING, Event.ABORTED): Phase.ROLLING_BACK,
    (Phase.PROGRESSING, Event.INCONCLUSIVE): Phase.PAUSED,
    (Phase.PROGRESSING, Event.PAUSED): Phase.PAUSED,
    (Phase.PAUSED, Event.RESUMED): Phase.PROGRESSING,
    (Phase.PAUSED, Event.PROMOTED): Phase.PROMOTING,
    (Phase.PAUSED, Event.FAILED): Phase.ROLLING_BACK,
    (Phase.PAUSED, Event.ABORTED): Phase.ROLLING_BACK,
    (Phase.PROMOTING, Event.CONVERGED): Phase.SUCCEEDED,
    (Phase.PROMOTING, Event.FAILED): Phase.ROLLING_BACK,
    (Phase.PROMOTING, Event.ABORTED): Phase.ROLLING_BACK,
    (Phase.PROMOTING, Event.INCONCLUSIVE): Phase.PAUSED,
    (Phase.PROMOTING, Event.PAUSED): Phase.PAUSED,
    (Phase.ROLLING_BACK, Event.RESTORED): Phase.ROLLED_BACK,
    (Phase.ROLLING_BACK, Event.STOPPED): Phase.ABORTED,
}

FINAL: Final = frozenset({Phase.SUCCEEDED, Phase.ROLLED_BACK, Phase.ABORTED})
RUNNING: Final = frozenset({Phase.PROGRESSING, Phase.PAUSED, Phase.PROMOTING})  # devices run the candidate

RESUME: Final[Mapping[Phase, Phase]] = {phase: phase for phase in Phase}


def advance(phase: Phase, event: Event) -> Phase:
    """The phase after ``event``.

    Raises:
        KeyError: the table has no such pair: our bug, never an operator's (``allowed`` asks first).
    """
    return TRANSITIONS[phase, event]


def allowed(phase: Phase, event: Event) -> bool:
    """Whether ``event`` makes sense in ``phase``."""
    return (phase, event) in TRANSITIONS
