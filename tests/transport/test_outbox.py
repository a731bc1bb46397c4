"""Decisions that wait on disk: numbered without a gap, bounded, and what was decided is not decided again."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.telemetry.queue import Queue
from edge_agent.transport.outbox import Decision, Outbox

BIG = 64 << 20


def decision(index: int, size: int = 10) -> Decision:
    return Decision("edge/line-1/v2/models/demo/output", b"x" * size, None, str(index).encode(), ())


def drain(outbox: Outbox) -> list[tuple[int, bytes | None]]:
    """What waits, in order: sequence and correlation."""
    found = []
    while (oldest := outbox.oldest()) is not None:
        number, record = oldest
        found += [(record.first + at, kept.correlation) for at, kept in enumerate(record.decisions)]
        outbox.delivered(number)
    return found


def test_decisions_come_out_in_order_and_numbered(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, BIG, 16)
    outbox.append([decision(0), decision(1)], [(1, 10), (2, 20)])
    outbox.append([decision(2)], [(3, 30)])
    assert drain(outbox) == [(1, b"0"), (2, b"1"), (3, b"2")]
    outbox.close()


@pytest.mark.parametrize("delivered", [True, False])
def test_a_restart_goes_on_counting_and_knows_the_last_inputs(tmp_path: Path, delivered: bool) -> None:
    outbox = Outbox(tmp_path, BIG, 3)
    for index in range(5):
        outbox.append([decision(index)], [(index, index)])
    if delivered:
        drain(outbox)
    outbox.close()
    again = Outbox(tmp_path, BIG, 3)
    assert [again.knows((index, index)) for index in range(5)] == [False, False, True, True, True]
    assert not again.knows((4, 99))
    again.append([decision(5)], [(5, 5)])
    assert drain(again)[-1] == (6, b"5")
    again.close()


def test_numbers_are_kept_through_many_segments_of_delivered_decisions(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 1 << 16, 3)
    for index in range(300):
        outbox.append([decision(index, 500)], [(index, index)])
        drain(outbox)
    outbox.close()
    again = Outbox(tmp_path, 1 << 16, 3)
    again.append([decision(300)], [(300, 300)])
    assert drain(again) == [(301, b"300")]
    assert again.knows((299, 299))
    again.close()


def test_a_new_session_of_the_broker_makes_every_input_new(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, BIG, 16)
    outbox.append([decision(0)], [(1, 1)])
    outbox.forget_inputs()
    assert not outbox.knows((1, 1))
    outbox.close()


def test_a_full_disk_quota_gives_up_the_oldest_and_says_how_many(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 1 << 16, 4)
    lost = sum(outbox.append([decision(index, 1000)], [(index, index)]) for index in range(200))
    waiting = drain(outbox)
    assert 0 < lost == 200 - len(waiting)
    assert waiting == [(index + 1, str(index).encode()) for index in range(lost, 200)]
    outbox.close()


def test_a_record_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    queue = Queue(tmp_path, BIG)
    queue.append(b"of another version", 1)
    queue.close()
    outbox = Outbox(tmp_path, BIG, 16)
    outbox.append([decision(0)], [(1, 1)])
    assert drain(outbox) == [(1, b"0")]
    outbox.close()


def test_nothing_is_written_once_it_is_closed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, BIG, 16)
    outbox.append([decision(0)], [(1, 1)])
    outbox.close()
    with pytest.raises(OSError, match="the decisions are closed"):
        outbox.append([decision(1)], [(2, 2)])
    with pytest.raises(OSError, match="the decisions are closed"):
        outbox.delivered(1)
    again = Outbox(tmp_path, BIG, 16)
    assert drain(again) == [(1, b"0")]
    again.close()
