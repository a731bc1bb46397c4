"""Where the microseconds of a request go: processor time from the bytes that came to the bytes that leave.

Everything of the agent's own is in it, the kernel and the client are not: requests are handed to real
connections of a real server, as many in one turn of the loop as there are connections. Processor time, so
that other programs on the machine disturb it less than they do a latency; the smallest of several runs.

    python -m benchmarks.hot_path              # the table
    python -m benchmarks.hot_path --profile    # and which functions it is, at 16 connections
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from prometheus_client import CollectorRegistry

from benchmarks import models
from benchmarks.machine import describe, table
from benchmarks.serve import NAME, infer_body, make_bundle
from edge_agent.config import DriftConfig, EngineConfig, HttpConfig, ServingConfig
from edge_agent.contract.bundle import MODEL, open_bundle
from edge_agent.serving.engine import Engine
from edge_agent.serving.service import Service
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.transport.connection import HttpConnection
from edge_agent.transport.http import HttpServer
from examples.demo.clients import predict_body

CONNECTIONS = (1, 16, 64)
REQUESTS = 3000  # of one run
RUNS = 7
WIDTHS = [128, 32, 128]


class Sink(asyncio.Transport):
    """Takes what a connection writes, and counts it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Count a response."""
        self.written += 1

    def is_closing(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """There is nothing to close."""

    abort = close


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="where the microseconds of a request go")
    parser.add_argument("--profile", action="store_true", help="print the functions, too")
    profile = parser.parse_args().profile
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
        uvloop.run(_measure(make_bundle(Path(folder), WIDTHS), profile=profile))


async def _measure(folder: Path, *, profile: bool) -> None:
    bundle = open_bundle(folder)
    metrics = AgentMetrics(CollectorRegistry(), "bench", "0.0.0")
    service = Service(ServingConfig(), EngineConfig(), DriftConfig(), metrics)
    await service.start(NAME, bundle)
    server = HttpServer(HttpConfig(port=0), service, metrics)
    await server.start()
    rows = models.rows(200, seed=3)
    gc.collect()
    gc.freeze()
    path = f"/v2/models/{NAME}/infer"
    kinds: dict[str, list[bytes]] = {
        "GET a constant": [b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"],
        "POST /predict, JSON": [_post("/predict", predict_body(row)) for row in rows],
        "POST .../infer, JSON": [_post(path, infer_body(row)) for row in rows],
        "POST .../infer, binary": [_post(path, *_binary(row)) for row in rows],
    }
    lines = [["session.run", *(f"{value:.1f}" for value in _bare(bundle.member(MODEL), rows))]]
    for kind, requests in kinds.items():
        line = [kind]
        for connections in CONNECTIONS:
            turn = _turn(server, requests, connections)
            line.append(f"{await _fastest(turn, connections):.1f}")
            if profile and connections == 16:
                print(f"\n{kind}, {connections} connections")
                await _profile(turn, connections)
        lines.append(line)
    await server.stop(0)
    print(f"Measured on {describe()}.\n")
    print(table(["us of processor time per request, requests in one turn:", *map(str, CONNECTIONS)], lines))


def _turn(server: HttpServer, requests: list[bytes], connections: int) -> Callable[[int], Any]:
    open_ones = [(HttpConnection(server, admin=False), Sink()) for _ in range(connections)]
    for connection, sink in open_ones:
        connection.connection_made(sink)
    last = open_ones[-1][1]

    async def turn(number: int) -> None:
        want = last.written + 1
        for index, (connection, _) in enumerate(open_ones):
            connection.data_received(requests[(number * 7 + index) % len(requests)])
        while last.written < want:  # noqa: ASYNC110 - turns of the loop are what is measured
            await asyncio.sleep(0)

    return turn


async def _fastest(turn: Callable[[int], Any], connections: int) -> float:
    turns = REQUESTS // connections
    seconds = []
    for _ in range(RUNS + 1):  # the first warms
        began = time.process_time()
        for number in range(turns):
            await turn(number)
        seconds.append(time.process_time() - began)
    return min(seconds[1:]) / turns / connections * 1e6


async def _profile(turn: Callable[[int], Any], connections: int) -> None:
    profile = cProfile.Profile()
    profile.enable()
    for number in range(2 * REQUESTS // connections):
        await turn(number)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def _bare(model: Path, rows: np.ndarray) -> list[float]:
    """Of one row, in batches as large as the turns have requests."""
    engine = Engine.load(model, EngineConfig())
    times = []
    for size in CONNECTIONS:
        feeds = {engine.input_names[0]: rows[:size]}
        times.append(min(engine.warm_up(feeds, 300) for _ in range(3)) / size * 1e6)
    return times


def _post(path: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _binary(row: np.ndarray) -> tuple[bytes, str]:
    data = row.astype("<f4").tobytes()
    tensor = {
        "name": "x",
        "shape": [1, len(row)],
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, f"Inference-Header-Content-Length: {len(head)}\r\n"


if __name__ == "__main__":
    main()
