"""Step 7: say what was done and measured.

Two forms of the same facts: ``report.json`` in the bundle, which holds nothing that differs between two runs
of the same command, and ``N-V.report.json`` beside it, which adds digest, latencies, durations and machine.
``N-V.report.html`` shows the latter (``page.py``). The table is for the terminal, and so is the comparison of
two bundles.
"""

from __future__ import annotations

import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from edge_agent import __version__
from edge_agent.contract import bundle as bundles
from edge_agent.contract import wire
from edge_agent.contract.bundle import Bundle
from quantize import page, runtime, target, verify
from quantize.bundle import Vectors
from quantize.compare import IDENTICAL
from quantize.config import QuantizeConfig, Target
from quantize.errors import QuantizeError
from quantize.fallback import Fallback
from quantize.int8 import Int8Model
from quantize.load import FloatModel
from quantize.prepare import PreparedModel
from quantize.prune import Pruned
from quantize.target import ArmGraph
from quantize.validate import Parts, Verdict
from quantize.verify import Verification

FORMAT: Final = 1
_MANY_ALARMS: Final = 0.2  # of good rows: ten times what a quantile threshold lets fail
_POOR_AUC: Final = 0.6
_BINS: Final = 40
_MOST_SHOWN: Final = 0.98  # of the scores fit the histogram, or more
_TIMES_THRESHOLD: Final = 1.5


def tools() -> dict[str, str]:
    """Versions that the bundle's bytes depend on."""
    return {
        "edge-inference": __version__,
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": runtime.VERSION,
    }


def member(
    config: QuantizeConfig,
    source: FloatModel,
    model: PreparedModel,
    int8: Int8Model,
    parts: Parts,
    verdict: Verdict,
    spread: float | None,
    fallback: Fallback | None,
    vectors: Vectors,
    pruned: Pruned,
    batch: int,
) -> dict[str, Any]:
    """``report.json``: every figure but times."""
    inputs = model.trim(parts.judgement).inputs
    feeds = next(runtime.batches(inputs, model.fixed_batch or 1))
    arm = target.arm_graph(int8.path, feeds, int8.path.with_suffix(".arm"))
    return {
        "format": FORMAT,
        "warnings": warnings_of(verdict),
        "model": {"name": config.name, "version": str(config.version), "command": config.command},
        "source": {"file": config.model.name, "digest": str(source.digest), "bytes": source.size},
        "data": {
            "calibration": config.calibration.name,
            "calibration_digest": str(parts.calibration.digest),
            "validation": config.validation.name if config.validation else None,
            "rows": {
                "calibration": len(parts.calibration),
                "ranges": len(parts.ranges),
                "selection": len(parts.selection),
                "judgement": len(parts.judgement),
            },
        },
        "prepare": {
            "impute": config.prepare.impute,
            "scale": config.prepare.scale,
            "task": model.task,
            "score": model.score,
            "notes": list(model.notes),
        },
        "int8": {
            "chosen": int8.name,
            "precision": int8.precision,
            "bytes": int8.size,
            "layers": len(int8.plan.layers),
            "candidates": int8.candidates,
            "predicted_seconds": int8.predicted_seconds,
            "predicted_seconds_fp32": int8.predicted_seconds_fp32,
            "layer_facts": _layer_facts(int8, inputs, batch),
            "kernels_on_arm64": verdict.kernels,
            "dense_or_conv_left_float": verdict.left_float,
        },
        "arm": _arm(config.target, arm),
        "pruning": None if not pruned.curve else _pruning(pruned),
        "comparison": verdict.comparison,
        "scores": _scores(model, int8, parts, verdict),
        "decision": None
        if verdict.threshold is None
        else {
            "threshold": verdict.threshold,
            "threshold_fp32": verdict.threshold_reference,
            "from": str(config.threshold),
            "spread": spread,
        },
        "fallback": None
        if fallback is None
        else {
            "votes": fallback.votes,
            "limits": len(fallback.rules.limits),
            "distance": fallback.rules.distance is not None,
            "alarm_rate_calibration": fallback.alarm_rate,
            "model_alarm_rate_calibration": fallback.model_alarm_rate,
            "agreement_with_model": fallback.agreement,
            "auc_against_model": fallback.auc_model,
            "auc": fallback.auc,
            "caught": fallback.caught,
            "false_alarms": fallback.false_alarms,
        },
        "golden": {
            "rows": vectors.rows,
            "agreement": vectors.golden.agreement,
            "absolute": vectors.golden.absolute,
            "relative": vectors.golden.relative,
            "spread_here": vectors.spread,
        },
        "tools": tools(),
    }


