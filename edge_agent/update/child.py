"""The updater's side of the worker: start it, ask it, and kill it when it is silent for too long.

Nothing that the worker imports is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

from edge_agent.errors import EdgeError
from edge_agent.store.fs import Disk
from edge_agent.update import messages
from edge_agent.update.messages import Command, Failed, Progress, Reply, Setup
from edge_agent.update.source import SourceFailed

logger = logging.getLogger(__name__)

_LONGEST_SECONDS: Final = 3600.0  # for one command, however much progress it reports
_START_SECONDS: Final = 30.0  # a slow device with a cold cache imports tuf in several seconds
_STDERR_KEPT: Final = 2000  # bytes of the last words


class TimedOut(EdgeError):
    """The worker was silent for too long and was killed."""


class Aborted(EdgeError):
    """The worker was killed because an operator wants something else."""


class Hands(Protocol):
    """Somebody who carries out commands."""

    async def ask(self, command: Command) -> Reply:
        """Carry out a command and return its answer.

        Raises:
            UpdateRejected, SourceFailed, StoreError: it was not carried out.
            TimedOut, Aborted: nobody knows how far it came.
        """
        ...

    def abort(self) -> None:
        """Give up as soon as possible; ``ask`` raises ``Aborted``."""
        ...


@contextlib.asynccontextmanager
async def child_process(setup: Setup, silence_seconds: float) -> AsyncIterator[Hands]:
    """A worker in a process of its own, started now and gone afterwards."""
    environment = {
        **os.environ,
        "TMPDIR": setup.scratch,
        "ORT_DISABLE_TELEMETRY": "1",
        messages.AGENT_PID: str(os.getpid()),
        # glibc gives what was freed back at once (mallopt(3)): the model that was tested is gone before the
        # agent loads it. Measured with 12.6 MB: 37 MB left then instead of 59, 51 at most instead of 59.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    start = asyncio.create_task(asyncio.to_thread(_start, environment), name="worker-start")
    try:
        process = await asyncio.shield(start)
    except asyncio.CancelledError:
        with await start as process:
            process.kill()
        raise
    hands = _Child(process, silence_seconds)
    try:
        await hands.connect()
        hands.send(messages.encode(setup))
        yield hands
    finally:
        await hands.end()


def _start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start it beside the event loop.

    uvloop would fork, and answer nobody until the page tables are copied and the new program is in place: 10
    ms. ``Popen`` calls vfork: 1 ms. The thread it is called in must live on, its end would be the agent's
    death to the worker (PR_SET_PDEATHSIG). Those of the loop's executor do.
    """
    return subprocess.Popen(
        # -P: the working directory is no place to import from
        [sys.executable, "-P", "-m", "edge_agent.update.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


class _Child:
    def __init__(self, process: subprocess.Popen[bytes], silence_seconds: float) -> None:
        self._process = process
        self._silence = silence_seconds
        self._first = True
        self._aborted = False
        self._answers = asyncio.StreamReader(messages.MAX_LINE)
        self._errors = asyncio.StreamReader()
        self._pipes: list[asyncio.BaseTransport] = []
        self._commands: asyncio.WriteTransport | None = None
        self._last_words = asyncio.create_task(self._listen(), name="worker-stderr")

    async def connect(self) -> None:
        """Take up the ends of the three pipes."""
        loop = asyncio.get_running_loop()
        for reader, pipe in ((self._answers, self._process.stdout), (self._errors, self._process.stderr)):
            self._pipes.append((await loop.connect_read_pipe(_feeding(reader), pipe))[0])
        self._commands, _ = await loop.connect_write_pipe(asyncio.Protocol, self._process.stdin)

    def send(self, line: bytes) -> None:
        assert self._commands is not None
        self._commands.write(line)

    async def ask(self, command: Command) -> Reply:
        try:
            self.send(messages.encode(command))
            # A worker that died leaves a closed pipe: `drain` would raise, `_reply` says why it died.
            async with asyncio.timeout(_LONGEST_SECONDS):
                while True:
                    reply = await self._reply()
                    if not isinstance(reply, Progress):
                        break
        except TimeoutError as error:
            self._kill()
            raise TimedOut(f"the update worker said nothing for {self._silence:g} s and was ended") from error
        except (OSError, ValueError) as error:
            if self._aborted:
                raise Aborted("the update was given up for an operator's command") from error
            raise SourceFailed(f"the update worker broke off: {error}", reason="worker") from error
        if isinstance(reply, Failed):
            raise reply.error()
        return reply

    def abort(self) -> None:
        self._aborted = True
        self._kill()

    async def end(self) -> None:
        if self._commands is not None:
            self._commands.close()  # it ends by itself
        try:
            async with asyncio.timeout(1.0):
                await self._ended()
        except TimeoutError:
            self._kill()
        finally:
            if self._process.poll() is None:
                self._kill()
                await self._ended()
            self._last_words.cancel()
            await asyncio.gather(self._last_words, return_exceptions=True)
            for pipe in self._pipes:
                pipe.close()

    async def _ended(self) -> int:
        """Wait for its end; the exit code."""
        return await asyncio.to_thread(self._process.wait)

    async def _reply(self) -> Reply:
        patience = self._silence + (_START_SECONDS if self._first else 0.0)
        async with asyncio.timeout(patience):
            line = await self._answers.readline()
        self._first = False
        if line:
            return messages.decode_reply(line)
        if self._aborted:
            raise Aborted("the update was given up for an operator's command")
        code = await self._ended()
        words = await asyncio.gather(self._last_words, return_exceptions=True)
        raise SourceFailed(
            f"the update worker ended with {code}: {words[0] or 'it said nothing'}", reason="worker"
        )

    async def _listen(self) -> str:
        """Read stderr to its end, so that the worker never waits for us, and keep the last words."""
        tail = b""
        while data := await self._errors.read(4096):
            tail = (tail + data)[-_STDERR_KEPT:]
        words = tail.decode(errors="replace").strip()
        if words:
            logger.warning("update worker: %s", words)
        return words.splitlines()[-1] if words else ""

    def _kill(self) -> None:
        self._process.kill()  # harmless where it has ended


def _feeding(reader: asyncio.StreamReader) -> Callable[[], asyncio.StreamReaderProtocol]:
    return lambda: asyncio.StreamReaderProtocol(reader)


@contextlib.asynccontextmanager
async def this_process(setup: Setup, disk: Disk | None = None) -> AsyncIterator[Hands]:
    """A worker in a thread of this process: for tests and simulations; it cannot be killed."""
    from edge_agent.update.worker import Worker  # in child mode this process never imports it

    yield _InThread(Worker(setup, disk))


class _InThread:
    def __init__(self, worker: object) -> None:
        from edge_agent.update.worker import Worker

        assert isinstance(worker, Worker)
        self._worker = worker
        self._aborted = False

    async def ask(self, command: Command) -> Reply:
        reply = await asyncio.to_thread(self._worker.handle, command, lambda _: None)
        if self._aborted:
            raise Aborted("the update was given up for an operator's command")
        if isinstance(reply, Failed):
            raise reply.error()
        return reply

    def abort(self) -> None:
        self._aborted = True
