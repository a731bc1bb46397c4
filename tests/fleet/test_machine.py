"""The table of roll-out phases: reachable, with a failure exit, resumable, closed."""

from __future__ import annotations

import itertools

import pytest

from fleet.machine import FINAL, RESUME, RUNNING, TRANSITIONS, Event, Phase, advance, allowed


def _reachable(start: Phase) -> set[Phase]:
    found, todo = set(), {start}
    while todo:
        phase = todo.pop()
        found.add(phase)
        todo |= {after for (before, _), after in TRANSITIONS.items() if before is phase} - found
    return found


def test_every_phase_is_reachable() -> None:
    assert _reachable(Phase.PENDING) == set(Phase)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in FINAL])
def test_every_phase_that_is_not_final_ends_and_can_be_stopped(phase: Phase) -> None:
    assert _reachable(phase) & {Phase.ROLLED_BACK, Phase.ABORTED}


def test_final_phases_are_left_by_nothing() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] in FINAL]


def test_abort_rules_are_live_wherever_devices_run_the_candidate() -> None:
    for phase in RUNNING:
        assert advance(phase, Event.FAILED) is Phase.ROLLING_BACK
        assert advance(phase, Event.ABORTED) is Phase.ROLLING_BACK


def test_every_phase_resumes() -> None:
    assert set(RESUME) == set(Phase)


def test_an_unlisted_pair_raises() -> None:
    unlisted = [pair for pair in itertools.product(Phase, Event) if pair not in TRANSITIONS]
    for phase, event in unlisted:
        assert not allowed(phase, event)
        with pytest.raises(KeyError):
            advance(phase, event)
