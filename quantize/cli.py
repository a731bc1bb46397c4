"""``quantize-model``: FP32 ONNX model in, INT8 bundle out.

Exit codes: 0 the bundle is written (or what was asked is printed), 1 an expected failure (one line on stderr,
nothing left behind), 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

# Two batches or candidates run at a time; threads of numpy's BLAS inside each of them would wait for cores by
# spinning (thirteen times the processor time, measured beside other programs), and their number would be in
# the last bits of the weights.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from edge_agent.contract import wire
from edge_agent.contract.manifest import check_name
from edge_agent.contract.version import Version
from quantize import interrupts
from quantize.config import (
    Budget,
    Metric,
    PrepareConfig,
    QuantizeConfig,
    Scale,
    Score,
    ShrinkConfig,
    Target,
    Threshold,
)
from quantize.errors import QuantizeError

# onnx and onnxruntime take half a second to import: --help and wrong usage do not wait for them, so each
# command imports what it runs.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_usage(parser, arguments)
    try:
        if arguments.inspect:
            return _inspect(arguments)
        if arguments.compare:
            return _compare(arguments)
        if arguments.verify:
            return _verify(arguments)
        return _build(arguments)
    except QuantizeError as error:
        sys.stderr.write(f"quantize-model: {error}\n")
        return 1
    except BrokenPipeError:  # of stdout: whoever read it has seen enough
        raise
    except OSError as error:
        where = error.filename or "temporary files (TMPDIR says where)"
        sys.stderr.write(f"quantize-model: {where}: {error.strerror or error}\n")
        return 1
    except Exception as error:
        # A model or data that nobody thought of: our fault, but the command keeps its promises.
        if os.environ.get("EDGE_TRACEBACK"):
            raise
        sys.stderr.write(f"quantize-model: {_unexpected(error)}\n")
        return 1
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(interrupts.line_of(interrupt))
        return interrupts.exit_code_of(interrupt)


def _unexpected(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return (
        f"a fault of quantize-model, nothing was written ({text}): please report it with the model; "
        "EDGE_TRACEBACK=1 shows where"
    )


def _build(arguments: argparse.Namespace) -> int:
    from quantize.pipeline import StepLog, build

    with interrupts.raised():
        built = build(_config(arguments), StepLog(io.StringIO() if arguments.quiet else sys.stderr))
    if arguments.json:
        sys.stdout.write(wire.to_json(built.facts).decode())
    else:
        sys.stdout.write(f"\n{built.table}{built.folder}\n{built.tar}\n")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from quantize.inspect import facts_of, text_of

    with interrupts.raised():
        facts = facts_of(arguments.model, dict(arguments.settings), trust=arguments.trust)
    sys.stdout.write(wire.to_json(facts).decode() if arguments.json else text_of(facts))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from quantize import report

    if arguments.json:
        sys.stdout.write(wire.to_json(report.compare_facts(*arguments.compare)).decode())
    else:
        sys.stdout.write(f"{report.compare_bundles(*arguments.compare)}\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from quantize.verify import verify_bundle

    with interrupts.raised():
        verified = verify_bundle(arguments.verify, emulate=arguments.emulate)
    sys.stdout.write(f"{verified.text}\n")
    return 1 if verified.failed else 0


def _config(arguments: argparse.Namespace) -> QuantizeConfig:
    threshold = arguments.threshold
    if threshold is None:
        # A classifier chooses the class it finds more probable than all others together.
        threshold = Threshold() if arguments.fail_class is None else Threshold(quantile=None, value=0.5)
    impute, constant = arguments.impute
    return QuantizeConfig(
        model=arguments.model,
        calibration=arguments.calibration,
        validation=arguments.validation,
        name=arguments.name,
        version=arguments.version,
        out=arguments.out,
        prepare=PrepareConfig(
            impute=impute,
            constant=constant,
            scale=arguments.scale,
            score=arguments.score,
            fail_class=arguments.fail_class,
        ),
        threshold=threshold,
        budget=Budget(metric=arguments.metric, min_sqnr=arguments.min_sqnr, max_auc_drop=arguments.max_drop),
        shrink=ShrinkConfig(prune=arguments.prune, target_size=arguments.target_size),
        target=arguments.target,
        fast=arguments.fast,
        settings=dict(arguments.settings),
        trust=arguments.trust,
        emulate=arguments.emulate,
        overwrite=arguments.overwrite,
    )


def _check_usage(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What argparse cannot say: each command has arguments of its own."""
    asked = [name for name in ("inspect", "compare", "verify") if getattr(arguments, name)]
    if len(asked) > 1:
        parser.error(f"--{asked[0]} and --{asked[1]} are commands of their own: give one of them")
    for path in (arguments.model, arguments.calibration, arguments.validation):
        if path is not None and not _is_text(path.name):
            parser.error(f"{path!a}: its name is not UTF-8, and it goes into the report: rename it")
    if arguments.out is not None and not _is_text(str(arguments.out.absolute())):
        parser.error(f"argument --out: {arguments.out!a} is not UTF-8, which onnxruntime needs")
    if arguments.emulate and not os.access(arguments.emulate, os.X_OK):
        parser.error(f"argument --emulate: {arguments.emulate} is no program that can be run")
    other = arguments.compare or arguments.verify
    if arguments.model is None and not other:
        parser.error("the following arguments are required: MODEL")
    if other or arguments.inspect:
        return
    needed = ("calibration", "name", "version", "out")
    missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize-model",
        description="Turn an FP32 ONNX model into an INT8 bundle for edge-agent: DIR/NAME-VERSION/ and .tar.",
        allow_abbrev=False,
    )
    bundle = parser.add_argument_group("the bundle")
    add = bundle.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL", help="FP32: .onnx, or .joblib, .skops, .pt2")
    add("--calibration", type=Path, metavar="DATA", help="good rows: .npz, .npy, .csv or a folder of .npz")
    add("--validation", type=Path, metavar="DATA", help="held-out rows, with labels y (1 = bad) if there are")
    add("--name", type=_checked(check_name), help="the model's name")
    add("--version", type=_checked(Version), help="MAJOR.MINOR.PATCH")
    add("--out", type=Path, metavar="DIR", help="where the bundle is written")
    add("--overwrite", action="store_true", help="replace an existing version of another content")

    add = parser.add_argument_group("what goes into the graph").add_argument
    add(
        "--set",
        type=_checked(_setting),
        action="append",
        default=[],
        dest="settings",
        metavar="INPUT=VALUE",
        help="make an input a constant; If nodes that ask for it become the branch they take",
    )
    add(
        "--impute",
        type=_checked(PrepareConfig.parse_impute),
        default=PrepareConfig.parse_impute("auto"),
        metavar="auto|median|mean|constant:VALUE|none",
        help="what stands in for a missing value (default: what the model has for it, else the median)",
    )
    add(
        "--scale",
        type=_one_of(Scale),
        default=Scale.NONE,
        metavar="|".join(Scale),
        help="how raw numbers are scaled before the model (default: none)",
    )
    add(
        "--score",
        type=_one_of(Score),
        default=Score.AUTO,
        metavar="|".join(Score),
        help="mse, mae, weighted: reconstruction error; softmax, argmax: classes; none: the model's "
        "own output (default: auto)",
    )
    add("--fail-class", type=int, metavar="K", help="of a classifier: rows of class K (from 0) fail")
    add(
        "--threshold",
        type=_checked(Threshold.parse),
        metavar="quantile:Q|fpr:X|f1|cost:FN/FP|VALUE",
        help="scores above it fail (default: quantile:0.995 of calibration scores; 0.5 with --fail-class)",
    )

    add = parser.add_argument_group("how accurate, how small").add_argument
    add(
        "--metric",
        type=_one_of(Metric),
        default=Metric.AUTO,
        metavar="|".join(Metric),
        help="what the budget is about (default: auc where there are labels, else sqnr or 99 %% agreement)",
    )
    add(
        "--max-drop",
        type=_checked(Budget.parse_drop),
        default=Budget.max_auc_drop,
        metavar="DROP",
        help="how far a metric of labelled rows may fall (default: 0.01)",
    )
    add(
        "--min-sqnr",
        type=_checked(Budget.parse_sqnr),
        default=Budget.min_sqnr,
        metavar="DB",
        help="least signal to quantization noise without labels (default: 25)",
    )
    add("--fast", action="store_true", help="fewer candidates, no recovery: seconds instead of a minute")
    add(
        "--prune",
        type=_checked(ShrinkConfig.parse_prune),
        metavar="none|auto|SHARE",
        help="share of the weights to remove (default: none)",
    )
    add(
        "--target-size",
        type=_checked(ShrinkConfig.parse_size),
        metavar="SIZE",
        help="largest model.onnx, such as 12MB: prunes as much as that needs",
    )
    add(
        "--target",
        type=_one_of(Target),
        default=Target.GENERIC_ARM64,
        metavar="|".join(Target),
        help="the processor that it must not be slower on than FP32 (default: generic-arm64)",
    )

    add = parser.add_argument_group("other commands").add_argument
    add("--inspect", action="store_true", help="say what MODEL is and what can be done with it")
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two bundles or reports, figure by figure")
    add("--verify", type=Path, metavar="BUNDLE", help="run a bundle's golden vectors here")
    add("--emulate", type=Path, metavar="PYTHON", help="run golden vectors under this aarch64 Python, too")
    add("--trust", action="store_true", help="read files that can run code (.joblib, .pkl, .pt2)")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not name or not abs(number) < float("inf"):
        raise ValueError(f"set {text!r}: expected INPUT=VALUE with a number, such as sr=16000")
    return name, number


def _is_text(name: str) -> bool:
    """Whether a file name that Python was given as bytes is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_of(kind: type[StrEnum]) -> Callable[[str], Any]:
    """A converter to one of a few words."""

    def chosen(text: str) -> StrEnum:
        if text not in list(kind):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(kind)}")
        return kind(text)

    return chosen


def _checked(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter whose message reaches the user (argparse hides those of ValueError)."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted
