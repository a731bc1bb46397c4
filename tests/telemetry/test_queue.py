"""What the queue has taken it keeps, through crashes, damage and a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.telemetry.queue import Queue


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "queue"


def opened(folder: Path, max_bytes: int = 1 << 20, segment_bytes: int | None = None) -> Queue:
    return Queue(folder, max_bytes, segment_bytes)


def drained(queue: Queue) -> Iterator[bytes]:
    while record := queue.oldest():
        yield record.data
        queue.acknowledge(record.sequence)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment"))


def test_records_come_out_in_the_order_they_went_in(folder: Path) -> None:
    queue = opened(folder, segment_bytes=200)
    for i in range(50):
        queue.append(b"record %d" % i, samples=2)
    assert len(queue) == 50
    assert queue.waiting_samples == 100
    assert list(drained(queue)) == [b"record %d" % i for i in range(50)]
    assert (len(queue), queue.waiting_samples) == (0, 0)
    queue.close()


def test_the_newest_can_go_first_and_the_rest_stays_in_order(folder: Path) -> None:
    queue = opened(folder)
    for i in range(4):
        queue.append(b"%d" % i, 1)
    newest = queue.newest()
    assert newest is not None
    assert newest.data == b"3"
    queue.acknowledge(newest.sequence)
    queue.close()
    again = opened(folder)
    assert list(drained(again)) == [b"0", b"1", b"2"]
    again.close()


def test_what_was_acknowledged_does_not_come_again_after_a_restart(folder: Path) -> None:
    queue = opened(folder, segment_bytes=100)
    for i in range(10):
        queue.append(b"%d" % i, 1)
    for _ in range(6):
        record = queue.oldest()
        assert record is not None
        queue.acknowledge(record.sequence)
    queue.close()
    again = opened(folder, segment_bytes=100)
    assert again.waiting_samples == 4
    again.append(b"10", 1)
    assert list(drained(again)) == [b"6", b"7", b"8", b"9", b"10"]
    again.close()


def test_delivered_segments_leave_the_disk(folder: Path) -> None:
    queue = opened(folder, segment_bytes=300)
    for i in range(100):
        queue.append(b"%d" % i, 1)
    assert len(segments(folder)) == 10
    assert len(list(drained(queue))) == 100
    assert len(segments(folder)) == 1
    assert queue.size_bytes == sum(path.stat().st_size for path in segments(folder))
    queue.close()


def test_a_full_queue_drops_the_oldest_and_counts_them(folder: Path) -> None:
    queue = opened(folder, max_bytes=10_000, segment_bytes=1000)
    for i in range(200):
        queue.append(b"%03d" % i + bytes(97), samples=3)
        assert sum(path.stat().st_size for path in segments(folder)) <= 10_000
    losses = queue.take_losses()
    left = list(drained(queue))
    assert left[-1].startswith(b"199")
    assert [int(data[:3]) for data in left] == list(range(200 - len(left), 200))
    assert losses == {"full": 3 * (200 - len(left)), "corrupt": 0}
    assert queue.take_losses() == {"full": 0, "corrupt": 0}
    queue.close()


def test_a_smaller_limit_holds_from_the_next_start_on(folder: Path) -> None:
    queue = opened(folder, max_bytes=100_000, segment_bytes=1000)
    for i in range(100):
        queue.append(b"%03d" % i + bytes(97), samples=1)
    queue.close()
    again = opened(folder, max_bytes=5000, segment_bytes=1000)
    assert again.size_bytes <= 5000
    assert again.take_losses()["full"] == 100 - len(again)
    again.close()


def test_a_record_larger_than_the_queue_is_refused_and_nothing_is_lost(folder: Path) -> None:
    queue = opened(folder, max_bytes=1000)
    queue.append(b"kept", 1)
    with pytest.raises(ValueError, match="at most"):
        queue.append(bytes(1000), 1)
    assert list(drained(queue)) == [b"kept"]
    queue.close()


@pytest.mark.parametrize("tail", range(1, 60))
def test_a_torn_tail_costs_only_what_was_being_written(folder: Path, tail: int) -> None:
    queue = opened(folder)
    for i in range(3):
        queue.append(b"record %d" % i + bytes(range(40)), 1)
    queue.close()
    (segment,) = segments(folder)
    os.truncate(segment, segment.stat().st_size - tail)
    again = opened(folder)
    assert again.take_losses() == {"full": 0, "corrupt": 0}
    again.append(b"after", 1)
    again.close()
    once_more = opened(folder)
    assert [data[:8] for data in drained(once_more)] == [b"record 0", b"record 1", b"after"]
    once_more.close()


def test_a_tail_of_zeros_as_file_systems_leave_it_is_torn_too(folder: Path) -> None:
    queue = opened(folder)
    queue.append(b"kept", 1)
    queue.close()
    (segment,) = segments(folder)
    segment.write_bytes(segment.read_bytes() + bytes(500))
    again = opened(folder)
    assert again.take_losses()["corrupt"] == 0
    assert list(drained(again)) == [b"kept"]
    again.close()


def test_any_flipped_bit_costs_at_most_its_record_and_is_counted(folder: Path) -> None:
    queue = opened(folder)
    for i in range(4):
        queue.append(b"record %d" % i, 5)
    queue.close()
    (segment,) = segments(folder)
    sound = segment.read_bytes()
    size = len(sound) // 4
    for position in range(len(sound) - size):  # in the last record it may be a torn tail
        segment.write_bytes(sound[:position] + bytes([sound[position] ^ 0x10]) + sound[position + 1 :])
        damaged = opened(folder)
        hit = position // size
        assert list(drained(damaged)) == [b"record %d" % i for i in range(4) if i != hit], position
        assert damaged.take_losses()["corrupt"] in (1, 5)
        damaged.close()


def test_a_lost_segment_costs_what_it_held(folder: Path) -> None:
    queue = opened(folder, segment_bytes=300)
    for i in range(30):
        queue.append(b"%02d" % i, 1)
    segments(folder)[1].unlink()
    left = [int(data) for data in drained(queue)]
    assert left == sorted(left)
    assert 0 < queue.take_losses()["corrupt"] == 30 - len(left)
    queue.close()


def test_a_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file" / "queue")


def test_a_write_that_fails_leaves_the_queue_as_it_was(folder: Path) -> None:
    """A file size limit of the process stands in for a full disk: write fails with EFBIG half-way."""
    script = f"""
