"""One agent on one core, asked from the other: round trips and throughput, beside the bare model.

The 512 measurements of a part as JSON, by /predict, by the Open Inference Protocol and over MQTT. The floor
is the same stack answering a constant. Throughput at several connections needs wrk (Debian: wrk).
``python -m benchmarks.serve --peers`` measures what others would build beside it (``compare.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import models, mqtt
from benchmarks.machine import describe, table
from examples.demo.clients import HttpClient, Reply, predict_body
from examples.demo.processes import Processes, free_port, listens, ours, tool, wait_until

CASES = {"0.15 MB": [128, 32, 128], "6 MB": [2048, 1024, 64, 1024, 2048]}
REQUESTS = 5000
NAME = "bench"


def main() -> None:
    """Print the tables."""
    for label, widths in CASES.items():
        with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
            print(f"\n### Serving a {label} INT8 autoencoder, 512 inputs\n")
            _measure(Path(folder), widths)


def _measure(folder: Path, widths: list[int]) -> None:
    bundle = make_bundle(folder, widths)
    rows = models.rows(200, seed=3)
    bare = _bare(bundle / "model.onnx", rows)
    lines = [["bare session.run, in process", *_percentiles(bare)]]
    with Processes(folder / "logs") as processes:
        port, broker = free_port(), free_port()
        mosquitto = tool("mosquitto")
        config: dict[str, object] = {
            "device": "bench",
            "store": str(folder / "store"),
            "http": {"port": port},
        }
        if mosquitto is not None:
            (folder / "mosquitto.conf").write_text(
                f"listener {broker} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
            )
            processes.start("broker", [mosquitto, "-c", str(folder / "mosquitto.conf")])
            config["mqtt"] = {"port": broker}
            wait_until(lambda: listens(broker), "mosquitto")
        (folder / "agent.yaml").write_text(json.dumps(config))
        subprocess.run([ours("edge-agent"), "install", bundle, "--config", folder / "agent.yaml"], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        started = time.monotonic()
        agent = processes.start(
            "agent", _pinned(0, [ours("edge-agent"), "run", "--config", str(folder / "agent.yaml")])
        )
        wait_until(lambda: listens(port), "the agent")
        ready = time.monotonic() - started
        os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
        client = HttpClient("127.0.0.1", port)
        bodies = [predict_body(row) for row in rows]
        infer = [infer_body(row) for row in rows]
        path = f"/v2/models/{NAME}/infer"
        lines += [
            [
                "the same HTTP stack answering a constant",
                *_percentiles(_ask(client, lambda _: ("GET", "/v2/health/live", b""))),
            ],
            [
                "POST /predict, JSON",
                *_percentiles(_ask(client, lambda n: ("POST", "/predict", bodies[n % 200]))),
            ],
            ["POST .../infer, JSON", *_percentiles(_ask(client, lambda n: ("POST", path, infer[n % 200])))],
        ]
        client.close()
        if mosquitto is not None:
            lines += _over_mqtt(processes, broker, agent.pid, bodies)
        print(table(["one connection", "p50 us", "p99 us", "p99.9 us"], lines))
        print(f"\nStart to listening {ready:.2f} s; RSS {_rss(agent.pid):.0f} MB after this load.\n")
        _throughput(folder, port, bodies[0])
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def make_bundle(folder: Path, widths: list[int]) -> Path:
    """A bundle of a dense autoencoder of 512 inputs, made in ``folder``."""
    model = models.autoencoder(folder / "fp32.onnx", widths)
    np.savez(folder / "calibration.npz", X=models.rows(500))
    subprocess.run(
        [ours("quantize-model"), model, "--calibration", folder / "calibration.npz", "--name", NAME,
         "--version", "1.0.0", "--out", folder / "out", "--score", "mse"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return folder / "out" / f"{NAME}-1.0.0"


def _over_mqtt(processes: Processes, broker: int, agent: int, bodies: list[bytes]) -> list[list[str]]:
    topic = "edge/bench/echo"
    echo = processes.start("echo", _pinned(0, [sys.executable, "-m", "benchmarks.mqtt", str(broker), topic]))
    bare = mqtt.measure(broker, echo.pid, topic, bodies, REQUESTS // 2)
    processes.stop("echo")
    served = mqtt.measure(broker, agent, "edge/bench/predict", bodies, REQUESTS // 2)
    for what, trips in (("bare paho-mqtt echo", bare), ("agent", served)):
        print(f"MQTT: {trips.processor_seconds * 1e6:.0f} us of processor time per message in the {what}.\n")
    return [
        ["a bare paho-mqtt echo through the same mosquitto", *_percentiles(bare.seconds)],
        ["MQTT 5 through mosquitto, JSON", *_percentiles(served.seconds)],
    ]


def _bare(path: Path, rows: np.ndarray) -> list[float]:
    from edge_agent.config import EngineConfig
    from edge_agent.serving.engine import Engine

    engine = Engine.load(path, EngineConfig())
    name = engine.input_names[0]
    engine.warm_up({name: rows[:1]}, 200)
    seconds = []
    for number in range(REQUESTS):
        feeds = {name: rows[number % len(rows)][None]}
        started = time.perf_counter()
        engine.run(feeds)
        seconds.append(time.perf_counter() - started)
    return seconds


def _ask(client: HttpClient, request: Callable[[int], tuple[str, str, bytes]]) -> list[float]:
    replies: list[Reply] = [client.ask(*request(number)) for number in range(REQUESTS + 200)]
    assert all(reply.status == 200 for reply in replies)
    return [reply.seconds for reply in replies[200:]]


def infer_body(row: np.ndarray) -> bytes:
    """A row as an Open Inference Protocol request in JSON."""
    tensor = {
        "name": "x",
        "shape": [1, len(row)],
        "datatype": "FP32",
        "data": [float(value) for value in row],
    }
    return json.dumps({"inputs": [tensor]}).encode()


def _throughput(folder: Path, port: int, body: bytes) -> None:
    wrk = shutil.which("wrk")
    if wrk is None:
        print("Throughput: wrk is not installed (apt-get install wrk), not measured.")
        return
    script = folder / "predict.lua"
    script.write_text(f'wrk.method = "POST"\nwrk.body = [[{body.decode()}]]\n')
    lines = []
    for connections in (1, 16, 64):
        done = subprocess.run(
            _pinned(1, [wrk, "-t1", f"-c{connections}", "-d5s", "--latency", "-s", str(script),
                        f"http://127.0.0.1:{port}/predict"]),
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        rate = next(line.split()[1] for line in done.splitlines() if line.startswith("Requests/sec"))
        p50, p99 = (
            next(line.split()[1] for line in done.splitlines() if line.strip().startswith(p))
            for p in ("50%", "99%")
        )
        lines.append([str(connections), f"{float(rate):.0f}", p50, p99])
    print(table(["connections", "requests/s", "p50", "p99"], lines))


def _pinned(core: int, command: list[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command]


def _percentiles(seconds: list[float]) -> list[str]:
    return [f"{value * 1e6:.0f}" for value in np.percentile(seconds, [50, 99, 99.9])]


def _rss(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    if sys.argv[1:] == ["--peers"]:
        from benchmarks import compare

        print(f"Measured on {describe()}.")
        compare.main()
    else:
        main()
