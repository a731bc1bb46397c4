"""Requests at a steady rate over keep-alive connections, from a thread, while a test does something."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.support.services import eventually

PATIENCE = 20.0  # seconds for one answer; what takes longer is lost


class Answered(NamedTuple):
    """One answer of ``/predict``."""

    status: int
    body: dict[str, Any]
    seconds: float  # from the request's last byte sent to the answer's last byte read


class SteadyLoad:
    """``rate`` requests a second with these rows in turn, while the ``with`` lasts.

    Requests are sent when they are due, not when the one before was answered; only if all connections wait
    does the rate fall, which ``behind`` says.
    """

    def __init__(self, port: int, rows: Sequence[Sequence[float]], rate: float = 500.0) -> None:
        self._port, self._rate = port, rate
        self._requests = [_request(port, row) for row in rows]
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._sent = 0
        self.answers: list[Answered] = []
        self.lost: list[str] = []
        self.behind = 0.0  # seconds; the latest that a request was sent

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait_for(self, more: int) -> None:
        """Until so many more requests have come to their end."""
        until = len(self.answers) + len(self.lost) + more
        eventually(
            lambda: len(self.answers) + len(self.lost) >= until,
            f"{more} more answers",
            PATIENCE + 5 * more / self._rate,
        )

    def reasons(self, begin: int = 0) -> Counter[str]:
        """How often each reason was given, from answer ``begin`` on."""
        return Counter(answer.body.get("reason", str(answer.status)) for answer in self.answers[begin:])

    def table(self, deadline: float, begin: int = 0) -> str:
        """Answers by reason, and how many of them came after the deadline as the client sees it."""
        answers = self.answers[begin:]
        seconds = sorted(answer.seconds for answer in answers)
        late = sum(taken > deadline for taken in seconds)
        p99 = seconds[int(0.99 * (len(seconds) - 1))] if seconds else 0.0
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons(begin).most_common())
        return (
            f"{len(answers)} answers ({reasons}), {len(self.lost)} lost, {late} after {deadline * 1e3:g} ms; "
            f"p99 {p99 * 1e3:.1f} ms, longest {(seconds or [0.0])[-1] * 1e3:.1f} ms"
        )

    async def _run(self) -> None:
        began = time.perf_counter()
        await asyncio.gather(*(self._connection(began) for _ in range(128)))

    async def _connection(self, began: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while not self._over.is_set():
                number = self._sent
                self._sent += 1
                due = began + number / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                self.behind = max(self.behind, time.perf_counter() - due)
                try:
                    async with asyncio.timeout(PATIENCE):
                        self.answers.append(
                            await _ask(reader, writer, self._requests[number % len(self._requests)])
                        )
                except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # TimeoutError is one
                    self.lost.append(repr(error))
                    return
        finally:
            writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Answered:
    writer.write(request)
    began = time.perf_counter()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].partition("\r\n")[0])
    body = await reader.readexactly(length)
    return Answered(int(head.split(" ", 2)[1]), json.loads(body), time.perf_counter() - began)


def _request(port: int, row: Sequence[float]) -> bytes:
    body = json.dumps({"features": list(row)}).encode()
    return (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (port, len(body), body)
    )
