"""The agent beside what others would build, and one HTTP stack beside another: ratios of one run.

Every server has one worker, one core (the first) and the same INT8 model; the client (wrk) has the last core.
Peers live in environments of their own, made once below ``$XDG_CACHE_HOME/edge-inference-bench``; one that
cannot be installed or started is named with the reason. Nothing is averaged over runs: the rows of one table
are minutes apart on the same machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.machine import table
from examples.demo.processes import free_port, ours, tool

HERE = Path(__file__).parent / "peers"
CONNECTIONS = (1, 16, 64)
SECONDS = 3  # of load per figure
WARM_UP = 200  # requests
START_SECONDS = 60.0
MODELS = {
    "0.15 MB": [128, 32, 128],
    "6 MB": [2048, 1024, 64, 1024, 2048],
    "12 MB": [4096, 1280, 64, 1280, 4096],
}
BINARY = {"Content-Type": "application/octet-stream"}


class NotAvailable(Exception):
    """A peer that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A server to measure. ``packages`` go to its environment; none: it needs no environment."""

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]  # {python}, {bin}, {port}, {folder}
    path: str
    body: bytes
    environment: str = ""  # the folder of its environment; several may share one
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


@dataclass(frozen=True)
class Load:
    """What wrk saw. Latencies in microseconds."""

    rate: float
    p50: float
    p99: float
    p999: float
    failed: int


@dataclass(frozen=True)
class Figures:
    """One server's row."""

    name: str
    loads: dict[int, Load]
    rss: float  # MB, all its processes
    start: float  # seconds to the first answer


def main(only_models: Sequence[str] = tuple(MODELS)) -> None:
    """Print the tables of docs/benchmarks.md and of docs/adr/0030-http-stack.md."""
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    began = time.monotonic()
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as name:
        folder = Path(name)
        bundles = {
            label: make_bundle(folder / label.replace(" ", ""), MODELS[label]) for label in only_models
        }
        os.sched_setaffinity(0, {max(cores)})
        row = models.rows(1, seed=3)[0]
        for label, bundle in bundles.items():
            print(f"\n### {label} INT8 autoencoder, 512 inputs, one decision per request\n")
            _bare(bundle, row)
            peers = [*_ours(row), *_others(row)]
            if label == "0.15 MB":
                peers = [*_floors(row), *peers]
            _print([_measured(peer, bundle, folder) for peer in peers])
        print("\n### HTTP stacks, 0.15 MB model, the same work one request at a time\n")
        first = next(iter(bundles.values()))
        _print([_measured(peer, first, folder) for peer in _stacks(row)], short=True)
    os.sched_setaffinity(0, cores)
    print(f"\nTook {(time.monotonic() - began) / 60:.1f} minutes.")


# -- who is measured -----------------------------------------------------------------------------------------


def _ours(row: np.ndarray) -> list[Peer]:
    agent = (str(ours("edge-agent")), "run", "--config", "{folder}/agent.yaml")
    tensor = {"name": "x", "shape": [1, len(row)], "datatype": "FP32"}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": row.nbytes}}]}).encode()
    infer = json.dumps({"inputs": [tensor | {"data": _floats(row)}]}).encode()
    path = "/v2/models/bench/infer"
    return [
        Peer("edge-agent, POST /predict, JSON", (), agent, "/predict", _features(row)),
        Peer("edge-agent, OIP infer, JSON", (), agent, path, infer),
        Peer(
            "edge-agent, OIP infer, binary", (), agent, path, head + row.tobytes(),
            headers=BINARY | {"Inference-Header-Content-Length": str(len(head))},
        ),
    ]  # fmt: skip


def _others(row: np.ndarray) -> list[Peer]:
    uvicorn = (
        "{python}",
        "-m",
        "uvicorn",
        "fastapi_service:app",
        "--port",
        "{port}",
        "--log-level",
        "warning",
    )
    tensor = {"name": "x", "shape": [1, len(row)], "datatype": "FP32", "data": _floats(row)}
    infer = json.dumps({"inputs": [tensor]}).encode()
    bento = (
        "{bin}/bentoml",
        "serve",
        "bentoml_service:Autoencoder",
        "--port",
        "{port}",
        "--host",
        "127.0.0.1",
    )
    return [
        Peer(
            "FastAPI + uvicorn", ("fastapi", "uvicorn[standard]"), uvicorn, "/predict", _features(row),
            environment="fastapi",
        ),
        Peer(
            "LitServe", ("litserve",), ("{python}", "litserve_service.py"), "/predict", _features(row),
            environment="litserve",
        ),
        Peer(
            "MLServer", ("mlserver",), ("{bin}/mlserver", "start", "{folder}/mlserver"),
            "/v2/models/bench/infer", infer, environment="mlserver",
        ),
        Peer("BentoML", ("bentoml",), bento, "/predict", _features(row), environment="bentoml"),
    ]  # fmt: skip


