"""``edge-agent bench BUNDLE...``: what this device makes of a bundle, measured here and now.

Invariants:

- everything measured is what serves: the bundle is verified and loaded by ``Service``, with the engine
  options of the configuration; the row is the bundle's first golden vector;
- percentiles are of single calls, one at a time, after a warm-up; throughput is from the median of a batch;
- several bundles are measured one after the other in one process, so that their figures compare.
"""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry

from edge_agent import __version__
from edge_agent.config import Config
from edge_agent.contract.bundle import MODEL, Bundle
from edge_agent.contract.golden import FILE_NAME as GOLDEN
from edge_agent.contract.golden import parse as parse_golden
from edge_agent.errors import EngineError
from edge_agent.serving import tensors
from edge_agent.serving.engine import VERSION, Engine
from edge_agent.serving.service import Service
from edge_agent.serving.tensors import Feeds
from edge_agent.telemetry.metrics import AgentMetrics

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
WARM_UP_SHARE: Final = 0.1  # of the time given to each measurement


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of single calls."""

    p50: float
    p90: float
    p99: float
    p999: float
    longest: float
    calls: int


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one bundle. Seconds, bytes, rows per second."""

    name: str
    version: str
    precision: str
    bundle_bytes: int
    model_bytes: int
    load_seconds: float  # verified, loaded and warm
    memory_bytes: int  # by which this process grew
    model: Latency  # the engine alone
    request: Latency  # through the service: checks, batching, decision, metrics; without a transport
    rules: Latency  # the same answered by the rules
    rows_per_second: dict[int, float]  # by rows in a batch; empty for models of a fixed batch


async def measure(bundle: Bundle, config: Config, seconds: float) -> Result:
    """Measure one bundle for about ``seconds``.

    Raises:
        ContractError, BadRules, EngineError: the bundle cannot be served here.
    """
    before = resident_bytes()
    metrics = AgentMetrics(CollectorRegistry(), "bench", __version__)
    service = Service(config.serving, config.engine, config.drift, metrics)
    prepared = await service.prepare(bundle)
    service.swap(prepared)
    feeds = _one_row(bundle)
    batched = all(spec.shape[:1] == (-1,) for spec in bundle.manifest.inputs)
    sizes = [size for size in BATCHES if size <= config.engine.max_batch_rows] if batched else []
    part = seconds / (3 + len(sizes))
    gc.collect()
    gc.freeze()

    request = await _latency_of_service(service, bundle.name, feeds, part)
    grown = resident_bytes() - before
    service.set_killed(bundle.name, killed=True)
    rules = await _latency_of_service(service, bundle.name, feeds, part)
    engine = await asyncio.to_thread(Engine.load, bundle.member(MODEL), config.engine)
    alone = _latency_of_engine(engine, feeds, part)
    throughput = {size: size / _latency_of_engine(engine, _repeated(feeds, size), part).p50 for size in sizes}
    manifest = bundle.manifest
    return Result(
        name=manifest.name,
        version=str(manifest.version),
        precision=manifest.precision,
        bundle_bytes=manifest.size,
        model_bytes=manifest.members[MODEL].size,
        load_seconds=prepared.load_seconds,
        memory_bytes=max(grown, 0),
        model=alone,
        request=request,
        rules=rules,
        rows_per_second=throughput,
    )


def as_dict(results: list[Result], config: Config) -> dict[str, Any]:
    """For ``--json``: the machine, and every result."""
    return {"machine": machine(config), "bundles": [asdict(result) for result in results]}


def machine(config: Config) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "arch": platform.machine(),
        "cores": len(os_cores()),
        "onnxruntime": VERSION,
        "agent": __version__,
        "threads": config.engine.threads,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def text(results: list[Result], config: Config) -> str:
    """The tables, for people."""
    facts = machine(config)
    title = (
        f"{facts['processor']} ({facts['arch']}, {facts['cores']} cores), onnxruntime {VERSION}, "
        f"threads: {facts['threads']}, agent {__version__}"
    )
    lines = [title]
    for result in results:
        lines += ["", *_text_of(result)]
    first = results[0]
    for other in results[1:]:
        lines += ["", _comparison(first, other)]
    return "\n".join(lines)


