"""The spine of ``quantize-model``: what happens, in order.

Every step takes what the earlier ones returned and returns a frozen value of its own type. Files are only
written below a staging folder until the last line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from edge_agent.contract import baseline, golden, wire
from edge_agent.contract import bundle as bundles
from edge_agent.contract.bundle import Bundle
from edge_agent.contract.manifest import Decision, Manifest, Provenance, Requirements
from edge_agent.contract.version import Version
from edge_agent.drift.binning import baseline_of
from quantize import bundle as bundling
from quantize import decide, fallback, interrupts, report, runtime
from quantize.config import QuantizeConfig
from quantize.cost import TARGETS, sizes_of
from quantize.errors import BadModel
from quantize.fallback import Fallback
from quantize.graph import opset_of
from quantize.int8 import Int8Model
from quantize.load import FloatModel, load_data, load_model
from quantize.observe import observe
from quantize.prepare import PreparedModel, prepare
from quantize.prune import Pruned, check_target_size, prune, unpruned
from quantize.search import search
from quantize.staging import staging
from quantize.validate import Judge, Parts, Verdict, check_batches, check_metric, settle, split, validate
from quantize.verify import verify_bundle

# The oldest agent that reads this bundle format.
_AGENT: Final = Version("0.1.0")


class StepLog:
    """Prints each step and how long it took. ``durations`` keeps them, in seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.durations: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Name and time what happens inside."""
        began = time.perf_counter()
        try:
            self._stream.write(f"{name:<10}")
            self._stream.flush()
            yield
        except BaseException:
            self._stream.write("\n")
            raise
        self.durations[name] = time.perf_counter() - began
        self._stream.write(f"{self.durations[name]:6.2f} s\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltBundle:
    """What ``build`` left in the output folder."""

    folder: Path
    tar: Path
    report: Path
    bundle: Bundle
    facts: Mapping[str, Any]  # the report beside the bundle
    table: str  # before and after, for people


def build(config: QuantizeConfig, log: StepLog) -> BuiltBundle:
    """Make a bundle of an FP32 model.

    Raises:
        QuantizeError: model, data or output folder will not do; nothing is left behind.
    """
    label = f"{config.name}-{config.version}"
    with staging(config.out, label) as stage:
        with log.step("load"):
            source = load_model(config.model, config.settings, trust=config.trust, folder=stage)
            calibration, held_out = load_data(config.calibration, config.validation, source.inputs)
            parts = split(calibration, held_out)
        with log.step("prepare"):
            model = prepare(source, calibration, config.prepare)
            check_batches(model, parts)
            sizes = sizes_of(model, calibration)
            judge = Judge(model, parts, config.threshold, sizes, fast=config.fast)
            check_metric(config.budget, model, parts)
        with log.step("prune"):
            pruned = unpruned(model)
            if config.shrink.wanted:
                pruned = prune(model, parts.ranges, judge.few, config.budget, config.shrink)
                sizes = sizes_of(pruned.model, calibration)
        with log.step("calibrate"):
            observed = observe(pruned.model, parts.ranges, parts.selection, sizes, fast=config.fast)
        with log.step("int8"):
            target = TARGETS[config.target]
            found = search(
                pruned.model, observed, judge, config.budget, stage, target=target, fast=config.fast
            )
        with log.step("validate"):
            int8 = settle(found, judge, parts, config.budget)
            check_target_size(config.shrink, int8.size, pruned)
            verdict = validate(model, int8, judge, parts, stage)
        with log.step("bundle"):
            members = _members(config, source, model, pruned, int8, verdict, judge, parts)
            written = bundling.write(stage, members.manifest, members.files)
        with log.step("verify"):
            verification = verify_bundle(stage / "bundle", emulate=config.emulate)
            if verification.complaint:
                raise BadModel(f"the written bundle does not hold: {verification.complaint}")
        with log.step("report"):
            facts = report.timed(members.facts, written, verdict, log.durations, verification)
            (stage / "report.json").write_bytes(wire.to_json(facts))
            (stage / "report.html").write_text(report.html(facts), encoding="utf-8")
            table = report.table(config, source, int8, verdict, members.fallback, written)
            interrupts.hold()
            folder, tar, beside = bundling.publish(stage, config.out, label, overwrite=config.overwrite)
    return BuiltBundle(
        folder=folder, tar=tar, report=beside, bundle=bundles.open_bundle(folder), facts=facts, table=table
    )


@dataclass(frozen=True, slots=True)
class _Members:
    manifest: Manifest
    files: Mapping[str, bytes]
    fallback: Fallback | None
    facts: Mapping[str, Any]


def _members(
    config: QuantizeConfig,
    source: FloatModel,
    model: PreparedModel,
    pruned: Pruned,
    int8: Int8Model,
    verdict: Verdict,
    judge: Judge,
    parts: Parts,
) -> _Members:
    """The manifest and the bytes of every member."""
    files = {bundles.MODEL: int8.path.read_bytes()}
    session = runtime.open_session(int8.path)
    scores = judge.scores(session) if model.score else None

    spread, rules = None, None
    if model.score is not None and verdict.threshold is not None and scores is not None:
        held_out = judge.judge(int8.path, parts.selection).outputs[model.score]
        labels = model.trim(parts.selection).labels
        spread = decide.spread_of(held_out, labels, verdict.threshold)
        rules = _fallback(model, int8, verdict.threshold, scores, judge, parts)
    if rules is not None:
        files[bundles.RULES] = rules.rules.to_yaml().encode()
    features = parts.calibration.features
    if features is not None:
        rows = model.trim(parts.calibration).inputs[model.inputs[0].name]
        files[baseline.FILE_NAME] = baseline.encode(baseline_of(rows, features, scores))
    vectors = bundling.golden_of(model, int8, parts.calibration, config.prepare.impute, judge.batch)
    files[golden.FILE_NAME] = golden.encode(vectors.golden)
    facts = report.member(
        config, source, model, int8, parts, verdict, spread, rules, vectors, pruned, judge.batch
    )
    files[bundles.REPORT] = wire.to_json(facts)

    decision = None
    if model.score is not None and verdict.threshold is not None and spread is not None:
        decision = Decision(output=model.score, threshold=verdict.threshold, spread=spread)
    manifest = Manifest(
        name=config.name,
        version=config.version,
        task=model.task,
        inputs=model.inputs,
        outputs=model.outputs,
        members={},
        decision=decision,
        precision=int8.precision,
        requires=Requirements(
            opset=opset_of(model.proto),
            agent=_AGENT,
        ),
        provenance=Provenance(
            source_model=source.digest,
            calibration_data=parts.calibration.digest,
            command=config.command,
            tools=report.tools(),
        ),
    )
    return _Members(manifest, files, rules, facts)


def _fallback(
    model: PreparedModel,
    int8: Int8Model,
    threshold: float,
    scores: np.ndarray,
    judge: Judge,
    parts: Parts,
) -> Fallback | None:
    """Rules for a table of features; other inputs have none."""
    features = parts.calibration.features
    if features is None or model.score is None:
        return None
    alarm_rate = float((scores > threshold).mean())
    name = model.inputs[0].name
    calibration = model.trim(parts.calibration).inputs[name]
    failed = {}
    for part in (parts.selection, parts.judgement):
        failed[id(part)] = judge.judge(int8.path, part).outputs[model.score] > threshold
    selection, judgement = model.trim(parts.selection), model.trim(parts.judgement)
    rules = fallback.derive(
        features, calibration, alarm_rate, selection.inputs[name], failed[id(parts.selection)], scores
    )
    return fallback.judge(
        rules,
        calibration,
        alarm_rate,
        judgement.inputs[name],
        failed[id(parts.judgement)],
        judgement.labels,
    )
