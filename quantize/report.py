"""Step 7: say what was done and measured.

Two forms of the same facts: ``report.json`` in the bundle, which holds nothing that differs between two runs
of the same command, and ``N-V.report.json`` beside it, which adds digest, latencies, durations and machine.
The table is for the terminal.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx

from edge_agent import __version__
from edge_agent.contract.bundle import Bundle
from quantize import runtime
from quantize.bundle import Vectors
from quantize.config import QuantizeConfig
from quantize.fallback import Fallback
from quantize.int8 import Int8Model
from quantize.load import FloatModel
from quantize.prepare import PreparedModel
from quantize.validate import Parts, Verdict

FORMAT: Final = 1
_MANY_ALARMS: Final = 0.2  # of good rows: ten times what a quantile threshold lets fail
_POOR_AUC: Final = 0.6


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
) -> dict[str, Any]:
    """``report.json``: every figure but times."""
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
            "kernels_on_arm64": verdict.kernels,
            "dense_or_conv_left_float": verdict.left_float,
        },
        "comparison": verdict.comparison,
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
    facts: Mapping[str, Any], bundle: Bundle, verdict: Verdict, durations: Mapping[str, float]
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
    chosen = "INT8" if int8.precision == "int8" else "FP32"
    lines = [
        ("", "FP32", chosen, ""),
        ("size", _bytes(source.size), _bytes(int8.size), f"{source.size / int8.size:.1f}x smaller"),
        (
            "latency, one thread",
            _seconds(latency.fp32),
            _seconds(latency.chosen),
            f"{latency.fp32 / latency.chosen:.1f}x faster on {latency.machine}",
        ),
    ]
    if found.auc is not None and found.auc_reference is not None:
        change = found.auc - found.auc_reference
        lines.append(("ROC-AUC", f"{found.auc_reference:.4f}", f"{found.auc:.4f}", f"{change:+.4f}"))
        lines.append(_shares("bad rows caught", found.caught_reference, found.caught))
        lines.append(_shares("false alarms", found.false_alarms_reference, found.false_alarms))
    if found.mean_score is not None and found.mean_score_reference is not None:
        lines.append(("mean score", f"{found.mean_score_reference:.5g}", f"{found.mean_score:.5g}", ""))
    if verdict.threshold is not None and verdict.threshold_reference is not None:
        before, after = f"{verdict.threshold_reference:.5g}", f"{verdict.threshold:.5g}"
        lines.append(("threshold", before, after, str(config.threshold)))
    lines.append(("SQNR", "", f"{found.sqnr:.1f} dB", "signal to quantization noise"))
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
        text.append("  No INT8 candidate was good enough: the bundle carries the FP32 model.")
    if latency.timed != "the bundle's model":
        text.append(f"  Latency of INT8 is that of {latency.timed}.")
    text.append(
        f"  Accuracy on {found.rows} rows of {verdict.judged_on} that had no part in making the model."
    )
    text.append(f"{bundle.manifest.name} {bundle.manifest.version}  {bundle.digest}")
    return "\n".join(text) + "\n"


def _shares(name: str, before: float | None, after: float | None) -> tuple[str, str, str, str]:
    return (name, "" if before is None else f"{before:.1%}", "" if after is None else f"{after:.1%}", "")


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1_000_000 else f"{size / 1e3:.0f} kB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
