"""A small autoencoder and its calibration data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.quantize import models


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    return models.autoencoder(tmp_path / "ae.onnx")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    return models.write_rows(
        tmp_path / "calibration.npz", models.rows(200), feature_names=np.array(models.NAMES)
    )
