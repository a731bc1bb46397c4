"""A release on its way to answering: verified, read, loaded and warmed; and freed when it is done.

What is loaded was proven against the manifest in the same go. Freeing a session takes a while, so it is done
in a thread, after the last request that it has.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from edge_agent.config import DriftConfig, EngineConfig
from edge_agent.contract import baseline as baselines
from edge_agent.contract.bundle import MODEL, RULES, Bundle
from edge_agent.contract.golden import FILE_NAME as GOLDEN
from edge_agent.contract.golden import parse as parse_golden
from edge_agent.contract.manifest import Manifest
from edge_agent.drift.detector import DriftDetector
from edge_agent.errors import EngineError
from edge_agent.rules.evaluate import RuleSet, constant
from edge_agent.serving import tensors
from edge_agent.serving.batcher import Batcher
from edge_agent.serving.engine import Engine, Sessions, may_not_end
from edge_agent.serving.tensors import Feeds, Tensor
from edge_agent.telemetry.metrics import ReleaseMetrics

DefaultDecision = Literal["pass", "fail"]


@dataclass(slots=True, eq=False)
class Release:
    """A bundle ready to answer: with its engine, or with its rules only."""

    bundle: Bundle
    manifest: Manifest
    rules: RuleSet
    metrics: ReleaseMetrics
    engine: Engine | None = None
    batcher: Batcher | None = None
    detector: DriftDetector | None = None
    load_seconds: float = 0.0
    stall_seconds: float = 0.0


class Loaded(NamedTuple):
    """What is in the memory of a release: ``inline`` says whether its model may run on the event loop."""

    rules: RuleSet
    engine: Engine
    inline: bool
    detector: DriftDetector | None


def load(
    bundle: Bundle, sessions: Sessions, config: EngineConfig, drift: DriftConfig, default: DefaultDecision
) -> Loaded:
    """Verify everything, then parse, load and warm it. Call it in a thread.

    Raises:
        ContractError: a member is missing or altered, or does not fit the manifest.
        BadRules: its rules cannot be read.
        EngineError: onnxruntime refuses the model.
    """
    bundle.verify()
    rules = read_rules(bundle, default)
    engine = sessions.engine(bundle.member(MODEL), bundle.manifest.members[MODEL].digest)
    _check_names(bundle, engine)
    median = engine.warm_up(_warm_up_feeds(bundle), config.warmup_runs)
    inline = median < config.inline_below_ms / 1000 and not may_not_end(bundle.member(MODEL))
    detector = None
    if drift.enabled and baselines.FILE_NAME in bundle.manifest.members:
        baseline = baselines.parse(bundle.read(baselines.FILE_NAME))
        if len(baseline.features) == len(features(bundle.manifest)):
            detector = DriftDetector(baseline, drift.window_rows)
    return Loaded(rules, engine, inline, detector)


def read_rules(bundle: Bundle, default: DefaultDecision) -> RuleSet:
    """The rules of a bundle; one that has none decides ``default``.

    Raises:
        ContractError, BadRules: they cannot be read.
    """
    names = features(bundle.manifest)
    if RULES not in bundle.manifest.members:
        return constant(default, names)
    return RuleSet.parse(bundle.read(RULES), names)


def features(manifest: Manifest) -> tuple[str, ...]:
    """The column names of the first input, made up where the manifest has none."""
    first = manifest.inputs[0]
    if first.features is not None:
        return first.features
    width = first.shape[-1] if len(first.shape) == 2 and first.shape[-1] > 0 else 1
    return tuple(f"f{column}" for column in range(width))


def _check_names(bundle: Bundle, engine: Engine) -> None:
    for kind, declared, real in (
        ("inputs", bundle.manifest.inputs, engine.input_names),
        ("outputs", bundle.manifest.outputs, engine.output_names),
    ):
        if {spec.name for spec in declared} != set(real):
            raise EngineError(
                f"model {bundle.name!r}: the manifest's {kind} are {', '.join(s.name for s in declared)}, "
                f"the model's are {', '.join(real)}"
            )


def _warm_up_feeds(bundle: Bundle) -> Feeds:
    """One row to warm up with, or as many as the model insists on: the first golden vectors, else zeros."""
    if GOLDEN in bundle.manifest.members:
        golden = parse_golden(bundle.read(GOLDEN))
        rows = tensors.fixed_rows(bundle.manifest.inputs) or 1
        return {array.name: np.ascontiguousarray(tensors.to_numpy(array)[:rows]) for array in golden.inputs}
    return {
        spec.name: np.zeros([max(size, 1) for size in spec.shape], tensors.numpy_dtype(spec.datatype))
        for spec in bundle.manifest.inputs
    }


def rows_of(manifest: Manifest, feeds: Feeds, rows: int) -> Tensor:
    """What the rules look at: the first input as (rows, features)."""
    first: Tensor = feeds[manifest.inputs[0].name]
    width = len(features(manifest))
    if first.ndim == 2 and first.shape[1] == width:
        return first
    return np.zeros((rows, width))


def retire(release: Release | None) -> None:
    """Let the old engine finish what it has, then free it in a thread: destroying a session takes a while."""
    if release is None or release.batcher is None:
        return
    loop = asyncio.get_running_loop()
    batcher = release.batcher

    def free() -> None:
        doomed: list[Any] = [release.engine]
        release.engine = release.batcher = release.detector = None
        loop.run_in_executor(None, doomed.clear)

    batcher.close(free)


async def longest_stall(tick: float = 0.001) -> float:
    """The longest time this loop was kept from running anything, until cancelled. Seconds."""
    longest = 0.0
    try:
        while True:
            before = time.monotonic()
            await asyncio.sleep(tick)
            longest = max(longest, time.monotonic() - before - tick)
    except asyncio.CancelledError:
        return longest
