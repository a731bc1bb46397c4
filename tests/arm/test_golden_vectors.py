"""Golden vectors on emulated ARM64 processors, with the aarch64 wheel of onnxruntime (``make test-arm``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent.contract import golden
from edge_agent.contract.golden import Agreement
from examples import dataset
from examples.train_autoencoder import OUTPUT
from quantize.cli import main
from quantize.verify import Verification, verify_bundle
from tests.quantize import models

SHARED = Path(os.environ.get("EDGE_SHARED_DATA", Path(__file__).parents[2].parent / "shared")) / "data"
CPUS = ("cortex-a53", "cortex-a76", "max")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def lane() -> Path:
    """The emulated Python that ``tests/arm/lane.sh`` made."""
    found = os.environ.get("EDGE_ARM_LANE")
    if not found:
        pytest.skip("emulated ARM64 takes minutes: make test-arm")
    return Path(found) / "py"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    calibration = dataset.write_calibration(folder / "calibration.npz")
    command = [str(OUTPUT), "--calibration", str(calibration), "--scale", "standard", "--quiet"]
    assert main([*command, "--name", "cells", "--version", "1.0.0", "--out", str(folder)]) == 0
    return folder / "cells-1.0.0"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small convolutional network: static INT8 from end to end."""
    folder = tmp_path_factory.mktemp("network")
    data = models.write_rows(folder / "x.npz", models.images(64))
    assert models.quantize(models.convolution(folder / "m.onnx"), data, folder / "out", "--quiet") == 0
    return folder / "out" / "unit-1.2.3"


@pytest.fixture(scope="module")
def toycar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = SHARED / "mlperf_tiny_ad"
    if not shared.exists():
        pytest.skip(f"the shared data is not at {shared} (set EDGE_SHARED_DATA)")
    folder = tmp_path_factory.mktemp("toycar")
    command = [str(shared / "ad01_fp32.onnx"), "--calibration", str(shared / "sample_windows.npz"), "--quiet"]
    assert main([*command, "--name", "toycar", "--version", "1.0.0", "--out", str(folder)]) == 0
    return folder / "toycar-1.0.0"


def emulated(bundle: Path, lane: Path, cpu: str, monkeypatch: pytest.MonkeyPatch) -> Verification:
    monkeypatch.setenv("QEMU_CPU", cpu)
    found = verify_bundle(bundle, emulate=lane)
    assert not found.failed, found.text
    assert any("aarch64 " + cpu in check.detail for check in found.checks), found.text
    return found


@pytest.mark.parametrize("cpu", CPUS)
def test_the_example_agrees(example, lane, cpu, monkeypatch):
    emulated(example, lane, cpu, monkeypatch)


@pytest.mark.parametrize("cpu", CPUS)
def test_mlperf_tiny_anomaly_detection_agrees(toycar, lane, cpu, monkeypatch):
    emulated(toycar, lane, cpu, monkeypatch)


@pytest.mark.parametrize("cpu", CPUS)
def test_a_graph_of_int8_from_end_to_end_gives_the_same_bits(network, lane, cpu, monkeypatch):
    vectors = golden.parse((network / golden.FILE_NAME).read_bytes())
    assert vectors.agreement is Agreement.EXACT
    found = emulated(network, lane, cpu, monkeypatch)
    assert "the same bits" in found.checks[-1].detail


def test_a_wrong_model_is_noticed_there(network, example, lane, tmp_path, monkeypatch):
    from quantize.verify import _golden, _write

    vectors = golden.parse((network / golden.FILE_NAME).read_bytes())
    _write(tmp_path / "vectors.npz", vectors, rows=1)
    other = models.convolution(tmp_path / "fp32.onnx")
    monkeypatch.setenv("QEMU_CPU", "max")
    assert _golden([str(lane), "-P"], other, tmp_path / "vectors.npz", "emulated").passed is False
