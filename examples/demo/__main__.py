"""``make demo``: quantize, serve, break, heal, roll out, roll back, on real data, on this machine.

Every figure that is printed was measured in this run; whatever does not happen ends the demo with exit code 1
and the reason. Everything it writes is under ``.demo/``.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from examples import dataset
from examples.demo.clients import HttpClient, Load, Reply, ask_over_mqtt, predict_body
from examples.demo.processes import (
    DemoFailed,
    Processes,
    expect,
    free_port,
    listens,
    ours,
    tool,
    wait_until,
)

MODEL: Final = "tissue"
FP32_MODEL: Final = Path("examples/data/autoencoder_fp32.onnx")
HTTP_REQUESTS: Final = 5000
MQTT_REQUESTS: Final = 1500
FLEET_SIZE: Final = 6  # this agent and five beside it
CANARIES: Final = 2
LOAD_PER_DEVICE: Final = 40.0  # rows/s
BAD_SHARE: Final = 0.1  # of the parts that keep coming during the roll-outs


# The policy of a fleet in a hurry: edge-fleet init writes one whose canaries bake for minutes, not seconds.
POLICY: Final = f"""\
name: demo
policy:
  canary: {{devices: {CANARIES}}}
  waves: []
  interval_seconds: 2
  in_progress_timeout_seconds: 60
  progress_deadline_seconds: 120
  analysis:
    initial_delay_seconds: 1
    count: 4
    metrics:
      - {{name: fallback_ratio, failure_above: 0.05}}
      - {{name: error_ratio, failure_above: 0.01, must_have_data: false}}
      - {{name: fail_ratio, compare: control, direction: either, allowed_increase: 0.25}}
"""


class Demo:
    """One run: where things are, what runs, what was measured."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.processes = processes
        self.data = dataset.load()
        self.summary: list[tuple[str, str]] = []
        self.fleet = folder / "fleet"
        self.release_port = free_port()
        self.broker_port = free_port()
        self.mqtt5 = True
        self.ports: dict[str, int] = {}
        self.began = time.monotonic()

    @contextlib.contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        """Print a step and how long it took."""
        print(f"\n[{number}] {title}", flush=True)
        started = time.monotonic()
        yield
        print(f"    done in {time.monotonic() - started:.1f} s", flush=True)

    def say(self, text: str) -> None:
        """One line of a step."""
        print(f"    {text}", flush=True)

    def record(self, what: str, figure: str) -> None:
        """A measured figure for the summary, said at once too."""
        self.summary.append((what, figure))
        self.say(f"{what}: {figure}")

    def run(self, program: str, *arguments: str | Path, allow: Sequence[int] = (0,)) -> str:
        """Run one of our console scripts and return what it printed.

        Raises:
            DemoFailed: its exit code is not in ``allow``.
        """
        done = subprocess.run(
            [ours(program), *map(str, arguments)], capture_output=True, text=True, check=False
        )
        expect(
            done.returncode in allow,
            f"{program} {arguments[0]} ... ended with {done.returncode}: {done.stderr.strip()[-800:]}",
        )
        return done.stdout

    def quantize(self, version: str, calibration: Path, *options: str | Path) -> Path:
        """Quantize the example model; returns the bundle."""
        bundles = self.folder / "bundles"
        print(
            self.run(
                "quantize-model", FP32_MODEL, "--calibration", calibration,
                "--name", MODEL, "--version", version, "--out", bundles,
                "--impute", "median", "--scale", "standard", "--score", "mse", *options,
            ).rstrip()
        )  # fmt: skip
        return bundles / f"{MODEL}-{version}"

    @property
    def validation(self) -> Path:
        """The held-out rows as a file."""
        return self.folder / "validation.npz"

    def store(self, device: str) -> Path:
        """A device's store."""
        return self.folder / "devices" / device

    def start_agent(self, device: str, *, mqtt: bool) -> None:
        """Start an agent that follows the release repository, and wait until it serves a model."""
        folder = self.folder / "devices"
        folder.mkdir(exist_ok=True)
        port = self.ports[device]
        config: dict[str, Any] = {
            "device": device,
            "store": str(self.store(device)),
            "http": {"port": port},
            "updates": {
                "source": f"http://127.0.0.1:{self.release_port}/",
                "root": str(self.fleet / "repository" / "metadata" / "1.root.json"),
                "interval_seconds": 1.0,
                "probation": {"seconds": 3.0, "requests": 50, "max_seconds": 30.0},
            },
        }
        if mqtt:
            config["mqtt"] = {"port": self.broker_port, "protocol": "5" if self.mqtt5 else "3.1.1"}
        path = folder / f"{device}.yaml"
        path.write_text(json.dumps(config, indent=2))  # JSON is YAML
        self.processes.start(device, [ours("edge-agent"), "run", "--config", str(path)])

    def wait_for_version(self, device: str, version: str) -> None:
        """Wait until a device's own model of this version answers."""
        row = predict_body(self.data.held_out[0])

        def answers() -> bool:
            expect(self.processes.alive(device), f"agent {device} died: {self.processes.last_words(device)}")
            with contextlib.suppress(OSError, ValueError):
                client = HttpClient("127.0.0.1", self.ports[device])
                reply = client.ask("POST", "/predict", row)
                client.close()
                return (reply.body.get("source"), reply.body.get("version")) == ("model", version)
            return False

        wait_until(answers, f"{device} to answer with {MODEL} {version}")

    def control(self, device: str, path: str) -> Reply:
        """A command to an agent, over its control socket."""
        client = HttpClient("", 0, self.store(device) / "control.sock")
        reply = client.ask("POST", path, b"{}")
        client.close()
        return reply


