"""Holds: the device's own say. While one is in force, nothing new is downloaded or taken live.

Three kinds, any of which is enough:

- no maintenance window is open (``updates.windows``);
- the file ``hold`` lies in the store: anybody who may write there can make it, a script of the machine's
  control as well as ``edge-agent hold``. Empty, it holds until it is removed; else its first line is the time
  it ends at (ISO 8601) and its second the reason;
- the assignments hold the device (``policy.decide``), which is the operator's say and not this module's.

A hold never delays a roll-back, the kill switch, the repair of what is installed, or what a person
installs by hand. A file that cannot be understood holds: whoever wrote it meant something.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_agent.config import WindowConfig, minutes_of_day
from edge_agent.errors import InvalidInput
from edge_agent.store.fs import Disk, explained

FILE_NAME: Final = "hold"
_MAX_BYTES: Final = 4096
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True)
class Hold:
    """Why nothing new begins now, and until when: seconds since the epoch, None if nobody knows."""

    kind: str  # "file", "window"
    reason: str
    until: float | None = None

    def __str__(self) -> str:
        end = f" until {_iso(self.until)}" if self.until is not None else ""
        return f"{self.reason}{end}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``edge-agent status``."""
        until = None if self.until is None else _iso(self.until)
        return {"held": True, "kind": self.kind, "until": until, "reason": self.reason}


NOT_HELD: Final[dict[str, Any]] = {"held": False, "kind": None, "until": None, "reason": ""}


class Holds:
    """The holds of one device.

    Args:
        store: the store's folder.
        windows: when updates may begin; none: always.
    """

    def __init__(self, store: Path, windows: Sequence[WindowConfig] = ()) -> None:
        self._file = store / FILE_NAME
        self._windows = tuple(windows)

    def in_force(self, now: float) -> Hold | None:
        """The hold that is in force at ``now`` (seconds since the epoch). Never raises."""
        try:
            with self._file.open("rb") as file:
                content = file.read(_MAX_BYTES)
        except FileNotFoundError:
            pass
        except OSError as error:
            return Hold("file", f"{self._file} cannot be read ({error.strerror})")
        else:
            hold = self._said_by(content)
            if hold.until is None or now < hold.until:
                return hold
        return closed(self._windows, datetime.datetime.fromtimestamp(now).astimezone())

    def set(self, until: str | None, reason: str, now: float) -> Hold:
        """Hold updates, from now on and over restarts.

        Args:
            until: an ISO 8601 time, local where it names no zone; None: until it is released.
            reason: for people.
            now: the present, seconds since the epoch.

        Raises:
            InvalidInput: ``until`` is no time, or is over.
            StoreError: the disk refused.
        """
        end = None
        if until is not None:
            end = _parsed(until)
            if end is None:
                raise InvalidInput(f"until: {until[:80]!r} is no time; give one like 2026-11-21T22:00")
            if end <= now:
                raise InvalidInput(f"until: {_iso(end)} is over; give a time to come")
        text = " ".join(reason.split())[:200] or "held by hand"
        Disk().make_durable_dir(self._file.parent)
        Disk().write_durable(self._file, f"{_iso(end) if end is not None else ''}\n{text}\n".encode())
        return Hold("file", text, end)

    def release(self) -> None:
        """End the hold of the file. Windows stay what they are.

        Raises:
            StoreError: the disk refused.
        """
        with explained("remove", self._file), contextlib.suppress(FileNotFoundError):
            self._file.unlink()

    def _said_by(self, content: bytes) -> Hold:
        lines = content.decode(errors="replace").splitlines()
        first = lines[0].strip() if lines else ""
        reason = (lines[1].strip() if len(lines) > 1 else "") or f"the file {self._file} holds updates"
        if not first:
            return Hold("file", reason)
        until = _parsed(first)
        if until is None:
            return Hold("file", f"the file {self._file} holds updates: {first[:80]!r} is no time")
        return Hold("file", reason, until)


def closed(windows: Sequence[WindowConfig], now: datetime.datetime) -> Hold | None:
    """The hold where no window is open at ``now``, the device's local time; None where one is open.

    Without any window every time is open.

    A window belongs to the day it starts on: that of Friday 22:00 to 02:00 is open on Saturday at 01:00.
    """
    if not windows:
        return None
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    coming: list[datetime.datetime] = []
    for window in windows:
        for shift in range(-1, 8):
            day = today + datetime.timedelta(days=shift)
            if window.days and _DAYS[day.weekday()] not in window.days:
                continue
            start, end = _at(day, window.start), _at(day, window.end)
            if end <= start:
                end += datetime.timedelta(days=1)
            if start <= now < end:
                return None
            if start > now:
                coming.append(start)
    return Hold("window", "outside the maintenance windows", min(coming).timestamp() if coming else None)


def _at(day: datetime.datetime, clock: str | int) -> datetime.datetime:
    minutes = minutes_of_day(clock)
    assert minutes is not None, "config.py has checked it"
    return day.replace(hour=minutes // 60, minute=minutes % 60)


def _parsed(text: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