def _text_of(result: Result) -> list[str]:
    title = (
        f"{result.name} {result.version} ({result.precision or 'precision not said'}): "
        f"model {_bytes(result.model_bytes)}, bundle {_bytes(result.bundle_bytes)}, "
        f"+{_bytes(result.memory_bytes)} in memory, ready in {result.load_seconds:.2f} s"
    )
    columns = "".join(f"{name:>9}" for name in ("p50", "p90", "p99", "p99.9", "longest", "calls"))
    lines = [title, f"  {'one row':<22}{columns}"]
    for name, latency in (
        ("the model alone", result.model),
        ("a request (service)", result.request),
        ("answered by the rules", result.rules),
    ):
        times = (latency.p50, latency.p90, latency.p99, latency.p999, latency.longest)
        lines.append(f"  {name:<22}{''.join(f'{_time(value):>9}' for value in times)}{latency.calls:>9}")
    if result.rows_per_second:
        sizes, rates = zip(*result.rows_per_second.items(), strict=True)
        lines.append(f"  {'rows in a batch':<22}{''.join(f'{size:>9}' for size in sizes)}")
        lines.append(f"  {'rows per second':<22}{''.join(f'{rate:>9.0f}' for rate in rates)}")
    return lines


def _comparison(first: Result, other: Result) -> str:
    return (
        f"{first.name} {first.version} ({first.precision}) beside {other.name} {other.version} "
        f"({other.precision}): {other.model.p50 / first.model.p50:.2f} times its speed for one row, "
        f"{first.model_bytes / other.model_bytes:.2f} times its size"
    )


def resident_bytes() -> int:
    """Resident memory of this process, from /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def os_cores() -> set[int]:
    """The cores this process may use."""
    return os.sched_getaffinity(0)


def _one_row(bundle: Bundle) -> Feeds:
    if GOLDEN not in bundle.manifest.members:
        raise EngineError(f"bundle {bundle.name!r} has no golden vectors to measure with")
    golden = parse_golden(bundle.read(GOLDEN))
    return {array.name: np.ascontiguousarray(tensors.to_numpy(array)[:1]) for array in golden.inputs}


def _repeated(feeds: Feeds, rows: int) -> Feeds:
    return {name: np.repeat(value, rows, axis=0) for name, value in feeds.items()}


def _latency_of_engine(engine: Engine, feeds: Feeds, seconds: float) -> Latency:
    engine.warm_up(feeds, 3)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        engine.run(feeds)
        taken.append(time.perf_counter() - started)
    return _percentiles(taken)


async def _latency_of_service(service: Service, model: str, feeds: Feeds, seconds: float) -> Latency:
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        await service.submit(model, None, feeds)
        taken.append(time.perf_counter() - started)
    return _percentiles(taken)


def _percentiles(taken: list[float]) -> Latency:
    steady = np.array(taken[int(len(taken) * WARM_UP_SHARE) :] or [0.0])
    p50, p90, p99, p999 = (float(value) for value in np.percentile(steady, (50, 90, 99, 99.9)))
    return Latency(p50, p90, p99, p999, float(steady.max()), len(steady))


def _processor() -> str:
    """The processor's name, as well as Linux knows it."""
    for path, key in ((Path("/proc/device-tree/model"), None), (Path("/proc/cpuinfo"), "model name")):
        try:
            content = path.read_text(errors="replace")
        except OSError:
            continue
        if key is None:
            return content.strip("\0\n ")
        for line in content.splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return platform.processor() or "processor unknown"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size < 10_000_000 else f"{size / 1e6:.1f} MB"