def main() -> int:
    """Run the demo. 0 if everything it promises happened."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the agent running at the end")
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Processes(folder / "logs") as processes:
        demo = Demo(folder, processes)
        try:
            with demo.step(1, "Quantize: a real FP32 autoencoder becomes a signed-ready INT8 bundle"):
                quantize(demo)
            with demo.step(2, "Start: release server, MQTT broker, agent; the agent takes 1.0.0 by itself"):
                start(demo)
            with demo.step(3, "Answer: held-out rows over HTTP and MQTT"):
                answer(demo)
            with demo.step(4, "Break the model in memory and on disk, and watch it heal"):
                break_and_heal(demo)
            with demo.step(5, f"Roll out: {FLEET_SIZE} devices, canary first; 2.0.0 is good, 3.0.0 is not"):
                roll_out(demo)
        except DemoFailed as failure:
            print(f"\nThe demo failed: {failure}\nLogs: {folder / 'logs'}", file=sys.stderr)
            return 1
        summarize(demo)
        if arguments.keep:
            keep(demo)
    return 0


def quantize(demo: Demo) -> None:
    """Step 1: one command, FP32 in, bundle out."""
    dataset.write_validation(demo.validation)
    good = dataset.write_calibration(demo.folder / "calibration.npz", missing=0.01)
    bundle = demo.quantize("1.0.0", good, "--validation", demo.validation)
    before = FP32_MODEL.stat().st_size
    after = (bundle / "model.onnx").stat().st_size
    demo.record(
        "model size FP32 -> INT8",
        f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({before / after:.1f}x smaller)",
    )


def start(demo: Demo) -> None:
    """Step 2: everything on the loopback; the agent's first model comes through the signed repository."""
    demo.run("edge-fleet", "init", demo.fleet)
    demo.run(
        "edge-fleet", "--fleet", demo.fleet, "publish", demo.folder / "bundles" / f"{MODEL}-1.0.0", "--stable"
    )
    demo.processes.start(
        "releases",
        [ours("edge-fleet"), "--fleet", str(demo.fleet), "serve", "--port", str(demo.release_port)],
    )
    wait_until(lambda: listens(demo.release_port), "the release server")
    mosquitto = tool("mosquitto")
    demo.mqtt5 = mosquitto is not None
    if mosquitto is not None:
        config = demo.folder / "mosquitto.conf"
        config.write_text(
            f"listener {demo.broker_port} 127.0.0.1\nallow_anonymous true\n"
            "persistence false\nset_tcp_nodelay true\n"
        )
        demo.processes.start("broker", [mosquitto, "-c", str(config)])
    else:
        demo.processes.start("broker", [sys.executable, "-m", "examples.demo.broker", str(demo.broker_port)])
    wait_until(lambda: listens(demo.broker_port), "the MQTT broker")
    demo.say(f"MQTT broker: {'mosquitto, MQTT 5' if mosquitto else 'amqtt (embedded), MQTT 3.1.1'}")
    demo.ports["unit-1"] = free_port()
    started = time.monotonic()
    demo.start_agent("unit-1", mqtt=True)
    demo.wait_for_version("unit-1", "1.0.0")
    demo.record(
        "from start to first answer by a model fetched and verified", f"{time.monotonic() - started:.1f} s"
    )


