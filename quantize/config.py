"""What ``quantize-model`` was asked to do. Parsed at the edge (``cli.py``), passed on in parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from edge_agent.contract.version import Version


class Impute(StrEnum):
    """What stands in for a missing value (NaN), per feature of the calibration data."""

    MEDIAN = "median"
    MEAN = "mean"
    NONE = "none"


class Scale(StrEnum):
    """How raw numbers become what the model was trained on, per feature of the calibration data."""

    STANDARD = "standard"  # (x - mean) / standard deviation
    MINMAX = "minmax"  # (x - min) / (max - min)
    NONE = "none"  # the model takes raw numbers


class Score(StrEnum):
    """How the output becomes one score a row."""

    AUTO = "auto"  # MSE if the output has the input's shape, else as NONE
    MSE = "mse"  # mean squared reconstruction error against the scaled input
    NONE = "none"  # a single-valued output is the score; without one the task is raw


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where pass ends: a quantile of the calibration scores, or a number."""

    quantile: float | None = 0.995
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read ``quantile:Q`` or a number.

        Raises:
            ValueError: neither; says what is expected.
        """
        kind, _, argument = text.partition(":")
        try:
            number = float(argument) if kind == "quantile" else float(text)
        except ValueError:
            number = float("nan")
        if kind == "quantile" and 0 < number < 1:
            return cls(quantile=number)
        if kind != "quantile" and abs(number) < float("inf"):
            return cls(quantile=None, value=number)
        raise ValueError(f"threshold {text!r}: expected quantile:Q with 0 < Q < 1, or a number")

    def __str__(self) -> str:
        return f"quantile:{self.quantile:g}" if self.quantile is not None else f"{self.value:g}"


@dataclass(frozen=True)  # no slots: the command line reads the defaults from the class
class Budget:
    """How far an INT8 candidate may be from the FP32 reference. The first candidate inside wins.

    With labels: the AUC may fall by ``max_auc_drop``. Without: the signal-to-quantization-noise ratio of the
    score must reach ``min_sqnr``, or the decisions of both models agree on ``min_agreement`` of the rows.
    """

    min_sqnr: float = 25.0  # dB: 5 % noise, below the spread of scores of one population
    min_agreement: float = 0.99
    max_auc_drop: float = 0.01


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

    impute: Impute = Impute.MEDIAN
    scale: Scale = Scale.NONE
    score: Score = Score.AUTO


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
    overwrite: bool = False  # of an existing version with another content

    @property
    def command(self) -> str:
        """The command that makes the same bundle again: file names without folders, no output folder."""
        words = ["quantize-model", self.model.name, "--calibration", self.calibration.name]
        if self.validation:
            words += ["--validation", self.validation.name]
        words += ["--name", self.name, "--version", str(self.version)]
        words += ["--impute", self.prepare.impute, "--scale", self.prepare.scale]
        words += ["--score", self.prepare.score, "--threshold", str(self.threshold)]
        words += ["--min-sqnr", f"{self.budget.min_sqnr:g}", "--max-drop", f"{self.budget.max_auc_drop:g}"]
        return " ".join(words)
