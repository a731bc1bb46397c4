"""What ``quantize-model`` was asked to do. Parsed at the edge (``cli.py``), passed on in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from edge_agent.contract.version import Version


class Impute(StrEnum):
    """What stands in for a missing value (NaN), per feature of the calibration data."""

    AUTO = "auto"  # what the model itself puts in its place, if it does; else the median
    MEDIAN = "median"
    MEAN = "mean"
    CONSTANT = "constant"  # one number for all: PrepareConfig.constant
    NONE = "none"


class Scale(StrEnum):
    """How raw numbers become what the model was trained on, per feature of the calibration data."""

    STANDARD = "standard"  # (x - mean) / standard deviation
    MINMAX = "minmax"  # (x - min) / (max - min)
    ROBUST = "robust"  # (x - median) / (75 % quantile - 25 % quantile)
    NONE = "none"  # the model takes raw numbers


class Score(StrEnum):
    """How the output becomes one score a row."""

    AUTO = "auto"  # MSE if the output has the input's shape, else as NONE
    MSE = "mse"  # mean squared reconstruction error against the scaled input
    MAE = "mae"  # mean absolute one
    WEIGHTED = "weighted"  # mean squared one, each feature by what is usual for it on calibration rows
    SOFTMAX = "softmax"  # the model's output is logits: probabilities; with a fail class its probability
    ARGMAX = "argmax"  # the chosen class; with a fail class 1 where it is chosen, else 0
    NONE = "none"  # a single-valued output is the score; without one the task is raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Where pass ends: a quantile of calibration scores, a number, or what held-out rows ask for.

    ``fpr`` takes good rows, ``f1`` and ``cost`` need labelled ones; none sees a row of the final judgement.
    """

    quantile: float | None = 0.995
    value: float | None = None
    fpr: float | None = None  # share of good rows that may fail
    f1: bool = False
    cost: tuple[float, float] | None = None  # of a bad row passed, of a good row failed

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read ``quantile:Q``, ``fpr:X``, ``f1``, ``cost:FN/FP`` or a number.

        Raises:
            ValueError: none of them; says what is expected.
        """
        kind, _, argument = text.partition(":")
        try:
            if text == "f1":
                return cls(quantile=None, f1=True)
            if kind == "cost":
                missed, _, alarm = argument.partition("/")
                cost = (float(missed), float(alarm))
                if all(0 < each < float("inf") for each in cost):
                    return cls(quantile=None, cost=cost)
            elif kind in ("quantile", "fpr"):
                share = float(argument)
                if 0 < share < 1:
                    return cls(quantile=share) if kind == "quantile" else cls(quantile=None, fpr=share)
            elif abs(float(text)) < float("inf"):
                return cls(quantile=None, value=float(text))
        except ValueError:
            pass
        raise ValueError(
            f"threshold {text!r}: expected quantile:Q or fpr:X with 0 < Q, X < 1, f1, cost:FN/FP (of a bad "
            "row passed and of a good row failed), or a number"
        )

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.value:g}"
        if self.cost is not None:
            return f"cost:{self.cost[0]:g}/{self.cost[1]:g}"
        if self.f1:
            return "f1"
        return f"fpr:{self.fpr:g}" if self.fpr is not None else f"quantile:{self.quantile:g}"

    @property
    def needs_labels(self) -> bool:
        """Whether only labelled rows can tell."""
        return self.f1 or self.cost is not None


class Metric(StrEnum):
    """What the accuracy budget is about."""

    AUTO = "auto"  # auc where there are labels and a score, else sqnr or agreement, whichever is reached
    AUC = "auc"  # area under the ROC curve
    AP = "ap"  # average precision
    ACCURACY = "accuracy"  # of the decisions, each model's with its own threshold
    F1 = "f1"
    SQNR = "sqnr"  # signal to quantization noise of the score, or of the worst output
    AGREEMENT = "agreement"  # share of rows with the same decision, or the same largest class

    @property
    def needs_labels(self) -> bool:
        """Whether only labelled validation rows can tell."""
        return self in (Metric.AUC, Metric.AP, Metric.ACCURACY, Metric.F1)


@dataclass(frozen=True)  # no slots: the command line reads the defaults from the class
class Budget:
    """How far an INT8 candidate may be from the FP32 reference.

    A metric of labelled rows may fall by ``max_auc_drop``. Else the signal-to-quantization-noise ratio of the
    score must reach ``min_sqnr``, or the decisions of both models agree on ``min_agreement`` of the rows.
    """

    metric: Metric = Metric.AUTO

    min_sqnr: float = 25.0  # dB: 5 % noise, below the spread of scores of one population
    min_agreement: float = 0.99
    max_auc_drop: float = 0.01

    @staticmethod
    def parse_drop(text: str) -> float:
        """Read how far a metric may fall: 0 to 1.

        Raises:
            ValueError: another number, or none; says what is expected.
        """
        return _between(text, 0.0, 1.0, "a number from 0 to 1, such as 0.01")

    @staticmethod
    def parse_sqnr(text: str) -> float:
        """Read an SQNR in dB.

        Raises:
            ValueError: no finite number; says what is expected.
        """
        return _between(text, -200.0, 200.0, "decibels, such as 25")


def _between(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ValueError(f"{text!r}: expected {expected}")
    return value


class Target(StrEnum):
    """The processor the bundle is for."""

    CORTEX_A53 = "cortex-a53"
    CORTEX_A72 = "cortex-a72"
    CORTEX_A76 = "cortex-a76"
    NEOVERSE_N1 = "neoverse-n1"
    GENERIC_ARM64 = "generic-arm64"
    X86_64 = "x86-64"


_UNITS: Final = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkConfig:
    """How much smaller than INT8 alone: structured pruning, within the accuracy budget."""

    prune: float | Literal["auto"] | None = None  # share of the weights to remove
    target_size: int | None = None  # bytes of model.onnx; prunes as much as that needs

    @property
    def wanted(self) -> bool:
        """Whether anything is to be pruned."""
        return self.prune is not None or self.target_size is not None

    @staticmethod
    def parse_prune(text: str) -> float | Literal["auto"] | None:
        """Read ``none``, ``auto`` or a share of the weights to remove.

        Raises:
            ValueError: none of them; says what is expected.
        """
        if text == "none":
            return None
        if text == "auto":
            return "auto"
        try:
            share = float(text)
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise ValueError(
                f"prune {text!r}: expected none, auto or a share of the weights to remove, 0 < SHARE < 1"
            )
        return share

    @staticmethod
    def parse_size(text: str) -> int:
        """Read ``12MB``, ``300kB``, ``1.5MiB`` or a number of bytes.

        Raises:
            ValueError: none of them; says what is expected.
        """
        number = text.rstrip("kKMGiB")
        factor = _UNITS.get(text[len(number) :].strip())
        try:
            size = float(number) * (factor or float("nan"))
        except ValueError:
            size = float("nan")
        if not 0 < size < float("inf"):
            raise ValueError(f"size {text!r}: expected a number and kB, MB, KiB or MiB, such as 12MB")
        return int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """What becomes part of the graph."""

    impute: Impute = Impute.AUTO
    constant: float = 0.0  # what stands in with Impute.CONSTANT
    scale: Scale = Scale.NONE
    score: Score = Score.AUTO
    fail_class: int | None = None  # of a classifier: the class whose probability is the score

    @property
    def impute_text(self) -> str:
        """As the command line takes it."""
        return f"constant:{self.constant:g}" if self.impute is Impute.CONSTANT else self.impute

    @staticmethod
    def parse_impute(text: str) -> tuple[Impute, float]:
        """Read ``auto``, ``median``, ``mean``, ``none`` or ``constant:VALUE``.

        Raises:
            ValueError: none of them; says what is expected.
        """
        kind, _, argument = text.partition(":")
        try:
            if kind == Impute.CONSTANT and abs(float(argument)) < float("inf"):
                return Impute.CONSTANT, float(argument)
            if kind != Impute.CONSTANT:
                return Impute(text), 0.0
        except ValueError:
            pass
        raise ValueError(f"impute {text!r}: expected auto, median, mean, constant:VALUE or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """One run of ``quantize-model``."""

    model: Path
    calibration: Path
    name: str
    version: Version
    out: Path
    validation: Path | None = None
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    threshold: Threshold = field(default_factory=Threshold)
    budget: Budget = field(default_factory=Budget)
    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)
    target: Target = Target.GENERIC_ARM64
    fast: bool = False  # fewer candidates, no recovery
    settings: Mapping[str, float] = field(default_factory=dict)  # inputs that become constants
    trust: bool = False  # read files that can run code: pickles
    emulate: Path | None = None  # an aarch64 Python that runs the golden vectors, too
    overwrite: bool = False  # of an existing version with another content

    @property
    def command(self) -> str:
        """The command that makes the same bundle again: file names without folders, no output folder."""
        words = ["quantize-model", self.model.name, "--calibration", self.calibration.name]
        if self.validation:
            words += ["--validation", self.validation.name]
        words += ["--name", self.name, "--version", str(self.version)]
        for name, value in sorted(self.settings.items()):
            words += ["--set", f"{name}={value:g}"]
        words += ["--trust"] if self.trust else []
        words += ["--impute", self.prepare.impute_text, "--scale", self.prepare.scale]
        words += ["--score", self.prepare.score]
        if self.prepare.fail_class is not None:
            words += ["--fail-class", str(self.prepare.fail_class)]
        words += [f"--threshold={self.threshold}"]
        if self.budget.metric is not Metric.AUTO:
            words += ["--metric", self.budget.metric]
        words += ["--fast"] if self.fast else []
        words += ["--min-sqnr", f"{self.budget.min_sqnr:g}", "--max-drop", f"{self.budget.max_auc_drop:g}"]
        if self.shrink.prune is not None:
            words += ["--prune", str(self.shrink.prune)]
        if self.shrink.target_size is not None:
            words += ["--target-size", str(self.shrink.target_size)]
        if self.target is not Target.GENERIC_ARM64:
            words += ["--target", self.target]
        return " ".join(words)
