"""Step 5: judge the written file, not the graph in memory.

Three disjoint parts of the data: ranges come from one part of the calibration rows, candidates are chosen on
rows kept for choosing, and what the report says was measured on rows that had no part in either. If those say
that the chosen candidate is outside the budget, the next more careful one is judged; the last is FP32.

Accuracy is compared between the file, as a device will load it, and the FP32 reference. Latency is measured
in turns, so that a busy machine slows both. On x86 an S8S8 graph has no fast kernel, so a U8S8 twin (the same
graph, the same work, unsigned activations) is timed in its place; the result says what was timed. It decides
nothing: the same command would not always give the same bundle (docs/adr/0020).
"""

from __future__ import annotations

import math
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

from quantize import compare, cost, runtime
from quantize.compare import Comparison
from quantize.config import Budget, Threshold
from quantize.cost import Sizes
from quantize.decide import Scored, threshold_of
from quantize.errors import BadData
from quantize.int8 import Candidate, Int8Model, write_int8
from quantize.load import Rows
from quantize.plan import Mode
from quantize.prepare import PreparedModel
from quantize.search import Found

_RANGES_SHARE: Final = 0.7  # of the calibration rows find ranges, with validation data
_RANGES_SHARE_ALONE: Final = 0.6  # without it: the others choose and judge, which bounds need rows for
_SPLIT_SEED: Final = 20
_STRETCHES: Final = 24  # of consecutive rows that the parts are made of, if there are as many rows; or more,
_LONGEST_STRETCH: Final = 32  # rows: none is longer
_TURNS: Final = 15
_RUNS_A_TURN: Final = 40
_SECONDS_AT_MOST: Final = 1.0
_PROBE_MACS: Final = 2e9  # multiply-accumulates of a sensitivity: which rows are used depends on no clock
_FEW_MACS: Final = 12e9  # of one candidate
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

    Without validation data the rows of the final judgement are a part of the calibration rows. Rows of a
    recording are like their neighbours: parts are made of stretches, or each would have a row beside every
    row of the others, and would judge what was chosen by nearly the same rows.
    """
    length = int(np.clip(len(calibration) // _STRETCHES, 1, _LONGEST_STRETCH))
    order = np.random.default_rng(_SPLIT_SEED).permutation(-(-len(calibration) // length))
    share = _RANGES_SHARE_ALONE if validation is None else _RANGES_SHARE
    cut = max(1, round(share * len(order)))

    def rows(stretches: np.ndarray) -> Rows:
        starts = np.sort(stretches)[:, None] * length
        places = (starts + np.arange(length)).reshape(-1)
        return calibration.take(places[places < len(calibration)])

    ranges, rest = rows(order[:cut]), order[cut:]
    if validation is None:
        return Parts(calibration, ranges, rows(rest[0::2]), rows(rest[1::2]))
    by_label = np.arange(len(validation))
    if validation.labels is not None:
        by_label = np.argsort(validation.labels, kind="stable")  # both halves get their share of bad rows
    first, second = np.sort(by_label[0::2]), np.sort(by_label[1::2])
    return Parts(calibration, ranges, validation.take(first), validation.take(second))


def check_metric(budget: Budget, model: PreparedModel, parts: Parts) -> None:
    """Whether the data can tell what the budget asks.

    Raises:
        BadData: the metric needs labels, or a score, and there is none.
    """
    if not budget.metric.needs_labels:
        return
    if parts.judgement.labels is None:
        raise BadData(f"--metric {budget.metric} needs labelled rows: give --validation with y (1 = bad)")
    if model.score is None:
        raise BadData(
            f"--metric {budget.metric} needs a score, the model has none: use --metric sqnr or agreement"
        )


def check_batches(model: PreparedModel, parts: Parts) -> None:
    """Whether every part of the data has a whole batch, where the model takes no other.

    Raises:
        BadData: too few rows; says how many are needed.
    """
    batch = model.fixed_batch or 1
    fewest = min(len(parts.ranges), len(parts.selection), len(parts.judgement))
    if fewest < batch:
        times = math.ceil(batch / max(fewest, 1))
        raise BadData(
            f"data {parts.calibration.source}: its smallest part has {fewest} rows and the model takes "
            f"{batch} at a time: give {times} times as many rows, or export the model for any number"
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """One file's outputs on one part of the data, next to the reference's."""

    comparison: Comparison
    outputs: Mapping[str, np.ndarray]
    threshold: float | None
    threshold_reference: float | None


class Judge:
    """Compares files and graphs with the FP32 reference, which runs once per part of the data.

    Three sizes of the rows for choosing, by what a row costs to run: for a sensitivity, a candidate, and all.
    """

    def __init__(
        self, model: PreparedModel, parts: Parts, threshold: Threshold, sizes: Sizes, *, fast: bool = False
    ) -> None:
        self._model, self._threshold, self._parts = model, threshold, parts
        self._session = runtime.open_session(model.proto)
        self._known: dict[int, tuple[Rows, dict[str, np.ndarray]]] = {}
        self._batch = model.fixed_batch or sizes.batch(model.batch)
        self._last: tuple[Path, Rows, Judged] | None = None  # the steps at the end ask for the same again
        macs = max(sizes.macs, 1.0)
        self._samples = {
            kind: tuple(
                _evenly(rows, int(share / macs), least) for rows in (parts.selection, parts.calibration)
            )
            for kind, share, least in (
                ("probe", _PROBE_MACS / (4 if fast else 1), 2 if fast else 4),
                ("few", _FEW_MACS / (2 if fast else 1), 8),
            )
        }

    def probe(self, source: onnx.ModelProto | runtime.Session) -> Comparison:
        """On the fewest rows for choosing."""
        return self._judge(source, *self._samples["probe"]).comparison

    def few(self, source: Path | onnx.ModelProto) -> Comparison:
        """On a sample of the rows for choosing."""
        return self._judge(source, *self._samples["few"]).comparison

    def selection(self, source: Path | onnx.ModelProto) -> Comparison:
        """On all rows for choosing."""
        return self.judge(source, self._parts.selection).comparison

    @property
    def batch(self) -> int:
        """Rows to run at a time: as many as memory allows."""
        return self._batch

    def itself(self) -> Comparison:
        """The reference beside itself on all rows for choosing: 200 dB, unless it is not finite."""
        rows = self._parts.selection
        expected, score = self.reference(rows), self._model.score
        if score is None:
            return compare.outputs(expected, expected)
        threshold = self._threshold_of(None, self._parts.calibration)
        labels = self._model.trim(rows).labels
        return compare.scores(expected[score], expected[score], (threshold, threshold), labels)

    def judge(self, source: Path | onnx.ModelProto, rows: Rows) -> Judged:
        """Compare a file or graph with the reference on ``rows``, by thresholds from all calibration rows.

        Raises:
            BadModel: onnxruntime cannot load or run it.
        """
        if self._last is not None and self._last[0] == source and self._last[1] is rows:
            return self._last[2]
        judged = self._judge(source, rows, self._parts.calibration)
        if isinstance(source, Path):
            self._last = source, rows, judged
        return judged

    def _judge(
        self, source: Path | onnx.ModelProto | runtime.Session, rows: Rows, calibration: Rows
    ) -> Judged:
        session = runtime.open_session(source) if isinstance(source, Path | onnx.ModelProto) else source
        expected = self.reference(rows)
        trimmed = self._model.trim(rows)
        got = runtime.run_all(session, trimmed.inputs, self._batch)
        score = self._model.score
        if score is None:
            return Judged(compare.outputs(expected, got), got, None, None)
        thresholds = (self._threshold_of(None, calibration), self._threshold_of(session, calibration))
        comparison = compare.scores(expected[score], got[score], thresholds, trimmed.labels)
        return Judged(comparison, got, thresholds[1], thresholds[0])

    def _threshold_of(self, session: runtime.Session | None, calibration: Rows) -> float:
        """Of the reference (None) or of a candidate."""
        score = self._model.score
        assert score is not None
        if self._threshold.value is not None:
            return self._threshold.value

        def scores_of(rows: Rows) -> np.ndarray:
            if session is None:
                return self.reference(rows)[score]
            return runtime.run_all(session, self._model.trim(rows).inputs, self._batch)[score]

        labels = self._model.trim(self._parts.selection).labels
        held_out = None
        if labels is not None and self._threshold.quantile is None:
            held_out = Scored(scores_of(self._parts.selection), labels)
        return threshold_of(scores_of(calibration), self._threshold, held_out)

    def scores(self, session: runtime.Session) -> np.ndarray:
        """What a model scores all calibration rows: (n,)."""
        assert self._model.score is not None
        inputs = self._model.trim(self._parts.calibration).inputs
        return runtime.run_all(session, inputs, self._batch)[self._model.score]

    def reference(self, rows: Rows) -> dict[str, np.ndarray]:
        """The FP32 model's outputs for ``rows``."""
        known = self._known.get(id(rows))
        if known is None:
            outputs = runtime.run_all(self._session, self._model.trim(rows).inputs, self._batch)
            known = self._known[id(rows)] = (rows, outputs)  # holding the rows keeps their id theirs
        return known[1]


