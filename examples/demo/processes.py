"""Programs the demo starts: found, started, waited for and always stopped again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

START_SECONDS: Final = 30.0  # a start takes about one; a loaded machine gets patience


class DemoFailed(Exception):
    """Something the demo promises did not happen; the message says what."""


def expect(condition: object, message: str) -> None:
    """Raise unless the condition holds.

    Raises:
        DemoFailed: it does not.
    """
    if not condition:
        raise DemoFailed(message)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Ask until the condition holds.

    Raises:
        DemoFailed: it did not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a loopback port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def tool(name: str) -> str | None:
    """The path of a program; Debian keeps daemons in /usr/sbin, outside a user's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def ours(name: str) -> str:
    """The path of one of our console scripts, from the environment this runs in."""
    return str(Path(sys.executable).with_name(name))


class Processes:
    """Everything that was started. Leaving the ``with`` stops all of it, except after ``keep``."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.stop(name)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own; what it prints goes to ``logs/NAME.log``."""
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._running[name] = process
        return process

    def alive(self, name: str) -> bool:
        """Whether a program that was started still runs."""
        return self._running[name].poll() is None

    def last_words(self, name: str) -> str:
        """The last line that a program printed."""
        lines = (self._logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    def kill(self, name: str) -> None:
        """Kill -9: no warning, no clean-up."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> None:
        """Ask politely, then not."""
        process = self._running.pop(name)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def keep(self, *names: str) -> list[int]:
        """Let these run on; returns their process ids."""
        return [self._running.pop(name).pid for name in names if name in self._running]