import resource, signal
from pathlib import Path
from edge_agent.telemetry.queue import Queue
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
queue = Queue(Path({str(folder)!r}), 1 << 20)
queue.append(b"before", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    queue.append(bytes(1000), 1)
except OSError:
    pass
else:
    raise SystemExit("the write did not fail")
queue.append(b"after", 1)
queue.close()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    queue = opened(folder)
    assert list(drained(queue)) == [b"before", b"after"]
    queue.close()


_ENDLESS = """
import sys
from pathlib import Path
from edge_agent.telemetry.queue import Queue
queue = Queue(Path(sys.argv[1]), 1 << 20, 2000)
number = int(sys.argv[2])
while True:
    queue.append(b"%d" % number, 1)
    print(number, flush=True)
    number += 1
"""


def test_what_was_taken_survives_kill_9_at_any_moment(folder: Path) -> None:
    told = 0
    for round_ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(folder), str(told + 1)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(20 + 7 * round_):
            told = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        told = max(
            [
                told,
                *(int(line) for line in child.stdout.read().splitlines(keepends=True) if line[-1:] == b"\n"),
            ]
        )
        child.wait(10)
        child.stdout.close()
        queue = opened(folder, segment_bytes=2000)
        newest = queue.newest()
        assert newest is not None
        assert int(newest.data) in (told, told + 1)  # kept, but killed before it could say so
        assert len(queue) == int(newest.data)
        assert queue.take_losses() == {"full": 0, "corrupt": 0}
        told = int(newest.data)
        queue.close()
    queue = opened(folder, segment_bytes=2000)
    assert [int(data) for data in drained(queue)] == list(range(1, told + 1))
    queue.close()