def _floors(row: np.ndarray) -> list[Peer]:
    nginx = tool("nginx")
    floors = [
        Peer(
            "httptools on uvloop, a constant", ("httptools", "uvloop", "msgspec"),
            ("{python}", "stacks.py", "protocol", "uvloop"), "/constant", _features(row),
            environment="stacks",
        )
    ]  # fmt: skip
    if nginx is not None:
        command = (nginx, "-c", "{folder}/nginx.conf", "-p", "{folder}")
        floors.insert(0, Peer("nginx, a constant", (), command, "/predict", _features(row)))
    return floors


def _stacks(row: np.ndarray) -> list[Peer]:
    packages = ("uvicorn", "granian", "uvloop", "httptools", "msgspec")
    return [
        Peer(
            f"{stack}, {loop}, {kind}", packages, ("{python}", "stacks.py", stack, loop), "/predict",
            _features(row), "stacks",
        ) if kind == "JSON" else Peer(
            f"{stack}, {loop}, {kind}", packages, ("{python}", "stacks.py", stack, loop), "/predict",
            row.tobytes(), "stacks", BINARY,
        )
        for stack in ("uvicorn", "granian", "protocol")
        for loop in ("asyncio", "uvloop")
        for kind in ("JSON", "binary")
    ]  # fmt: skip


def _floats(row: np.ndarray) -> list[float]:
    """Each float32 as the shortest decimal that gives it back, as a sensor's software would print it."""
    return [float(np.format_float_positional(value, unique=True)) for value in row]


def _features(row: np.ndarray) -> bytes:
    return json.dumps({"features": _floats(row)}).encode()


# -- measuring -----------------------------------------------------------------------------------------------


def _measured(peer: Peer, bundle: Path, folder: Path) -> Figures | str:
    print(f"  {peer.name} ...", file=sys.stderr, flush=True)
    try:
        with _running(peer, bundle, folder) as (port, process, start):
            _warm_up(peer, port)
            loads = {connections: _load(peer, port, connections, folder) for connections in CONNECTIONS}
            return Figures(peer.name, loads, _rss(process.pid), start)
    except NotAvailable as error:
        return f"{peer.name}: {error}"