def answer(demo: Demo) -> None:
    """Step 3: latencies, who answered, and whether the answers are any good."""
    rows, labels = demo.data.held_out, demo.data.labels
    bodies = [predict_body(row) for row in dataset.with_missing(rows, 0.01)]
    client = HttpClient("127.0.0.1", demo.ports["unit-1"])
    for body in bodies[:200]:  # the client's own first calls are slow
        client.ask("POST", "/predict", body)
    over_http = [
        client.ask("POST", "/predict", bodies[number % len(bodies)]) for number in range(HTTP_REQUESTS)
    ]
    client.close()
    expect(all(reply.status == 200 for reply in over_http), "an HTTP request was not answered with 200")
    over_mqtt = asyncio.run(
        ask_over_mqtt(
            demo.broker_port,
            "unit-1",
            [bodies[number % len(bodies)] for number in range(MQTT_REQUESTS)],
            mqtt5=demo.mqtt5,
        )
    )
    same = all(
        (mine.body["decision"], mine.body["score"]) == (other.body["decision"], other.body["score"])
        for mine, other in zip(over_http, over_mqtt, strict=False)
    )
    expect(same, "HTTP and MQTT gave different answers for the same row")
    demo.record(f"HTTP round trip, {len(over_http)} requests", percentiles(over_http))
    demo.record(f"MQTT round trip, {len(over_mqtt)} requests", percentiles(over_mqtt))
    sources = collections.Counter(reply.body["source"] for reply in (*over_http, *over_mqtt))
    demo.record("answered by", ", ".join(f"{source} {count}" for source, count in sorted(sources.items())))
    once = [reply.body for reply in over_http[: len(rows)]]
    failed = np.array([body["decision"] == "fail" for body in once])
    scores = np.array([body["score"] for body in once])
    bad = labels == 1
    demo.record(
        f"detection on {len(rows)} held-out rows ({int(bad.sum())} bad, 1 % of values missing)",
        f"ROC-AUC {roc_auc(scores, bad):.3f}, found {failed[bad].mean():.1%} of the bad, "
        f"rejected {failed[~bad].mean():.1%} of the good",
    )


