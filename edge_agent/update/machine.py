"""The update machine: which state may follow which, as a table.

::

    idle ──poll──> checking ──new release──> downloading ──> verifying ──> staged ──> testing
      ^               │ hold: held                               ^                       │ passed
      │               │ nothing new: idle               install (local bundle)           v
      └───fail── every state up to activating                                       activating
                                                                                         │
                        rolled_back <── rolling_back <──unhealthy, roll back── probation ─┘
                                                                               │ healthy
                                                                               v
                                                                           committed

Invariants, proven by tests over the table:

- every state can be reached, and every state that does work has an exit for failure;
- a pair that is not listed is a bug of ours and raises;
- after a power cut in any state ``RESUME`` says where to go on.

Pure: no clock, no disk, no logging. The workflow is ``updater.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from edge_agent.store.state import Result, State

__all__ = ["BUSY", "RESTING", "RESUME", "TRANSITIONS", "Event", "Result", "State", "advance"]


class Event(enum.Enum):
    """What can happen to an update."""

    POLL = "poll"  # look what the repository says
    NOTHING_NEW = "nothing_new"
    HOLD = "hold"  # there is something new, and this device shall wait
    NEW_RELEASE = "new_release"
    INSTALL = "install"  # an operator gives a bundle by hand
    FETCHED = "fetched"
    VERIFIED = "verified"
    TEST = "test"
    PASSED = "passed"
    SHADOW = "shadow"  # the self-test passed, and the assignment wants it beside the old one first
    AGREED = "agreed"
    ACTIVATED = "activated"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    ROLL_BACK = "roll_back"  # an operator, or another assignment, takes it back
    SUPERSEDED = "superseded"  # another release is wanted, and there is nothing to go back to
    ROLLED_BACK = "rolled_back"
    FAIL = "fail"


RESTING: Final = frozenset({State.IDLE, State.HELD, State.COMMITTED, State.ROLLED_BACK})
"""Nothing is under way: a poll, a local install or a manual roll-back may begin."""

TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    **{(state, Event.POLL): State.CHECKING for state in RESTING},
    **{(state, Event.INSTALL): State.VERIFYING for state in RESTING},
    **{(state, Event.ROLL_BACK): State.ROLLING_BACK for state in RESTING},
    (State.CHECKING, Event.NOTHING_NEW): State.IDLE,
    (State.CHECKING, Event.HOLD): State.HELD,
    (State.CHECKING, Event.NEW_RELEASE): State.DOWNLOADING,
    (State.CHECKING, Event.FAIL): State.IDLE,
    (State.DOWNLOADING, Event.FETCHED): State.VERIFYING,
    (State.DOWNLOADING, Event.FAIL): State.IDLE,
    (State.VERIFYING, Event.VERIFIED): State.STAGED,
    (State.VERIFYING, Event.FAIL): State.IDLE,
    (State.STAGED, Event.TEST): State.TESTING,
    (State.STAGED, Event.FAIL): State.IDLE,
    (State.TESTING, Event.PASSED): State.ACTIVATING,
    (State.TESTING, Event.SHADOW): State.SHADOWING,
    (State.TESTING, Event.FAIL): State.IDLE,
    (State.SHADOWING, Event.AGREED): State.ACTIVATING,
    (State.SHADOWING, Event.FAIL): State.IDLE,
    (State.ACTIVATING, Event.ACTIVATED): State.PROBATION,
    (State.ACTIVATING, Event.FAIL): State.IDLE,  # the pointer did not move
    (State.ACTIVATING, Event.UNHEALTHY): State.ROLLING_BACK,  # it did
    (State.PROBATION, Event.HEALTHY): State.COMMITTED,
    (State.PROBATION, Event.UNHEALTHY): State.ROLLING_BACK,
    (State.PROBATION, Event.ROLL_BACK): State.ROLLING_BACK,
    (State.PROBATION, Event.SUPERSEDED): State.IDLE,
    (State.ROLLING_BACK, Event.ROLLED_BACK): State.ROLLED_BACK,
    (State.ROLLING_BACK, Event.FAIL): State.IDLE,  # there is nothing to go back to
}

RESUME: Final[Mapping[State, State]] = {
    State.IDLE: State.IDLE,
    State.CHECKING: State.IDLE,
    State.HELD: State.HELD,
    # Up to the self-test nothing is active: the next check begins again, and what was downloaded is
    # still there, so it moves no byte twice.
    State.DOWNLOADING: State.IDLE,
    State.VERIFYING: State.IDLE,
    State.STAGED: State.IDLE,
    State.TESTING: State.IDLE,
    State.SHADOWING: State.IDLE,
    # The pointer may have moved or not; moving it again is harmless.
    State.ACTIVATING: State.ACTIVATING,
    State.PROBATION: State.PROBATION,  # counted: too many restarts are a verdict
    State.COMMITTED: State.COMMITTED,
    State.ROLLING_BACK: State.ROLLING_BACK,
    State.ROLLED_BACK: State.ROLLED_BACK,
}

BUSY: Final = frozenset(State) - RESTING - {State.PROBATION}
"""A process that dies in one of these was in the middle of something."""


def advance(state: State, event: Event) -> State:
    """The state that follows.

    Raises:
        RuntimeError: the event cannot happen in this state; a bug of ours.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise RuntimeError(f"update machine: {event.value} cannot happen in state {state.value}") from None
