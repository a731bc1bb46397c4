"""Step 5: judge the written file, not the graph in memory.

Three disjoint parts of the data: ranges come from one part of the calibration rows, candidates are chosen on
rows kept for choosing, and what the report says was measured on rows that had no part in either.

Accuracy is compared between the file, as a device will load it, and the FP32 reference. Latency is measured
in turns, so that a busy machine slows both. On x86 an S8S8 graph has no fast kernel, so a U8S8 twin (the same
graph, the same work, unsigned activations) is timed in its place; the result says what was timed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from quantize import compare, runtime
from quantize.calibrate import Range
from quantize.compare import Comparison
from quantize.config import Threshold
from quantize.decide import threshold_of
from quantize.int8 import Int8Model, Plan, Scheme, write_static
from quantize.load import Rows
from quantize.prepare import PreparedModel

_RANGES_SHARE: Final = 0.7  # of the calibration rows find ranges, the others choose
_SPLIT_SEED: Final = 20
_TURNS: Final = 15
_RUNS_A_TURN: Final = 40
_SECONDS_AT_MOST: Final = 4.0
_KEPT_FLOAT: Final = ("Conv", "Gemm", "FusedGemm", "MatMul", "FusedConv", "FusedMatMul")


@dataclass(frozen=True, slots=True)
class Parts:
    """The data by what it is for."""

    calibration: Rows  # all good calibration rows: imputation, scaling, threshold, baseline, rules
    ranges: Rows  # the part of them that finds ranges
    selection: Rows  # chooses candidate and rules
    judgement: Rows  # the final figures


def split(calibration: Rows, validation: Rows | None) -> Parts:
    """Cut the data into disjoint parts, the same way for the same number of rows.

    Without validation data the rows of the final judgement are a part of the calibration rows.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(calibration))
    cut = max(1, round(_RANGES_SHARE * len(calibration)))
    ranges, rest = np.sort(order[:cut]), np.sort(order[cut:])
    if validation is None:
        return Parts(
            calibration,
            calibration.take(ranges),
            calibration.take(rest[0::2]),
            calibration.take(rest[1::2]),
        )
    by_label = np.arange(len(validation))
    if validation.labels is not None:
        by_label = np.argsort(validation.labels, kind="stable")  # both halves get their share of bad rows
    first, second = np.sort(by_label[0::2]), np.sort(by_label[1::2])
    return Parts(calibration, calibration.take(ranges), validation.take(first), validation.take(second))


@dataclass(frozen=True, slots=True)
class Judged:
    """One file's outputs on one part of the data, next to the reference's."""

    comparison: Comparison
    outputs: Mapping[str, np.ndarray]
    threshold: float | None
    threshold_reference: float | None


