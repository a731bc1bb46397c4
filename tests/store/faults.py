"""Disks that die, or refuse, at the n-th system call. The seam is ``Disk.before``; the calls are real."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.store.fs import Disk

POWER_CUT = 137  # exit code of a process whose power failed
PATIENCE = 60.0  # seconds for a child that takes a few milliseconds

# Not a plain fork: this process has threads (numpy's, an executor's), the fork server has none.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.store.test_power_cut", "tests.update.test_power_cut"])


def power_cut_in(work: Callable[..., Any], *arguments: Any) -> bool:
    """Run ``work`` in a process of its own; whether its power failed. A picklable function, as it must be."""
    process = _PROCESSES.Process(target=work, args=arguments)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode in (0, POWER_CUT), f"the child ended with {process.exitcode}"
    return process.exitcode == POWER_CUT


class CountingDisk(Disk):
    """Counts the calls and remembers their names."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, call: str, path: Path) -> None:
        self.calls.append(call)


class DyingDisk(CountingDisk):
    """The power fails before call ``at`` (from 1). Nothing is cleaned up: no ``finally``, no ``atexit``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def before(self, call: str, path: Path) -> None:
        super().before(call, path)
        if len(self.calls) == self._at:
            os._exit(POWER_CUT)


class RefusingDisk(CountingDisk):
    """Call ``at`` (from 1) fails with ``number``; with ``forever`` every later one does, too."""

    def __init__(self, at: int, number: int = errno.ENOSPC, *, forever: bool = False) -> None:
        super().__init__()
        self._at, self._number, self._forever = at, number, forever

    def before(self, call: str, path: Path) -> None:
        super().before(call, path)
        if len(self.calls) == self._at or (self._forever and len(self.calls) > self._at):
            raise OSError(self._number, os.strerror(self._number))

    def refuse_from_now_on(self, after: int = 1) -> None:
        """The ``after``-th call from now (from 1) is the first that fails."""
        self._at = len(self.calls) + after

    def obey(self) -> None:
        self._at = 10**9

    @property
    def obeyed(self) -> bool:
        """Whether no call has failed yet."""
        return len(self.calls) < self._at
