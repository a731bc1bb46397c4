"""The example's data: breast-cancer measurements that ship inside scikit-learn; benign counts as good.

569 rows, 30 features of cell nuclei, 357 benign and 212 malignant (UCI "Breast Cancer Wisconsin
(Diagnostic)", CC BY 4.0). It stands in for test equipment: plenty of good units, few bad ones, features of
very different scales, heavy tails. The split is the same on every machine and its parts share no row:

    good rows, shuffled once:  150 train | 110 calibrate | 97 hold out, with all 212 bad rows

Run ``python -m examples.dataset FOLDER`` to write the ``.npz`` files that ``quantize-model`` reads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

TRAIN_ROWS: Final = 150
CALIBRATION_ROWS: Final = 110
_SPLIT_SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Split:
    """The data set in three disjoint parts. Rows are float32, (n, 30); labels are 1 for bad."""

    features: tuple[str, ...]
    train: np.ndarray  # good rows only
    calibration: np.ndarray  # good rows only
    held_out: np.ndarray  # good and bad rows, shuffled
    labels: np.ndarray  # of held_out, int64: 1 = bad


def load() -> Split:
    """The split, the same on every machine."""
    from sklearn.datasets import load_breast_cancer  # slow to import; only the demo and the tests have it

    source = load_breast_cancer()
    rows = source.data.astype(np.float32)
    bad = source.target == 0  # scikit-learn: 0 = malignant
    random = np.random.default_rng(_SPLIT_SEED)
    good = random.permutation(np.flatnonzero(~bad))
    train, calibration, rest = np.split(good, [TRAIN_ROWS, TRAIN_ROWS + CALIBRATION_ROWS])
    held_out = random.permutation(np.concatenate([rest, np.flatnonzero(bad)]))
    return Split(
        features=tuple(str(name).replace(" ", "_") for name in source.feature_names),
        train=rows[train],
        calibration=rows[calibration],
        held_out=rows[held_out],
        labels=bad[held_out].astype(np.int64),
    )


def with_missing(rows: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """A copy of ``rows`` in which about ``share`` of the values are NaN, as from broken sensors."""
    holes = np.random.default_rng(seed).random(rows.shape) < share
    return np.where(holes, np.float32("nan"), rows).astype(np.float32)


def write_calibration(path: Path, *, factor: float = 1.0, missing: float = 0.0) -> Path:
    """Write the calibration rows as ``.npz`` (``X``, ``feature_names``).

    Args:
        path: the file to write.
        factor: what every value is multiplied with; anything but 1 is data in wrong units.
        missing: share of the values that become NaN.
    """
    split = load()
    rows = with_missing(split.calibration * np.float32(factor), missing)
    np.savez(path, X=rows, feature_names=np.array(split.features))
    return path


def write_validation(path: Path) -> Path:
    """Write the held-out rows with their labels as ``.npz`` (``X``, ``y``, ``feature_names``)."""
    split = load()
    np.savez(path, X=split.held_out, y=split.labels, feature_names=np.array(split.features))
    return path


def main() -> int:
    """Write calibration.npz, calibration_wrong_units.npz and validation.npz into a folder."""
    parser = argparse.ArgumentParser(prog="python -m examples.dataset", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in (
        write_calibration(folder / "calibration.npz"),
        write_calibration(folder / "calibration_wrong_units.npz", factor=0.25),
        write_validation(folder / "validation.npz"),
    ):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