def break_and_heal(demo: Demo) -> None:
    """Step 4: parts keep coming while the model is taken away; not one goes without an answer."""
    with Load([demo.ports["unit-1"]], demo.data.held_out, 200.0) as load:
        tally = load.tallies[demo.ports["unit-1"]]
        answered_by = Watch(tally.answers)

        expect(
            demo.control("unit-1", f"/v2/repository/models/{MODEL}/unload").status == 200,
            "unload was refused",
        )
        answered_by.expect("fallback", "unloaded", "1.0.0")
        demo.say("model unloaded from memory: the rules answer, reason 'unloaded'")

        member = demo.store("unit-1") / "models" / MODEL / "current" / "model.onnx"
        damage(member)
        reply = demo.control("unit-1", f"/v2/repository/models/{MODEL}/load")
        expect(reply.status != 200, "a corrupted model was loaded")
        demo.say(f"model.onnx overwritten on disk, load refused: {reply.body['error']}")
        answered_by.expect("fallback", "corrupt_model", "1.0.0")
        started = time.monotonic()
        answered_by.expect("model", "ok", "1.0.0")
        demo.record("healed by itself from the release repository", f"{time.monotonic() - started:.1f} s")

        extreme = np.full(demo.data.held_out.shape[1], 3e38, np.float32)
        client = HttpClient("127.0.0.1", demo.ports["unit-1"])
        reply = client.ask("POST", "/predict", predict_body(extreme))
        client.close()
        expect(
            (reply.status, reply.body.get("source")) == (200, "fallback"),
            f"a row that overflows the model was answered by {reply.body}",
        )
        demo.say(f"a row of 3e38: {reply.body['decision']} by the rules, reason {reply.body['reason']!r}")
    expect(load.lost == 0, f"{load.lost} of {load.sent} requests were lost: {tally.why_lost}")
    by = collections.Counter()
    for (source, reason, _), count in tally.answers.items():
        by[f"{source} ({reason})"] += count
    demo.record(
        f"requests while it was broken and healed: {load.sent}, lost {load.lost}",
        ", ".join(f"{who} {count}" for who, count in by.most_common()),
    )


