"""Step 3: the range of every tensor that will be INT8, from one streaming pass of the FP32 graph.

Invariant: memory does not depend on the number of rows; only a running minimum and maximum are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantize import runtime
from quantize.errors import BadData
from quantize.load import Rows
from quantize.prepare import PreparedModel


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest and largest value seen."""

    low: float
    high: float


def calibrate(model: PreparedModel, tensors: Sequence[str], rows: Rows) -> Mapping[str, Range]:
    """Run ``rows`` through the FP32 graph and watch ``tensors``.

    Raises:
        BadData: a tensor is never finite: the data and the model do not fit.
    """
    if not tensors:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model.proto)
    outputs = {value.name for value in watched.graph.output}
    inputs = {value.name for value in watched.graph.input}
    for name in tensors:
        if name not in outputs and name not in inputs:
            watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = runtime.open_session(watched)
    low = dict.fromkeys(tensors, np.inf)
    high = dict.fromkeys(tensors, -np.inf)

    def see(name: str, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)]
        if finite.size:
            low[name] = min(low[name], float(finite.min()))
            high[name] = max(high[name], float(finite.max()))

    for outputs_of_batch in runtime.stream(session, rows.inputs, model.batch):
        for name in tensors:
            if name in outputs_of_batch:
                see(name, outputs_of_batch[name])
    for name in inputs.intersection(tensors):
        see(name, rows.inputs[name])
    never = [name for name in tensors if low[name] > high[name]]
    if never:
        raise BadData(f"data {rows.source}: tensor {never[0]!r} of the model is never a finite number")
    return {name: Range(low[name], high[name]) for name in tensors}