@contextlib.contextmanager
def _running(peer: Peer, bundle: Path, folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes], float]]:
    home = _environment(peer)
    port = free_port()
    _settings(folder, bundle, port, peer)
    names = {"python": str(home / "python"), "bin": str(home), "port": str(port), "folder": str(folder)}
    command = [part.format(**names) for part in peer.command]
    environment = os.environ | {
        "MODEL": str(bundle / "model.onnx"),
        "PORT": str(port),
        "PYTHONPATH": str(HERE),
        "PATH": f"{home}:{os.environ['PATH']}",
        "ORT_DISABLE_TELEMETRY": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml"),
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "peer.log"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", "0", *command], cwd=HERE, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        _first_answer(peer, port, process, log)
        yield port, process, time.monotonic() - began
    finally:
        for child in reversed(_family(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, 15)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            for child in _family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, 9)
            process.wait()


def _environment(peer: Peer) -> Path:
    """The bin folder of a peer's environment, made if it is not there."""
    if not peer.packages:
        return Path(sys.executable).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-inference-bench"
    home = cache / peer.environment
    ready = home / "installed"
    if not ready.exists():
        print(f"  installing {peer.environment} into {home} ...", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        done = subprocess.run(
            [home / "bin" / "python", "-m", "pip", "install", "--quiet", *peer.packages, "numpy",
             "onnxruntime"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise NotAvailable(f"does not install: {done.stderr.strip().splitlines()[-1:]}")
        ready.touch()
    return home / "bin"


def _settings(folder: Path, bundle: Path, port: int, peer: Peer) -> None:
    """Configuration files of those that want them."""
    if "agent.yaml" in str(peer.command):
        store = folder / f"store-{bundle.parent.parent.name}"
        config = folder / "agent.yaml"
        config.write_text(json.dumps({"device": "bench", "store": str(store), "http": {"port": port}}))
        if not store.exists():
            subprocess.run(
                [ours("edge-agent"), "install", bundle, "--config", config],
                check=True,
                stdout=subprocess.DEVNULL,
            )
    if "nginx" in peer.name:
        (folder / "nginx.conf").write_text(
            f"worker_processes 1; daemon off; master_process off; pid {folder}/nginx.pid;\n"
            f"error_log {folder}/nginx.log; events {{ worker_connections 1024; }}\n"
            "http { access_log off; client_body_buffer_size 64k; keepalive_requests 100000000;\n"
            f"client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};\n"
            f"uwsgi_temp_path {folder}; scgi_temp_path {folder};\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ default_type application/json;\n"
            """return 200 '{"decision":"pass","score":0.123456789}'; } } }"""
        )
    if peer.environment == "mlserver":
        home = folder / "mlserver"
        home.mkdir(exist_ok=True)
        (home / "settings.json").write_text(
            json.dumps(
                {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(),
                 "metrics_port": free_port(), "parallel_workers": 0, "debug": False}
            )
        )  # fmt: skip
        (home / "model-settings.json").write_text(
            json.dumps({"name": "bench", "implementation": "mlserver_service.Autoencoder"})
        )


def _first_answer(peer: Peer, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _ask(peer, port) == 200:
                return
        time.sleep(0.01)
    tail = " ".join(log.read_text(errors="replace").split())[-300:]
    raise NotAvailable(f"does not answer within {START_SECONDS:g} s; its last words: {tail}")


def _ask(peer: Peer, port: int, times: int = 1) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    status = 0
    try:
        for _ in range(times):
            connection.request("POST", peer.path, peer.body, dict(peer.headers))
            answer = connection.getresponse()
            answer.read()
            status = answer.status
    finally:
        connection.close()
    return status


def _warm_up(peer: Peer, port: int) -> None:
    if _ask(peer, port, WARM_UP) != 200:
        raise NotAvailable("stopped answering while it was warmed up")


def _load(peer: Peer, port: int, connections: int, folder: Path) -> Load:
    (folder / "body").write_bytes(peer.body)
    script = folder / "load.lua"
    headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in peer.headers.items())
    script.write_text(
        f'wrk.method = "POST"\nlocal file = io.open("{folder}/body", "rb")\nwrk.body = file:read("*all")\n'
        f"file:close()\n{headers}\n"
        "function done(summary, latency, requests)\n"
        "  local e = summary.errors\n"
        '  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration,\n'
        "    latency:percentile(50), latency:percentile(99), latency:percentile(99.9),\n"
        "    e.status + e.connect + e.read + e.write + e.timeout))\nend\n"
    )
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "-s", script, f"http://127.0.0.1:{port}{peer.path}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = next(line for line in done.splitlines() if line.startswith("RESULT")).split()[1:]
    requests, duration, p50, p99, p999, failed = map(int, words)
    return Load(requests / (duration * 1e-6), p50, p99, p999, failed)


def _bare(bundle: Path, row: np.ndarray) -> None:
    """The limit: the model in this process."""
    from edge_agent.config import EngineConfig
    from edge_agent.serving.engine import Engine

    engine = Engine.load(bundle / "model.onnx", EngineConfig())
    lines = []
    for rows in (1, 16, 64):
        feeds = {"x": np.repeat(row[None], rows, 0)}
        engine.warm_up(feeds, 100)
        seconds = []
        until = time.perf_counter() + SECONDS / 3
        while time.perf_counter() < until:
            started = time.perf_counter()
            engine.run(feeds)
            seconds.append(time.perf_counter() - started)
        p50, p99, p999 = np.percentile(seconds, [50, 99, 99.9]) * 1e6
        lines.append([str(rows), f"{p50:.0f}", f"{p99:.0f}", f"{p999:.0f}", f"{rows / np.mean(seconds):.0f}"])
    print(table(["bare session.run, rows", "p50 us", "p99 us", "p99.9 us", "rows/s"], lines) + "\n")


def _print(results: Sequence[Figures | str], *, short: bool = False) -> None:
    base = next((r for r in results if isinstance(r, Figures) and r.name.startswith("FastAPI")), None)
    lines, absent = [], []
    for result in results:
        if isinstance(result, str):
            absent.append(result)
            continue
        one = result.loads[1]
        line = [result.name, f"{one.p50:.0f}", f"{one.p99:.0f}", f"{one.p999:.0f}"]
        for connections in CONNECTIONS:
            load = result.loads[connections]
            ratio = f" ({load.rate / base.loads[connections].rate:.1f}x)" if base else ""
            errors = f", {load.failed} failed" if load.failed else ""
            line.append(f"{load.rate:.0f}{ratio}{errors}")
        if not short:
            line += [f"{result.rss:.0f}", f"{result.start:.2f}"]
        lines.append(line)
    head = ["server", "p50 us", "p99 us", "p99.9 us", *[f"requests/s at {c}" for c in CONNECTIONS]]
    print(table([*head, *([] if short else ["RSS MB", "first answer s"])], lines))
    for reason in absent:
        print(f"\nNot measured: {reason}")


def _rss(pid: int) -> float:
    total = 0
    for process in _family(pid):
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{process}/status").read_text()
            total += int(status.split("VmRSS:")[1].split()[0])
    return total / 1024


def _family(pid: int) -> list[int]:
    """A process and all that came from it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def make_bundle(folder: Path, widths: list[int]) -> Path:
    folder.mkdir()
    model = models.autoencoder(folder / "fp32.onnx", widths)
    np.savez(folder / "calibration.npz", X=models.rows(500))
    subprocess.run(
        [ours("quantize-model"), model, "--calibration", folder / "calibration.npz", "--name", "bench",
         "--version", "1.0.0", "--out", folder / "out", "--score", "mse"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return folder / "out" / "bench-1.0.0"


if __name__ == "__main__":
    main()
