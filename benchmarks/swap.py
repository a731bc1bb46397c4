"""An update under load: failed requests, the longest time without an answer, memory, how long it takes.

One agent as a process, asked 500 times a second on a fixed schedule over five connections by another process,
follows a signed repository over HTTP on the loopback and takes up one 12 MB model after the other. The same
load without an update says what of a gap is the machine's. Then the agent is left alone and looks at the
repository ten times a second, for the price of one look with nothing new.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from benchmarks import models
from benchmarks.machine import describe, table
from edge_agent.contract import golden as goldens
from edge_agent.contract.assignments import Assignments, ModelAssignment, Release
from edge_agent.contract.bundle import MODEL, Bundle, write_bundle
from edge_agent.contract.golden import Array, Golden
from edge_agent.contract.manifest import Datatype, Decision, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version
from examples.demo.clients import HttpClient, predict_body
from examples.demo.processes import Processes, free_port, listens, ours, wait_until
from fleet.repository import Keys, Repository
from fleet.serve import StaticServer

RATE = 500  # requests a second
CONNECTIONS = 5
UPDATES = 5
SECONDS = 6.0  # of load around each update, and without one
CHECKS_SECONDS = 10.0
CHECK_INTERVAL = 0.1
NAME = "bench"
WIDTHS = [1024, 1024, 1024]  # 12.6 MB of FP32 weights


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory(prefix="edge-swap-") as folder, contextlib.ExitStack() as stack:
        print("\n### An update under load\n")
        _measure(Path(folder), stack)


def _measure(folder: Path, stack: contextlib.ExitStack) -> None:
    repository = Repository.create(folder / "repository", Keys(folder / "keys"))
    (folder / "root.json").write_bytes(repository.root())
    bundles = [_bundle(folder, f"1.{number}.0", number) for number in range(UPDATES + 1)]
    releases = [repository.publish(bundle).release for bundle in bundles]
    _assign(repository, releases[0])
    server = StaticServer(folder / "repository", port=0)
    server.start()
    stack.callback(server.stop)
    processes = stack.enter_context(Processes(folder / "logs"))
    port = free_port()
    _configure(folder, port, server.url, interval=0.2)
    agent = processes.start("agent", [ours("edge-agent"), "run", "--config", str(folder / "agent.yaml")])
    wait_until(lambda: listens(port), "the agent")
    wait_until(lambda: _version(port) == releases[0].version, "the first release")
    wait_until(lambda: _state(port) == "committed", "its commit")

    lines = [_line("no update", _load(folder, port, lambda: None), "-", "-", "-")]
    for release in releases[1:]:
        steady = _status_kb(agent.pid, "VmRSS")
        _reset_peak(agent.pid)
        children = _Children(agent.pid)
        seconds: list[float] = []

        def update(release: Release = release, seconds: list[float] = seconds) -> None:
            started = time.monotonic()
            _assign(repository, release)
            wait_until(lambda: _version(port) == release.version, str(release.version))
            seconds.append(time.monotonic() - started)

        found = _load(folder, port, update)
        worker = children.stop()
        peak = _status_kb(agent.pid, "VmHWM") - steady
        lines.append(
            _line(f"to {release.version}", found, f"{seconds[0]:.2f} s", f"{peak / 1024:.1f} MB",
                  f"{worker / 1024:.0f} MB")
        )  # fmt: skip
        wait_until(lambda: _state(port) == "committed", "the commit")
    head = ["", "requests", "failed", "longest without an answer", "slowest request", "p99",
            "assigned to answering", "agent above steady", "worker"]  # fmt: skip
    print(table(head, lines))
    size = sum(bundles[0].manifest.members[name].size for name in bundles[0].manifest.members)
    print(
        f"\n{RATE} requests/s on {CONNECTIONS} connections, bundles of {size / 1e6:.1f} MB. *assigned to "
        "answering*: from the signed assignment to the first answer of the new release; up to 0.2 s of it "
        "wait for the next look, 0.05 s for this measurement. *agent above steady*: its peak over "
        "what it had before. *worker*: the peak of the short-lived process, shared libraries included.\n"
    )
    processes.stop("agent")
    _checks(folder, processes, server.url)


def _checks(folder: Path, processes: Processes, url: str) -> None:
    """The price of a look: processor time of an agent that looks often, less that of one that does not."""
    spent = []
    for interval in (3600.0, CHECK_INTERVAL):
        port = free_port()
        _configure(folder, port, url, interval)
        agent = processes.start("agent", [ours("edge-agent"), "run", "--config", str(folder / "agent.yaml")])
        wait_until(lambda port=port: listens(port), "the agent")  # type: ignore[misc]
        wait_until(lambda port=port: _state(port) in ("idle", "committed"), "the first look")  # type: ignore[misc]
        time.sleep(2.0)  # until what a start does is over
        before = _cpu_seconds(agent.pid)
        time.sleep(CHECKS_SECONDS)
        spent.append(_cpu_seconds(agent.pid) - before)
        processes.stop("agent")
    looks = CHECKS_SECONDS / CHECK_INTERVAL
    print(
        f"A look with nothing new: one conditional request, {(spent[1] - spent[0]) / looks * 1e3:.2f} ms of "
        f"processor time (of {looks:.0f} looks in {CHECKS_SECONDS:.0f} s).\n"
    )


# The load: in a process of its own, so that what it measures is not itself


def _load(folder: Path, port: int, meanwhile: object) -> dict[str, float]:
    result = folder / "load.json"
    result.unlink(missing_ok=True)
    body = predict_body(models.rows(1)[0])
    (folder / "body").write_bytes(body)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.swap",
            "--load",
            str(port),
            str(SECONDS),
            str(folder / "body"),
            str(result),
        ]
    )
    try:
        time.sleep(1.5)
        assert callable(meanwhile)
        meanwhile()
    finally:
        process.wait(SECONDS + 60)
    return dict(json.loads(result.read_text()))


def _generate(port: int, seconds: float, body: bytes, result: Path) -> None:
    answered: list[float] = []
    took: list[float] = []
    failed: list[str] = []
    begin = time.perf_counter() + 0.1

    def connection(number: int) -> None:
        client = HttpClient("127.0.0.1", port)
        for turn in range(int(seconds * RATE / CONNECTIONS)):
            due = begin + (turn * CONNECTIONS + number) / RATE
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            try:
                reply = client.ask("POST", "/predict", body)
            except OSError as error:
                failed.append(str(error))
                client = HttpClient("127.0.0.1", port)
                continue
            if reply.status != 200 or reply.body.get("source") != "model":
                failed.append(f"{reply.status} {reply.body.get('reason')}")
            answered.append(time.perf_counter())
            took.append(reply.seconds)

    threads = [threading.Thread(target=connection, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gaps = np.diff(np.sort(answered))
    result.write_text(
        json.dumps(
            {
                "requests": len(answered) + len(failed),
                "failed": len(failed),
                "gap": float(gaps.max()),
                "slowest": max(took),
                "p99": float(np.percentile(took, 99)),
            }
        )
    )
    if failed:
        print(f"failed: {sorted(set(failed))[:5]}", file=sys.stderr)


def _line(label: str, found: dict[str, float], *more: str) -> list[str]:
    times = [f"{found[key] * 1e3:.1f} ms" for key in ("gap", "slowest", "p99")]
    return [label, f"{found['requests']:.0f}", f"{found['failed']:.0f}", *times, *more]


# What it is done with


def _bundle(folder: Path, version: str, seed: int) -> Bundle:
    """An autoencoder whose score is the mean squared error, as the quantizer makes them, but in FP32."""
    model = onnx.load(models.autoencoder(folder / f"{version}.onnx", WIDTHS, seed=seed))
    model.graph.node.extend(
        [
            helper.make_node("Sub", ["x", "y"], ["difference"]),
            helper.make_node("Mul", ["difference", "difference"], ["squares"]),
            helper.make_node("ReduceMean", ["squares"], ["score"], axes=[1], keepdims=0),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("score", onnx.TensorProto.FLOAT, ["batch"]))
    target = folder / f"bundle-{version}"
    target.mkdir()
    content = model.SerializeToString()
    (target / MODEL).write_bytes(content)
    rows = models.rows(8)
    scores = _scores(target / MODEL, rows)
    golden = Golden(
        inputs=(Array("x", Datatype.FP32, rows.shape, rows.tobytes()),),
        outputs=(Array("score", Datatype.FP32, scores.shape, scores.tobytes()),),
        absolute=1e-4,
        relative=1e-4,
    )
    manifest = Manifest(
        name=NAME,
        version=Version(version),
        task=Task.ANOMALY,
        inputs=(TensorSpec("x", Datatype.FP32, (-1, models.FEATURES)),),
        outputs=(TensorSpec("score", Datatype.FP32, (-1,)),),
        members={},
        decision=Decision("score", 2 * float(scores.max())),
        precision="fp32",
    )
    return write_bundle(target, manifest, {MODEL: content, goldens.FILE_NAME: goldens.encode(golden)})


def _scores(path: Path, rows: np.ndarray) -> np.ndarray:
    from edge_agent.config import EngineConfig
    from edge_agent.serving.engine import Engine

    return np.asarray(Engine.load(path, EngineConfig()).run({"x": rows})["score"])


def _configure(folder: Path, port: int, url: str, interval: float) -> None:
    probation = {"seconds": 0.5, "requests": 100, "max_seconds": 2.0}
    updates = {
        "source": url,
        "root": str(folder / "root.json"),
        "interval_seconds": interval,
        "probation": probation,
    }
    config = {"device": "bench", "store": str(folder / "store"), "http": {"port": port}, "updates": updates}
    (folder / "agent.yaml").write_text(json.dumps(config))


def _assign(repository: Repository, release: Release) -> None:
    serial = repository.assignments().serial + 1
    repository.assign(Assignments(serial=serial, models={NAME: ModelAssignment(stable=release)}))


def _version(port: int) -> str | None:
    with contextlib.suppress(OSError, KeyError, ValueError):
        client = HttpClient("127.0.0.1", port)
        try:
            versions = client.ask("GET", f"/v2/models/{NAME}").body["versions"]
            return str(versions[0])
        finally:
            client.close()
    return None


def _state(port: int) -> str | None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        for line in connection.getresponse().read().decode().splitlines():
            if line.startswith("edge_update_state{") and line.endswith(" 1.0"):
                return line.split('state="')[1].split('"')[0]
    except OSError:
        pass
    finally:
        connection.close()
    return None


class _Children:
    """Watches the children of a process and remembers the largest peak of any."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._over = threading.Event()
        self._peak = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        """The peak, in kB."""
        self._over.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        threads = Path(f"/proc/{self._parent}/task")
        while not self._over.wait(0.02):
            for thread in threads.iterdir():  # any of them may have started it
                with contextlib.suppress(OSError, IndexError, ValueError):
                    for child in (thread / "children").read_text().split():
                        self._peak = max(self._peak, _status_kb(int(child), "VmHWM"))


def _status_kb(pid: int, field: str) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{field}:")[1].split()[0])


def _reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): the peak becomes what it is now


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        _generate(int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]).read_bytes(), Path(sys.argv[5]))
    else:
        print(f"Measured on {describe()}.")
        main()
