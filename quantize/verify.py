"""Step 6b: the written bundle, judged as a stranger would: from its files, in a process of its own.

Invariant: nothing here looks at what the other steps hold in memory.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from edge_agent.contract import bundle as bundles
from edge_agent.contract import golden as vectors
from edge_agent.contract.errors import ContractError
from edge_agent.contract.golden import Agreement, Array, Golden
from quantize import compare, runtime, target
from quantize.errors import BadModel, QuantizeError
from quantize.target import ArmGraph

_SCRIPT: Final = Path(__file__).with_name("run_golden.py")
_SECONDS: Final = 300.0  # an emulated CPU is a hundred times slower
_LAYER_BATCHES: Final = 4
_FUSED: Final = "fused graph"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``passed`` is None where it could not be."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All checks of one bundle."""

    digest: str
    checks: tuple[Check, ...]
    arm: ArmGraph | None

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(check.passed is False for check in self.checks)

    @property
    def complaint(self) -> str | None:
        """The first failed check that makes the bundle worthless; a poor fusion makes it slower only."""
        failed = (check for check in self.checks if check.passed is False and check.name != _FUSED)
        return next((f"{check.name}: {check.detail}" for check in failed), None)

    @property
    def text(self) -> str:
        """A line a check, for people."""
        words = {True: "ok", False: "FAILED", None: "skipped"}
        return "".join(f"{words[check.passed]:<8} {check.name}: {check.detail}\n" for check in self.checks)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """For the report."""
        return [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks]


def verify_bundle(path: Path, *, emulate: Path | None = None) -> Verification:
    """Check a bundle folder: its digests, the model file, its golden vectors here and, if asked, emulated.

    Args:
        path: the bundle's folder.
        emulate: an aarch64 Python with numpy and onnxruntime (``tests/arm/lane.sh`` makes one).

    Raises:
        QuantizeError: there is no readable bundle.
    """
    try:
        bundle = bundles.open_bundle(path)
        bundle.verify()
        wanted = vectors.parse((path / vectors.FILE_NAME).read_bytes())
    except (ContractError, OSError) as error:
        raise QuantizeError(f"bundle {path}: {error}") from error
    model = path / bundles.MODEL
    checks = [Check("digests", True, f"{len(bundle.manifest.members)} members"), _checker(model)]
    arm = None
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "vectors.npz"
        _write(inputs, wanted, max(1, *(spec.shape[0] for spec in bundle.manifest.inputs)))
        checks.append(_golden([sys.executable, "-P"], model, inputs, "fresh process"))
        try:
            feeds = {entry.name: _numpy(entry) for entry in wanted.inputs}
            if all(spec.shape[0] < 0 for spec in bundle.manifest.inputs):
                feeds = {name: values[:1] for name, values in feeds.items()}
            arm = target.arm_graph(model, feeds, Path(scratch) / "arm.onnx")
            checks.append(_census(arm))
        except BadModel as error:
            checks.append(Check(_FUSED, False, str(error)))
        if emulate is not None:
            checks.append(_golden([str(emulate), "-P"], model, inputs, "emulated ARM64"))
    return Verification(digest=str(bundle.digest), checks=tuple(checks), arm=arm)


def _checker(model: Path) -> Check:
    try:
        onnx.checker.check_model(str(model), full_check=False)
    except Exception as error:  # the checker and protobuf raise types of their own
        return Check("onnx.checker", False, runtime.one_line(error))
    return Check("onnx.checker", True, f"{model.stat().st_size} bytes")


def _census(arm: ArmGraph) -> Check:
    if arm.kernels.get("ConvInteger"):
        return Check(_FUSED, False, "ConvInteger: slower than float everywhere")
    bad = [found for found in arm.left_over if not found.explained]
    if bad:
        return Check(_FUSED, False, f"{len(bad)} Q/DQ without a reason, first at {bad[0].tensor!r}")
    return Check(
        _FUSED,
        True,
        f"{arm.int8_kernels} int8 kernels, {len(arm.float_layers)} layers in float, "
        f"{len(arm.left_over)} Q/DQ, all explained",
    )