def roll_out(demo: Demo) -> None:
    """Step 5: a good release reaches everybody, a bad one is stopped at the canaries."""
    devices = [f"unit-{number}" for number in range(1, FLEET_SIZE + 1)]
    for device in devices[1:]:
        demo.ports[device] = free_port()
        demo.start_agent(device, mqtt=False)
    for device in devices:
        demo.wait_for_version(device, "1.0.0")
    write_fleet_files(demo, devices)
    good = demo.folder / "calibration.npz"
    v2 = demo.quantize("2.0.0", good, "--validation", demo.validation, "--threshold", "quantile:0.99")
    wrong = dataset.write_calibration(demo.folder / "calibration_wrong_units.npz", factor=0.25)
    v3 = demo.quantize("3.0.0", wrong)

    with Load(list(demo.ports.values()), parts(demo), LOAD_PER_DEVICE) as load:
        seconds = released(demo, v2, "2.0.0", "Succeeded")
        for device in devices:
            demo.wait_for_version(device, "2.0.0")
        demo.record(f"2.0.0 on all {FLEET_SIZE} devices, canary first", f"{seconds:.1f} s")
        seconds = released(demo, v3, "3.0.0", "RolledBack")
        for device in devices:
            demo.wait_for_version(device, "2.0.0")
        demo.record("3.0.0 judged bad at the canaries, whole fleet back on 2.0.0", f"{seconds:.1f} s")
    seen = collections.Counter()
    for tally in load.tallies.values():
        for (_, _, version), count in tally.answers.items():
            seen[version] += count
    touched = sum(any(key[2] == "3.0.0" for key in tally.answers) for tally in load.tallies.values())
    expect(
        touched == CANARIES, f"{touched} devices answered with 3.0.0, expected the {CANARIES} canaries only"
    )
    why = next((tally.why_lost for tally in load.tallies.values() if tally.why_lost), "")
    expect(load.lost == 0, f"{load.lost} of {load.sent} requests were lost: {why}")
    demo.record(
        f"requests during both roll-outs: {load.sent}, lost {load.lost}",
        ", ".join(f"{version}: {count}" for version, count in sorted(seen.items())),
    )
    demo.record(
        f"longest time any device did not answer (one row every {1000 / LOAD_PER_DEVICE:.0f} ms)",
        f"{load.longest_gap * 1000:.0f} ms",
    )
    commits = subprocess.run(
        ["git", "-C", str(demo.fleet), "log", "--oneline"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    demo.record("decisions on record in git", f"{len(commits)} commits")


def released(demo: Demo, bundle: Path, version: str, phase: str) -> float:
    """Publish a bundle, start its roll-out and run it to its end; returns seconds."""
    started = time.monotonic()
    fleet = ("--fleet", demo.fleet)
    demo.run("edge-fleet", *fleet, "publish", bundle)
    demo.run("edge-fleet", *fleet, "rollout", "start", version)
    print(demo.run("edge-fleet", *fleet, "rollout", "run", allow=(0, 1)).rstrip())
    status = json.loads(demo.run("edge-fleet", *fleet, "rollout", "status", "--json"))
    expect(
        status["phase"] == phase, f"the roll-out of {version} ended as {status['phase']}, expected {phase}"
    )
    return time.monotonic() - started


def write_fleet_files(demo: Demo, devices: Sequence[str]) -> None:
    """The two files people keep: who the devices are, and how a release is judged."""
    lines = ["devices:"]
    lines += [f"  - {{id: {device}, address: 'http://127.0.0.1:{demo.ports[device]}'}}" for device in devices]
    (demo.fleet / "devices.yaml").write_text("\n".join(lines) + "\n")
    (demo.fleet / "fleet.yaml").write_text(POLICY)


def parts(demo: Demo) -> np.ndarray:
    """Rows as they come in production: mostly good, some bad."""
    bad = demo.data.labels == 1
    good_rows, bad_rows = demo.data.held_out[~bad], demo.data.held_out[bad]
    count = round(len(good_rows) * BAD_SHARE / (1 - BAD_SHARE))
    return np.random.default_rng(5).permutation(np.concatenate([good_rows, bad_rows[:count]]))


def damage(path: Path) -> None:
    """Overwrite bytes in the middle of a file, as a dying SD card does."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 64)


class Watch:
    """Waits for an answer of a kind that came after it last looked."""

    def __init__(self, answers: collections.Counter[tuple[str, str, str]]) -> None:
        self._answers = answers

    def expect(self, source: str, reason: str, version: str) -> None:
        """Wait for a new answer of this kind.

        Raises:
            DemoFailed: none came.
        """
        before = self._answers[source, reason, version]
        wait_until(
            lambda: self._answers[source, reason, version] > before,
            f"an answer by the {source} ({reason}) of {version}",
        )


def percentiles(replies: Sequence[Reply]) -> str:
    """p50, p99 and p99.9 in milliseconds."""
    p50, p99, p999 = np.percentile([reply.seconds * 1000 for reply in replies], [50, 99, 99.9])
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, p99.9 {p999:.2f} ms"


def roc_auc(scores: np.ndarray, bad: np.ndarray) -> float:
    """The probability that a bad row scores above a good one (Mann-Whitney U), ties count half."""
    below = (scores[~bad][None, :] < scores[bad][:, None]).mean()
    equal = (scores[~bad][None, :] == scores[bad][:, None]).mean()
    return float(below + equal / 2)


def summarize(demo: Demo) -> None:
    """Every figure of this run in one table."""
    width = max(len(what) for what, _ in demo.summary)
    print(f"\nSummary, measured in this run ({time.monotonic() - demo.began:.0f} s):")
    for what, figure in demo.summary:
        print(f"  {what:<{width}}  {figure}")


def keep(demo: Demo) -> None:
    """Leave the agent, its broker and the release server running."""
    pids = demo.processes.keep("unit-1", "broker", "releases")
    url = f"http://127.0.0.1:{demo.ports['unit-1']}"
    print(f"\nStill running. Open {url}/ and {url}/metrics, or ask it:")
    values = json.dumps([round(float(value), 4) for value in demo.data.held_out[0]])
    print(f"  curl -s {url}/predict -d '{{\"features\": {values}}}'")
    print(f"Stop with: kill {' '.join(map(str, pids))}")


if __name__ == "__main__":
    sys.exit(main())
