"""Holds: the device's own say. While one is in force, nothing new is downloaded or taken live.

Four kinds, any of which is enough:

- no maintenance window is open (``updates.windows``);
- the file ``hold`` lies in the store: anybody who may write there can make it, a script of the machine's
  control as well as ``edge-agent hold``. Empty, it holds until it is removed; else its first line is the time
  it ends at (ISO 8601) and its second the reason;
- a message said so (``mqtt.holds``). Whoever may publish to a broker is trusted less than who may write the
  store: such a hold has an end, at most ``LONGEST`` after it began, and holds that follow each other within
  ``APART`` count as one. So a device that is spoken to without end still updates every day;
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

import msgspec

from edge_agent.config import WindowConfig, minutes_of_day
from edge_agent.errors import InvalidInput
from edge_agent.store.fs import Disk, explained

FILE_NAME: Final = "hold"
MESSAGE_FILE: Final = "hold.message"  # end, reason and beginning of what a message said, one a line
LONGEST: Final = 24 * 3600.0  # seconds: of a hold by message
APART: Final = 3600.0  # seconds between two holds by message that are two
_MAX_BYTES: Final = 4096
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True)
class Hold:
    """Why nothing new begins now, and until when: seconds since the epoch, None if nobody knows."""

    kind: str  # "file", "mqtt", "window"
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


class _Said(msgspec.Struct, frozen=True):
    """The body of a message."""

    until: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Message:
    """A hold by message: until when, why, and when the first of those that follow each other began."""

    until: float
    reason: str
    since: float


class Holds:
    """The holds of one device.

    Args:
        store: the store's folder.
        windows: when updates may begin; none: always.
    """

    def __init__(self, store: Path, windows: Sequence[WindowConfig] = ()) -> None:
        self._file = store / FILE_NAME
        self._message_file = store / MESSAGE_FILE
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
        if (said := self._message()) is not None and said.since <= now < said.until:
            return Hold("mqtt", said.reason, said.until)
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
        text = _line(reason) or "held by hand"
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

    def heed(self, message: bytes, now: float) -> Hold | None:
        """Do what a message says: ``{"until": ISO 8601, "reason": ...}``; empty, or null: release.

        Only what messages set is released. An end that is too far away is brought nearer.

        Args:
            message: its bytes, by nobody trusted much.
            now: the present, seconds since the epoch.

        Returns:
            The hold that is in force by messages now; None if there is none.

        Raises:
            InvalidInput: it cannot be understood, its time is over, or there were enough holds for today.
            StoreError: the disk refused.
        """
        wanted = _parsed_message(message)
        before = self._message()
        goes_on = before is not None and before.since <= now < before.until + APART
        since = before.since if before is not None and goes_on else now
        if wanted.until is None:
            if before is not None and now < before.until:
                self._remember(_Message(now, before.reason, since))
            return None
        end = _parsed(wanted.until)
        if end is None:
            raise InvalidInput(f"until: {wanted.until[:80]!r} is no time; give one like 2026-11-21T22:00")
        if end <= now:
            raise InvalidInput(f"until: {_iso(end)} is over; give a time to come")
        if since + LONGEST <= now:
            raise InvalidInput(
                f"messages have held updates since {_iso(since)}; they may again after "
                f"{_iso(since + LONGEST + APART)}"
            )
        said = _Message(min(end, since + LONGEST), _line(wanted.reason) or "held by message", since)
        self._remember(said)
        return Hold("mqtt", said.reason, said.until)

    def _message(self) -> _Message | None:
        """What a message said last; None if there was none, or it cannot be understood: it needs an end."""
        try:
            lines = self._message_file.read_bytes()[:_MAX_BYTES].decode(errors="replace").splitlines()
        except OSError:
            return None
        if len(lines) != 3:
            return None
        until, since = _parsed(lines[0]), _parsed(lines[2])
        return None if until is None or since is None else _Message(until, lines[1], since)

    def _remember(self, said: _Message) -> None:
        content = f"{_iso(said.until)}\n{said.reason}\n{_iso(said.since)}\n"
        Disk().write_durable(self._message_file, content.encode())

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


def _parsed_message(message: bytes) -> _Said:
    if not message.strip():
        return _Said()
    try:
        return msgspec.json.decode(message[:_MAX_BYTES], type=_Said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f'a hold is {{"until": ISO 8601 or null, "reason": text}}: {error}') from error


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


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
