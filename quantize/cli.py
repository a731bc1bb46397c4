"""``quantize-model``: FP32 ONNX model in, INT8 bundle out.

Exit codes: 0 the bundle is written, 1 an expected failure (one line on stderr, nothing left behind), 2 wrong
usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.contract import wire
from edge_agent.contract.manifest import check_name
from edge_agent.contract.version import Version
from quantize.config import Budget, Impute, PrepareConfig, QuantizeConfig, Scale, Score, Threshold
from quantize.errors import QuantizeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    config = QuantizeConfig(
        model=arguments.model,
        calibration=arguments.calibration,
        validation=arguments.validation,
        name=arguments.name,
        version=arguments.version,
        out=arguments.out,
        prepare=PrepareConfig(impute=arguments.impute, scale=arguments.scale, score=arguments.score),
        threshold=arguments.threshold,
        budget=Budget(min_sqnr=arguments.min_sqnr, max_auc_drop=arguments.max_drop),
        overwrite=arguments.overwrite,
    )
    try:
        # onnx and onnxruntime take half a second to import: --help and wrong usage do not wait for them.
        from quantize.pipeline import StepLog, build

        built = build(config, StepLog(io.StringIO() if arguments.quiet else sys.stderr))
    except QuantizeError as error:
        sys.stderr.write(f"quantize-model: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nquantize-model: interrupted, nothing was written\n")
        return 130
    if arguments.json:
        sys.stdout.write(wire.to_json(built.facts).decode())
    else:
        sys.stdout.write(f"\n{built.table}{built.folder}\n{built.tar}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize-model",
        description="Turn an FP32 ONNX model into an INT8 bundle for edge-agent: DIR/NAME-VERSION/ and .tar.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.onnx", help="the FP32 model")
    add("--calibration", type=Path, required=True, metavar="DATA", help="good rows: .npz, .npy or .csv")
    add("--validation", type=Path, metavar="DATA", help="held-out rows, with labels y (1 = bad) if there are")
    add("--name", type=_checked(check_name), required=True, help="the model's name")
    add("--version", type=_checked(Version), required=True, help="MAJOR.MINOR.PATCH")
    add("--out", type=Path, required=True, metavar="DIR", help="where the bundle is written")
    add(
        "--impute",
        type=_checked(Impute),
        default=Impute.MEDIAN,
        metavar="|".join(Impute),
        help="what stands in for a missing value (default: median)",
    )
    add(
        "--scale",
        type=_checked(Scale),
        default=Scale.NONE,
        metavar="|".join(Scale),
        help="how raw numbers are scaled before the model (default: none)",
    )
    add(
        "--score",
        type=_checked(Score),
        default=Score.AUTO,
        metavar="|".join(Score),
        help="mse: reconstruction error; none: the model's own output (default: auto)",
    )
    add(
        "--threshold",
        type=_checked(Threshold.parse),
        default=Threshold(),
        metavar="quantile:Q|VALUE",
        help="scores above it fail (default: quantile:0.995 of the calibration scores)",
    )
    add(
        "--min-sqnr", type=float, default=Budget.min_sqnr, metavar="DB", help="accuracy budget without labels"
    )
    add(
        "--max-drop",
        type=float,
        default=Budget.max_auc_drop,
        metavar="AUC",
        help="accuracy budget with labels",
    )
    add("--overwrite", action="store_true", help="replace an existing version of another content")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _checked(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter whose message reaches the user (argparse hides those of ValueError)."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


if __name__ == "__main__":
    sys.exit(main())