class Judge:
    """Compares files with the FP32 reference. The reference runs once per part of the data."""

    def __init__(self, model: PreparedModel, calibration: Rows, threshold: Threshold) -> None:
        self._model, self._threshold = model, threshold
        self._calibration = calibration
        self._session = runtime.open_session(model.proto)
        self._known: dict[int, tuple[Rows, dict[str, np.ndarray]]] = {}

    def judge(self, path: Path, rows: Rows) -> Judged:
        """Compare the file at ``path`` with the reference on ``rows``.

        Raises:
            BadModel: onnxruntime cannot load or run it.
        """
        session = runtime.open_session(path)
        expected = self.reference(rows)
        rows = self._model.trim(rows)
        got = runtime.run_all(session, rows.inputs, self._model.batch)
        score = self._model.score
        if score is None:
            return Judged(compare.outputs(expected, got), got, None, None)
        thresholds = (
            threshold_of(self.reference(self._calibration)[score], self._threshold),
            threshold_of(self.scores(session), self._threshold),
        )
        comparison = compare.scores(expected[score], got[score], thresholds, rows.labels)
        return Judged(comparison, got, thresholds[1], thresholds[0])

    def scores(self, session: runtime.Session) -> np.ndarray:
        """What a model scores all calibration rows: (n,)."""
        assert self._model.score is not None
        inputs = self._model.trim(self._calibration).inputs
        return runtime.run_all(session, inputs, self._model.batch)[self._model.score]

    def reference(self, rows: Rows) -> dict[str, np.ndarray]:
        """The FP32 model's outputs for ``rows``."""
        known = self._known.get(id(rows))
        if known is None:
            outputs = runtime.run_all(self._session, self._model.trim(rows).inputs, self._model.batch)
            known = self._known[id(rows)] = (rows, outputs)  # holding the rows keeps their id theirs
        return known[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One-thread time of one row (or one fixed batch), medians in seconds."""

    fp32: float
    chosen: float
    timed: str  # what stood for the chosen model
    machine: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the written file is worth."""

    comparison: Comparison
    judged_on: str
    kernels: Mapping[str, int]  # the graph as ARM64 will run it: operators and how often
    left_float: int  # dense and convolution nodes that run in float there
    threshold: float | None
    threshold_reference: float | None
    latency: Latency


def validate(
    model: PreparedModel,
    int8: Int8Model,
    ranges: Mapping[str, Range],
    judge: Judge,
    parts: Parts,
    folder: Path,
) -> Verdict:
    """Load the written file and compare it with the reference on rows that had no part in making it.

    Raises:
        BadModel: it cannot be loaded or run.
    """
    judged = judge.judge(int8.path, parts.judgement)
    kernels = kernels_on_arm(int8.path, folder / "arm.onnx")
    return Verdict(
        comparison=judged.comparison,
        judged_on=parts.judgement.source,
        kernels=kernels,
        left_float=sum(kernels.get(kind, 0) for kind in _KEPT_FLOAT),
        threshold=judged.threshold,
        threshold_reference=judged.threshold_reference,
        latency=_latency(model, int8, ranges, parts.calibration),
    )


def kernels_on_arm(model: Path, optimized: Path) -> dict[str, int]:
    """The operators of the graph that onnxruntime runs on ARM64, by how often."""
    runtime.open_session(model, settings=runtime.ARM_GRAPH, optimized=optimized)
    graph = onnx.load(optimized).graph
    optimized.unlink()
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _latency(model: PreparedModel, int8: Int8Model, ranges: Mapping[str, Range], rows: Rows) -> Latency:
    count = model.fixed_batch or 1
    feeds = {name: values[:count] for name, values in rows.inputs.items()}
    session, timed = runtime.open_session(int8.path), "the bundle's model"
    scheme = int8.scheme
    if scheme is not None and platform.machine() in ("x86_64", "AMD64"):
        session, timed = _twin(model, int8.plan, ranges, scheme), "a U8S8 twin (x86 has no fast S8S8 kernels)"
    fp32, chosen = in_turns((runtime.open_session(model.proto), session), feeds)
    return Latency(fp32=fp32, chosen=chosen, timed=timed, machine=platform.machine(), rows=count)


def _twin(model: PreparedModel, plan: Plan, ranges: Mapping[str, Range], scheme: Scheme) -> runtime.Session:
    unsigned = replace(scheme, signed_activations=False)
    return runtime.open_session(write_static(model.proto, plan, ranges, unsigned))


def in_turns(
    sessions: tuple[runtime.Session, runtime.Session], feeds: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Median seconds of a run of each session, measured in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for session in sessions:
        runtime.run(session, feeds)
    for _ in range(_TURNS):
        for session, found in zip(sessions, taken, strict=True):
            for _ in range(_RUNS_A_TURN):
                start = time.perf_counter()
                runtime.run(session, feeds)
                found.append(time.perf_counter() - start)
                if time.perf_counter() - began > _SECONDS_AT_MOST and len(found) >= 3:
                    break
        if time.perf_counter() - began > _SECONDS_AT_MOST:
            break
    return statistics.median(taken[0]), statistics.median(taken[1])
