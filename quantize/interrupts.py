"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line at most, exit code 128 + signal, nothing left behind.

Invariants: while there is nothing to clean up (imports, usage), a signal ends the process at once, without
Python unwinding half an import; while there is, it raises ``Interrupted`` once, and what cleans up is not
interrupted again; from the moment the result gets its final name signals are ignored, so that "interrupted"
never stands beside a finished bundle. A signal that the parent ignores (``nohup``, ``&`` in a script) stays
ignored. Where ``quietly`` was never called, as in tests and notebooks, nothing here touches a signal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SOON: Final = 0.01  # seconds


class Interrupted(KeyboardInterrupt):
    """A signal came; ``number`` says which."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def line_of(interrupt: KeyboardInterrupt) -> str:
    """What people read."""
    return f"quantize-model: {_word(_number(interrupt))}, nothing was written\n"


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + _number(interrupt)


def quietly() -> None:
    """From here on a signal ends the process at once. The first thing that the command does."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, a signal raises ``Interrupted``: there is something to clean up."""
    if not _ours(_end):
        yield
        return
    hook, sys.unraisablehook = sys.unraisablehook, _swallowed
    _set(_raise, _ours(_end))
    try:
        yield
    finally:
        _set(_end, _ours(_raise))
        sys.unraisablehook = hook


def hold() -> None:
    """From here on the result is on its way to its final name: signals come too late."""
    _set(signal.SIG_IGN, _ours(_raise))


def _ours(handler: Any) -> list[int]:
    return [number for number in _SIGNALS if signal.getsignal(number) == handler]


def _set(handler: Any, numbers: list[int]) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, line_of(Interrupted(number)).encode())
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    hold()
    raise Interrupted(number)


def _swallowed(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor or a callback of the collector: raise it again, soon."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)
        return
    number = unraisable.exc_value.number

    def again(_: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(number)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, _SOON)


def _number(interrupt: KeyboardInterrupt) -> int:
    return interrupt.number if isinstance(interrupt, Interrupted) else int(signal.SIGINT)


def _word(number: int) -> str:
    return {int(signal.SIGTERM): "terminated", int(signal.SIGHUP): "the terminal is gone"}.get(
        number, "interrupted"
    )