def _evenly(rows: Rows, most: int, least: int) -> Rows:
    """At most ``most`` rows, but not less than ``least``, evenly over both labels."""
    most = max(most, least)
    if len(rows) <= most:
        return rows
    order = np.arange(len(rows)) if rows.labels is None else np.argsort(rows.labels, kind="stable")
    return rows.take(np.sort(order[np.linspace(0, len(rows) - 1, most).round().astype(int)]))


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


def settle(found: Found, judge: Judge, parts: Parts, budget: Budget) -> Int8Model:
    """The first of ``found`` that the rows of the final judgement say is inside the budget, or FP32.

    Where they are too few to be sure of any, the closest is taken that is inside on them.
    """
    candidates = found.models[0].candidates
    comparisons = [judge.judge(model.path, parts.judgement).comparison for model in found.models[:-1]]
    chosen = next((index for index, one in enumerate(comparisons) if one.inside(budget)), None)
    if chosen is None:
        nearly = [index for index, one in enumerate(comparisons) if one.inside(budget, surely=False)]
        chosen = max(nearly, key=lambda index: comparisons[index].sqnr, default=len(comparisons))
    for model, comparison in zip(found.models[:chosen], comparisons, strict=False):
        problem = f"outside the budget on the rows of the final judgement: {comparison.verdict()}"
        candidates = tuple(
            replace(one, problem=problem) if one.name == model.name else one for one in candidates
        )
    last = found.models[chosen]
    if all(one.name != last.name for one in candidates):
        known = Candidate(name=last.name, size=last.size, predicted_seconds=last.predicted_seconds)
        candidates = (*candidates, known)
    return replace(last, candidates=candidates)


def validate(model: PreparedModel, int8: Int8Model, judge: Judge, parts: Parts, folder: Path) -> Verdict:
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
        latency=_latency(model, int8, parts.calibration),
    )


def kernels_on_arm(model: Path, scratch: Path) -> dict[str, int]:
    """The operators of the graph that onnxruntime runs on ARM64, by how often."""
    graph = cost.arm_graph(model, scratch).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _latency(model: PreparedModel, int8: Int8Model, rows: Rows) -> Latency:
    count = model.fixed_batch or 1
    feeds = next(runtime.batches(rows.take(np.arange(count)).inputs, count))
    session, timed = runtime.open_session(int8.path), "the bundle's model"
    recipe = int8.recipe
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and recipe is not None and recipe.signed and recipe.count(Mode.STATIC):
        session = runtime.open_session(write_int8(int8.graph, int8.plan, recipe.twin()), timed=True)
        timed = "a U8S8 twin (x86 has no fast S8S8 kernels)"
    fp32, chosen = in_turns((runtime.open_session(model.proto, timed=True), session), feeds)
    return Latency(fp32=fp32, chosen=chosen, timed=timed, machine=platform.machine(), rows=count)


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