def _layer_facts(int8: Int8Model, inputs: Mapping[str, np.ndarray], batch: int) -> list[dict[str, Any]]:
    """What became of each layer, and how far its output is off in the written file."""
    errors: dict[str, float] = {}
    if int8.precision != "fp32":
        errors = verify.layer_errors(int8.graph, onnx.load(int8.path), inputs, batch)
    outputs = {layer.name: int8.graph.graph.node[layer.node].output[0] for layer in int8.plan.layers}
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "mode": layer.mode.value,
            "parameters": layer.parameters,
            "alone_sqnr": None if layer.alone_sqnr is None else round(layer.alone_sqnr, 2),
            "sqnr": errors.get(outputs.get(layer.name, "")),
            "why": layer.why,
        }
        for layer in int8.layers
    ]


def _arm(wanted: Target, arm: ArmGraph) -> dict[str, Any]:
    processor = target.PROCESSORS[wanted]
    return {
        "target": wanted.value,
        "board": processor.board,
        "mlas": processor.kernels,
        "int8_kernels": arm.int8_kernels,
        "exact_on_every_cpu": arm.pure,
        "bound": target.bound(arm.layers, wanted),
        "layers": arm.layers,
        "left_over": arm.left_over,
        "unexplained": arm.unexplained,
    }


def _pruning(pruned: Pruned) -> dict[str, Any]:
    return {
        "widths": [
            {"layer": name, "before": before, "after": after} for name, before, after in pruned.widths
        ],
        "curve": [
            {
                "share": round(point.share, 4),
                "bytes": point.bytes,
                "sqnr": point.comparison.sqnr,
                "agreement": point.comparison.agreement,
                "auc": point.comparison.auc,
                "distilled": point.distilled,
                "chosen": point is pruned.chosen,
            }
            for point in pruned.curve
        ],
    }


def _scores(model: PreparedModel, int8: Int8Model, parts: Parts, verdict: Verdict) -> dict[str, Any] | None:
    """Histogram of the held-out scores of the written file; the last bin holds what is beyond."""
    if model.score is None or verdict.threshold is None:
        return None
    rows = model.trim(parts.judgement)
    found = runtime.run_all(runtime.open_session(int8.path), rows.inputs, model.batch)[model.score]
    finite = found[np.isfinite(found)].astype(np.float64)
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    most = max(float(np.quantile(finite, _MOST_SHOWN)), _TIMES_THRESHOLD * verdict.threshold)
    cut = min(high, most) if verdict.threshold > 0 else high
    edges = np.linspace(low, cut if cut > low else low + 1.0, _BINS + 1)

    def count(values: np.ndarray) -> list[int]:
        counted, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        return [int(number) for number in counted]

    labels = rows.labels
    usable = np.isfinite(found)
    good = usable if labels is None else usable & ~labels
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "good": count(found[good]),
        "bad": None if labels is None else count(found[usable & labels]),
        "beyond": int((finite > edges[-1]).sum()),
        "threshold": verdict.threshold,
    }


def warnings_of(verdict: Verdict) -> list[str]:
    """What somebody should look at before publishing."""
    found = verdict.comparison
    warnings = []
    if found.false_alarms is not None and found.false_alarms > _MANY_ALARMS:
        warnings.append(
            f"{found.false_alarms:.0%} of the good rows of {verdict.judged_on} fail: do calibration and "
            "validation data have the same units?"
        )
    if found.auc is not None and found.auc < _POOR_AUC:
        warnings.append(
            f"ROC-AUC {found.auc:.2f} on {verdict.judged_on}: the model hardly tells bad from good"
        )
    return warnings