def _golden(python: list[str], model: Path, inputs: Path, name: str) -> Check:
    environment = dict(os.environ, ORT_DISABLE_TELEMETRY="1")
    attended, ours = (
        os.pipe()
    )  # closes with this process, even where it was interrupted while starting the other
    try:
        done = subprocess.run(
            [*python, str(_SCRIPT), str(model), str(inputs), "--attended"],
            stdin=attended,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if lines else {}
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return Check(f"golden vectors, {name}", False, runtime.one_line(error))
    finally:
        os.close(attended)
        os.close(ours)
    if not found:
        return Check(f"golden vectors, {name}", False, f"exit {done.returncode}: {_last_line(done.stderr)}")
    worst = found["worst"]
    apart = (
        "the same bits"
        if found["identical"]
        else "not finite"
        if worst is None
        else f"{worst:.2g} of the tolerance"
    )
    return Check(
        f"golden vectors, {name}",
        bool(found["agree"]),
        f"{found['machine']}, onnxruntime {found['onnxruntime']}: {apart}",
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:200]


def _write(path: Path, golden: Golden, rows: int) -> None:
    exact = golden.agreement is Agreement.EXACT
    arrays: dict[str, Any] = {f"in/{entry.name}": _numpy(entry) for entry in golden.inputs}
    arrays |= {f"out/{entry.name}": _numpy(entry) for entry in golden.outputs}
    with path.open("wb") as file:
        np.savez(
            file,
            absolute=np.float64(0.0 if exact else golden.absolute),
            relative=np.float64(0.0 if exact else golden.relative),
            rows=np.int64(rows),
            **arrays,
        )


def _numpy(entry: Array) -> np.ndarray:
    kind = entry.datatype.value
    name = "bool" if kind == "BOOL" else kind.lower().replace("fp", "float")
    return np.frombuffer(entry.data, np.dtype(name).newbyteorder("<")).reshape(entry.shape)


def layer_errors(
    reference: onnx.ModelProto,
    quantized: onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    batch: int = runtime.BATCH,
) -> dict[str, float]:
    """SQNR in dB of every float tensor that both graphs name alike and that a layer of either makes.

    Both run unfused, so that every tensor exists. Errors add up along the graph.

    Args:
        reference: the FP32 graph (pruned, if it was).
        quantized: what was written.
        inputs: rows; the first few batches are used.
        batch: rows of a batch.
    """
    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU")
    floats = {node.output[0] for node in reference.graph.node if node.op_type in layers}
    both = floats & {name for node in quantized.graph.node for name in node.output}
    order = [node.output[0] for node in reference.graph.node if node.output[0] in both]
    if not order:
        return {}
    noise = dict.fromkeys(order, 0.0)
    signal = dict.fromkeys(order, 0.0)
    try:
        before, after = (_watched(proto, order) for proto in (reference, quantized))
        for feeds in itertools.islice(runtime.batches(inputs, batch), _LAYER_BATCHES):
            expected, got = runtime.run(before, feeds), runtime.run(after, feeds)
            for name in list(noise):
                one, other = expected[name], got[name]
                if one.shape != other.shape or one.dtype.kind != "f":
                    del noise[name]
                    continue
                signal[name] += float(np.sum(np.square(one, dtype=np.float64)))
                noise[name] += float(np.sum(np.square(one - other, dtype=np.float64)))
    except BadModel:
        return {}  # a graph that only runs fused: no figures rather than wrong ones
    return {name: round(compare.decibels(signal[name], noise[name]), 2) for name in noise}


def _watched(proto: onnx.ModelProto, tensors: list[str]) -> runtime.Session:
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    there = {value.name for value in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in there)
    return runtime.open_session(watched, level=runtime.OptimizationLevel.ORT_DISABLE_ALL)
