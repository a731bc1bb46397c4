"""When devices ask: spread over the site, the same after each start, more seldom while something fails."""

from __future__ import annotations

import itertools
import random

import pytest

from edge_agent.update.polls import LONGEST_BACKOFF, Backoff, pauses

SITE = [f"line-{number}" for number in range(500)]


def first(count: int, device: str, interval: float = 15.0, jitter: float = 0.2) -> list[float]:
    return list(itertools.islice(pauses(interval, jitter, random.Random(device)), count))


def test_a_device_asks_at_the_same_moments_after_each_start_and_at_others_than_its_neighbour() -> None:
    assert first(20, "line-1") == first(20, "line-1")
    assert not set(first(20, "line-1")) & set(first(20, "line-2"))


def test_every_pause_is_within_the_jitter_and_right_on_average() -> None:
    found = first(2000, "line-1")[1:]
    assert all(12.0 <= pause <= 18.0 for pause in found)
    assert sum(found) / len(found) == pytest.approx(15.0, rel=0.01)


def test_a_site_that_is_switched_on_at_once_does_not_ask_at_once_nor_ever_falls_into_step() -> None:
    for poll in (1, 10, 100):
        moments = sorted(sum(first(poll, device)) for device in SITE)
        in_a_second = max(sum(at <= other < at + 0.3 for other in moments) for at in moments)
        # The first are spread over 3 seconds: 50 in any 0.3 s on average.
        assert in_a_second < 100, poll
    assert max(first(1, device)[0] for device in SITE) <= 3.0


def test_without_jitter_there_is_none() -> None:
    assert first(4, "line-1", jitter=0.0) == [0.0, 15.0, 15.0, 15.0]


def test_what_keeps_failing_is_tried_twice_as_seldom_each_time_up_to_a_limit() -> None:
    backoff = Backoff(15.0, random.Random(1))
    waits = []
    for _ in range(12):
        backoff.failed(now=1000.0)
        waits.append(backoff.not_before - 1000.0)
    for failures, wait in enumerate(waits, start=1):
        whole = min(15.0 * 2**failures, LONGEST_BACKOFF)
        assert whole / 2 <= wait <= whole
    backoff.succeeded()
    assert backoff.not_before < 0
    backoff.failed(now=1000.0)
    assert backoff.not_before <= 1030.0, "it begins anew"


def test_an_interval_beyond_the_limit_is_the_limit() -> None:
    backoff = Backoff(7200.0, random.Random(1))
    for _ in range(5):
        backoff.failed(now=0.0)
    assert 3600.0 <= backoff.not_before <= 7200.0


def test_devices_that_failed_together_do_not_come_back_together() -> None:
    moments = []
    for device in SITE:
        backoff = Backoff(15.0, random.Random(device))
        for _ in range(4):
            backoff.failed(now=0.0)
        moments.append(backoff.not_before)
    assert max(moments) - min(moments) > 100.0
    assert max(sum(at <= other < at + 1.2 for other in moments) for at in moments) < 20