def timed(
    facts: Mapping[str, Any],
    bundle: Bundle,
    verdict: Verdict,
    durations: Mapping[str, float],
    verification: Verification | None = None,
) -> dict[str, Any]:
    """The report beside the bundle: ``facts`` and everything that differs from run to run."""
    latency = verdict.latency
    return {
        **facts,
        "bundle": {"digest": str(bundle.digest), "bytes": bundle.manifest.size},
        "latency": {
            "fp32_seconds": latency.fp32,
            "chosen_seconds": latency.chosen,
            "timed": latency.timed,
            "machine": latency.machine,
            "rows": latency.rows,
            "python": platform.python_version(),
        },
        "durations_seconds": dict(durations),
        "verification": None if verification is None else verification.facts,
    }


def table(
    config: QuantizeConfig,
    source: FloatModel,
    int8: Int8Model,
    verdict: Verdict,
    fallback: Fallback | None,
    bundle: Bundle,
) -> str:
    """Before and after, for the terminal."""
    latency, found = verdict.latency, verdict.comparison
    chosen = int8.precision.upper()
    lines = [
        ("", "FP32", chosen, ""),
        (
            "size",
            _bytes(source.size),
            _bytes(int8.size),
            page.ratio(source.size, int8.size, "smaller", "larger", "as large"),
        ),
        (
            "latency, one thread",
            _seconds(latency.fp32),
            _seconds(latency.chosen),
            page.ratio(latency.fp32, latency.chosen, "faster", "slower", "as fast")
            + f" on {latency.machine}",
        ),
    ]
    if found.auc is not None and found.auc_reference is not None:
        change = found.auc - found.auc_reference
        most = found.drops_high and f", others fall by {max(found.drops_high['auc'], 0):.4f} at most"
        lines.append(
            ("ROC-AUC", f"{found.auc_reference:.4f}", f"{found.auc:.4f}", f"{change:+.4f}{most or ''}")
        )
        lines.append(_shares("bad rows caught", found.caught_reference, found.caught))
        lines.append(_shares("false alarms", found.false_alarms_reference, found.false_alarms))
    if found.mean_score is not None and found.mean_score_reference is not None:
        lines.append(("mean score", f"{found.mean_score_reference:.5g}", f"{found.mean_score:.5g}", ""))
    if verdict.threshold is not None and verdict.threshold_reference is not None:
        before, after = f"{verdict.threshold_reference:.5g}", f"{verdict.threshold:.5g}"
        lines.append(("threshold", before, after, str(config.threshold)))
    same = found.sqnr_low is None or found.sqnr >= IDENTICAL
    low = "" if same else f", others above {found.sqnr_low:.1f} dB"
    lines.append(("SQNR", "", page.decibels(found.sqnr), f"signal to quantization noise{low}"))
    if found.agreement is not None:
        lines.append(("same decision", "", f"{found.agreement:.1%}", f"of {found.rows} rows"))
    if fallback is not None:
        detail = "" if fallback.auc is None else f", ROC-AUC {fallback.auc:.4f}"
        lines.append(("rules agree", "", f"{fallback.agreement:.1%}", f"with the model{detail}"))
    text = [f"{a:<20} {b:>12} {c:>12}   {d}".rstrip() for a, b, c, d in lines]
    text.append("")
    text += [f"  passed over: {tried.name}: {tried.problem}" for tried in int8.candidates if tried.problem]
    text += [f"  Warning: {warning}" for warning in warnings_of(verdict)]
    if int8.precision == "fp32":
        why = "No INT8 candidate was good enough" if int8.plan.layers else "Nothing in it can be INT8"
        text.append(f"  {why}: the bundle carries the FP32 model.")
    if int8.precision == "int8 weights":
        text.append("  Weights are INT8 in the file; it computes in FP32, at its speed and in its memory.")
    if latency.timed != "the bundle's model":
        text.append(f"  Latency of INT8 is that of {latency.timed}.")
    text.append(
        f"  Accuracy on {found.rows} rows of {verdict.judged_on} that had no part in making the model."
    )
    text.append(f"{bundle.manifest.name} {bundle.manifest.version}  {bundle.digest}")
    return "\n".join(text) + "\n"


def html(facts: Mapping[str, Any]) -> str:
    """``report.html`` of the facts beside a bundle."""
    plain: Mapping[str, Any] = json.loads(wire.to_json(facts))
    return page.render(plain)


