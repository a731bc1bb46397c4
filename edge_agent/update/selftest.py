"""The self-test: a bundle's golden vectors through this machine's onnxruntime, before anything goes live.

INT8 kernels differ between processors (dot-product and i8mm instructions on ARM, VNNI on x86), so that a
model was right where it was quantized proves nothing here. Outputs must agree as ``numpy.allclose`` does
(``contract.golden``), one row at a time, as requests come, or as many as the model insists on; the median of
those runs is the latency.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edge_agent.config import EngineConfig
from edge_agent.contract import golden as goldens
from edge_agent.contract.bundle import MODEL, Bundle
from edge_agent.contract.errors import BadMember
from edge_agent.contract.golden import Agreement, Golden
from edge_agent.errors import EngineError, InvalidInput
from edge_agent.serving.engine import Engine
from edge_agent.serving.tensors import fixed_rows, to_numpy
from edge_agent.update.messages import SelfTest
from edge_agent.update.model_file import check_model

_TIMED_RUNS: Final = 50  # at least; a median of fewer says little
_ATTEMPTS: Final = 3  # a busy moment is not a slow model

_Tensors = Mapping[str, npt.NDArray[Any]]


def run_self_test(bundle: Bundle, config: EngineConfig) -> SelfTest:
    """Run a verified bundle's golden vectors.

    Raises:
        BadBundle, BadMember: the golden member is altered or cannot be read.
        UpdateRejected: the model reaches out of its bundle.
        EngineError: onnxruntime refuses the model, or raised while running it.
    """
    if goldens.FILE_NAME not in bundle.manifest.members:
        return SelfTest(
            passed=False,
            reason="no_golden",
            message=f"the bundle has no {goldens.FILE_NAME}: what cannot be tested here is not taken live",
        )
    golden = goldens.parse(bundle.read(goldens.FILE_NAME))
    try:
        inputs = {array.name: to_numpy(array) for array in golden.inputs}
        expected = {array.name: to_numpy(array) for array in golden.outputs}
    except InvalidInput as error:
        raise BadMember(f"{goldens.FILE_NAME}: {error}") from error
    step = fixed_rows(bundle.manifest.inputs) or 1  # rows of one run
    held = min((len(array) for array in (*inputs.values(), *expected.values())), default=0)
    vectors = held // step * step
    if not held or not expected:
        return SelfTest(passed=False, reason="no_golden", message=f"{goldens.FILE_NAME} holds no vector")
    if not vectors:
        message = f"{goldens.FILE_NAME} holds {held} vectors, the model takes {step} at a time"
        return SelfTest(passed=False, reason="no_golden", message=message)
    check_model(bundle.member(MODEL), bundle.manifest.members)
    engine = Engine.load(bundle.member(MODEL), config)

    worst, complaint = 0.0, ""
    for row in range(0, vectors, step):
        got = engine.run({name: array[row : row + step] for name, array in inputs.items()})
        for name, array in expected.items():
            if name not in got:
                raise EngineError(f"{MODEL}: no output {name!r}, the golden vectors have one")
            want = array[row : row + step]
            worst = max(worst, _deviation(got[name], want))
            if not complaint and not _agrees(golden, got[name], want):
                complaint = f"golden vector {row} of {vectors}: output {name!r} differs"
    if complaint:
        message = f"{complaint} by up to {worst:.3g}, {_allowed(golden)} is allowed"
        return SelfTest(
            passed=False, reason="selftest", message=message, vectors=vectors, worst=worst,
            budget_seconds=golden.latency_budget,
        )  # fmt: skip

    median = _median_seconds(engine, inputs, vectors, step, golden.latency_budget)
    slow = 0 < golden.latency_budget < median
    message = f"{vectors} vectors agree (largest difference {worst:.3g}), median {median * 1e3:.3f} ms a row"
    if slow:
        message += f", the budget is {golden.latency_budget * 1e3:.3f} ms"
    return SelfTest(
        passed=not slow, reason="too_slow" if slow else "ok", message=message, vectors=vectors, worst=worst,
        median_seconds=median, budget_seconds=golden.latency_budget,
    )  # fmt: skip


def _agrees(golden: Golden, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if golden.agreement is Agreement.EXACT:
        return got.tobytes() == want.tobytes()
    return bool(np.allclose(got, want, rtol=golden.relative, atol=golden.absolute))


def _deviation(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    if got.shape != want.shape:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.abs(got.astype(np.float64) - want.astype(np.float64))
    largest = float(np.max(differences, initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def _allowed(golden: Golden) -> str:
    if golden.agreement is Agreement.EXACT:
        return "none"
    return f"{golden.absolute:.3g} + {golden.relative:.3g} of the value"


def _median_seconds(engine: Engine, inputs: _Tensors, vectors: int, step: int, budget: float) -> float:
    """Of a row: the best of a few medians if there is a budget to miss, else one."""
    best = float("inf")
    for _ in range(_ATTEMPTS):
        seconds = []
        for run in range(max(_TIMED_RUNS, vectors // step)):
            row = run * step % vectors
            feeds = {name: array[row : row + step] for name, array in inputs.items()}
            started = time.perf_counter()
            engine.run(feeds)
            seconds.append((time.perf_counter() - started) / step)
        best = min(best, float(np.median(seconds)))
        if not 0 < budget < best:
            break
    return best