# -- two bundles ------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The report of a bundle folder, its ``.tar``, or a ``.report.json``.

    The one beside the bundle is taken where it is, because it has the times.

    Raises:
        QuantizeError: there is none, or it is not ours.
    """
    name = path.name.removesuffix(".tar")
    beside = path.with_name(f"{name}.report.json")
    try:
        if path.suffix == ".json":
            data = path.read_bytes()
        elif beside.exists():
            data = beside.read_bytes()
        elif path.is_dir():
            data = (path / bundles.REPORT).read_bytes()
        else:
            with tarfile.open(path) as tar:
                member = tar.extractfile(bundles.REPORT)
                data = b"" if member is None else member.read()
        facts: dict[str, Any] = json.loads(data)
        if facts["format"] != FORMAT:
            raise QuantizeError(f"{path}: report of format {facts['format']}, this program reads {FORMAT}")
    except (OSError, KeyError, TypeError, ValueError, tarfile.TarError) as error:
        raise QuantizeError(f"{path}: no report of quantize-model: {runtime.one_line(error)}") from error
    return facts


def compare_facts(first: Path, second: Path) -> dict[str, Any]:
    """What differs between two bundles: ``{"a", "b", "rows": [{"what", "a", "b"}]}``.

    Raises:
        QuantizeError: one of them has no report.
    """
    a, b = read(first), read(second)
    rows = []
    for what, path in _COMPARED:
        values = [_at(facts, path) for facts in (a, b)]
        if any(value is not None for value in values):
            rows.append({"what": what, "a": values[0], "b": values[1]})
    before, after = (_layers_of(facts) for facts in (a, b))
    rows += [
        {"what": f"layer {name}", "a": before.get(name), "b": after.get(name)}
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return {"a": str(first), "b": str(second), "rows": rows}


_COMPARED: Final = (
    ("model", ("model", "name")),
    ("version", ("model", "version")),
    ("bundle", ("bundle", "digest")),
    ("source", ("source", "digest")),
    ("calibration data", ("data", "calibration_digest")),
    ("chosen", ("int8", "chosen")),
    ("bytes of model.onnx", ("int8", "bytes")),
    ("seconds a row here", ("latency", "chosen_seconds")),
    ("seconds a row, cost model", ("int8", "predicted_seconds")),
    ("SQNR, dB", ("comparison", "sqnr")),
    ("same decision as FP32", ("comparison", "agreement")),
    ("ROC-AUC", ("comparison", "auc")),
    ("bad rows caught", ("comparison", "caught")),
    ("false alarms", ("comparison", "false_alarms")),
    ("threshold", ("decision", "threshold")),
    ("rules agree", ("fallback", "agreement_with_model")),
    ("int8 kernels on ARM64", ("arm", "int8_kernels")),
    ("layers in float on ARM64", ("int8", "dense_or_conv_left_float")),
    ("bytes touched a row", ("arm", "bound", "bytes")),
    ("golden vectors", ("golden", "agreement")),
)


def compare_bundles(first: Path, second: Path) -> str:
    """A table of what differs between two bundles; what is the same is marked ``=``.

    Raises:
        QuantizeError: one of them has no report.
    """
    rows = [("", str(first), str(second), "")]
    for row in compare_facts(first, second)["rows"]:
        a, b = row["a"], row["b"]
        change = "=" if a == b else ""
        if a != b and isinstance(a, int | float) and isinstance(b, int | float) and a:
            change = f"{b - a:+.4g} ({(b - a) / abs(a):+.1%})"
        rows.append((row["what"], _shown(a), _shown(b), change))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines) + "\n"


def _at(facts: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = facts
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _layers_of(facts: Mapping[str, Any]) -> dict[str, str]:
    layers = facts.get("int8", {}).get("layer_facts") or ()
    return {layer["name"]: f"{layer['mode']}, {layer['parameters']} weights" for layer in layers}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text[7:19] if text.startswith("sha256:") else text


def _shares(name: str, before: float | None, after: float | None) -> tuple[str, str, str, str]:
    return (name, "" if before is None else f"{before:.1%}", "" if after is None else f"{after:.1%}", "")


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1_000_000 else f"{size / 1e3:.0f} kB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
