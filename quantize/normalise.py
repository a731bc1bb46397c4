"""The normal form: what any exporter wrote becomes a graph that can be quantized, each pass with its proof.

Invariants: opset 17 or newer where the model can be converted; weights are initializers; dense layers are
Gemm with a one-dimensional bias where their input is two-dimensional; no affine arithmetic follows a layer
that could hold it. After every pass the graph ran on calibration rows and gave what the model gave before
(``PROOF`` dB), or the pass was undone and a note says so.

The idea: passes (``rewrite``) know nothing of proofs; ``normalise`` is the one place that keeps or undoes.
120 dB is a float32 sum in another order. Some models do not reach it against themselves, run with and without
onnxruntime's own fusions; for those the bar is what that comparison gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantize import activations, compare, graph, rewrite, runtime
from quantize.errors import BadData, BadModel
from quantize.load import FloatModel
from quantize.rewrite import IR_VERSION, OPSET
from quantize.weights import WeightFile, array_of, check

BATCH: Final = "N"
PROOF: Final = 120.0  # dB
_SLACK: Final = 6.0  # dB below the model's own noise: another order of the same sums, once more
_LOWEST_PROOF: Final = 80.0  # dB: whatever the model's own noise, a pass is not allowed more
# A model stored in float16 has 3 digits: its float32 form is the better one, and differs by this from it.
_HALF_PROOF: Final = 40.0  # dB
_DOUBLE_PROOF: Final = 90.0  # dB
_PROOF_ROWS: Final = 16
_FEWEST_PROOF_ROWS: Final = 4
_PROOF_NUMBERS: Final = 100_000  # in all rows of the proof: images take their time
# A sigmoid that is nearly 0 everywhere is nothing but rounding; of its scale of 1 this is signal enough.
_BOUNDED: Final = ("Sigmoid", "Softmax", "HardSigmoid")
_BOUNDED_SIGNAL: Final = 1e-3
_CLOSE: Final = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What became of one pass."""

    name: str
    changes: int
    sqnr: float | None  # dB against the model before; None: it could not even run
    kept: bool

    def __str__(self) -> str:
        if self.kept:
            return f"{self.name}: {self.changes} ({self.sqnr:.0f} dB)"
        why = "the graph did not run any more" if self.sqnr is None else f"{self.sqnr:.0f} dB"
        return f"{self.name}: undone ({why})"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalForm:
    """The graph, ready for pre-processing and quantization."""

    proto: onnx.ModelProto
    fixed_batch: int | None  # rows of every batch where the model takes no other
    passes: tuple[Pass, ...]


def normalise(model: FloatModel, inputs: Mapping[str, np.ndarray]) -> NormalForm:
    """Bring a model to normal form.

    Args:
        model: as it was loaded.
        inputs: calibration rows as the model takes them (scaled, nothing missing), (n, ...) each.

    Raises:
        BadModel: the model cannot be run on the rows.
        BadData: fewer rows than the batch that the model insists on.
    """
    proto = _copy(model.proto)
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    fixed = _free_batch(proto, model, inputs)
    weights = None if model.folder is None else WeightFile(model.folder)
    proof = _Proof(model, inputs, fixed)
    passes: list[Pass] = []

    def attempt(name: str, change: Callable[[onnx.ModelProto], int], bar: float | None = None) -> bool:
        nonlocal proto
        changed = _copy(proto)
        try:
            changes = change(changed)
            if not changes:
                return False
            graph.drop_unused(changed.graph)
            if weights is not None:
                changed = weights.take(changed)
            sqnr = proof.sqnr(changed)
        except BadModel:
            passes.append(Pass(name=name, changes=0, sqnr=None, kept=False))
            return False
        except OSError:
            raise
        except Exception as error:  # of onnx and its C++ parts: a pass that cannot be done is not done
            passes.append(
                Pass(name=f"{name} ({runtime.one_line(error)[:80]})", changes=0, sqnr=None, kept=False)
            )
            return False
        kept = sqnr >= (proof.bar if bar is None else bar)
        passes.append(Pass(name=name, changes=changes, sqnr=sqnr, kept=kept))
        if kept:
            proto = changed
            if bar is not None:
                proof.rebase(changed)
        return kept

    proof.declare_shapes(proto)
    start = proof.sqnr(proto)
    if start < proof.bar:
        raise BadModel(
            f"the model with a batch in front gives other results ({start:.0f} dB): please report it"
        )
    attempt("local functions inlined", rewrite.inline_functions)
    attempt("constant subgraphs folded", rewrite.fold)
    for kind, bar in ((TensorProto.FLOAT16, _HALF_PROOF), (TensorProto.DOUBLE, _DOUBLE_PROOF)):
        if kind in rewrite.float_kinds(proto):
            attempt(f"{TensorProto.DataType.Name(kind)} arithmetic in float32", rewrite.to_float32, bar)
    attempt("simplified by onnxruntime", partial(rewrite.simplify, scratch=model.folder))
    before = graph.opset_of(proto)
    if before < OPSET and not attempt(f"opset {before} converted to {OPSET}", rewrite.convert_opset):
        attempt(f"opset {before} raised to {OPSET}", rewrite.raise_opset)
    attempt("constants to initializers, folded", rewrite.fold)
    attempt("scalers spelled out", rewrite.spell_out_scalers)
    attempt("affine chains and batch norms folded into layers", rewrite.fold_affine)
    attempt("dense layers with one-dimensional bias", rewrite.dense)
    attempt("dead nodes removed", rewrite.remove_dead)
    attempt("activation functions in one piece", activations.fuse)
    try:
        check(proto)
    except Exception as error:  # the checker raises types of its own
        raise BadModel(f"the model is not valid ONNX: {runtime.one_line(error)}") from error
    return NormalForm(proto=proto, fixed_batch=fixed, passes=tuple(passes))


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


# -- proof ------------------------------------------------------------------------------------------------


class _Proof:
    """Runs graphs on the same rows and compares them with the model as it came."""

    def __init__(self, model: FloatModel, inputs: Mapping[str, np.ndarray], fixed: int | None) -> None:
        batch = fixed or next((size for size in _batches(model) if size > 0), runtime.BATCH)
        count = len(next(iter(inputs.values())))
        row = sum(np.size(values[0]) for values in inputs.values())
        rows = int(np.clip(_PROOF_NUMBERS // max(row, 1), _FEWEST_PROOF_ROWS, _PROOF_ROWS))
        if batch != runtime.BATCH:
            rows = min(count, max(rows, batch)) // batch * batch
        self._batch = batch
        self._inputs = {name: values[: max(rows, 1)] for name, values in inputs.items()}
        makers = {name: node.op_type for node in model.original.graph.node for name in node.output}
        self._bounded = {name for name in model.outputs if makers.get(name) in _BOUNDED}
        random, level = _random(model.original), runtime.OptimizationLevel
        self._expected, *again = self._original(model, level.ORT_ENABLE_ALL, 2 if random else 1)
        if again and self._worst(again[0]) < _LOWEST_PROOF:
            raise BadModel(
                f"the model draws random numbers ({', '.join(random)}), so that no two runs agree: "
                "export it without (in evaluation mode)"
            )
        self._some_finite(model.original)
        noise = self._worst(self._original(model, level.ORT_DISABLE_ALL)[0])
        self.bar = min(PROOF, max(noise - _SLACK, _LOWEST_PROOF))
        if TensorProto.FLOAT16 in rewrite.float_kinds(model.original):
            self.bar = _HALF_PROOF  # where onnxruntime rounds to 3 digits depends on what it fuses

    def _original(self, model: FloatModel, level: Any, times: int = 1) -> list[list[dict[str, np.ndarray]]]:
        """The outputs of the model as it came, ``times`` over from one session."""
        session = runtime.open_session(model.original, level=level)
        return [self._all(lambda feeds: model.run_original(session, feeds)) for _ in range(times)]

    def sqnr(self, proto: onnx.ModelProto) -> float:
        """The worst output's SQNR, in dB.

        Raises:
            BadModel: onnxruntime cannot load or run the graph.
        """
        session = runtime.open_session(proto)
        return self._worst(self._all(lambda feeds: runtime.run(session, feeds)))

    def rebase(self, proto: onnx.ModelProto) -> None:
        """From now on compare with this graph: a change of precision was accepted."""
        session = runtime.open_session(proto)
        self._expected = self._all(lambda feeds: runtime.run(session, feeds))
        self.bar = PROOF

    def _some_finite(self, original: onnx.ModelProto) -> None:
        for name in self._expected[0]:
            pieces = [piece[name] for piece in self._expected]
            if any(piece.dtype.kind != "f" or np.isfinite(piece).any() or not piece.size for piece in pieces):
                continue
            broken = [weight.name for weight in original.graph.initializer if _holds_nan(weight)]
            why = f": its weights hold NaN ({broken[0]!r})" if broken else ""
            raise BadModel(f"the FP32 model gives no finite number in output {name!r} on the data{why}")

    def declare_shapes(self, proto: onnx.ModelProto) -> None:
        """Write the rank of outputs that say none, as they came."""
        for value in proto.graph.output:
            tensor = value.type.tensor_type
            if not tensor.HasField("shape"):
                dims = [BATCH, *[None] * (self._expected[0][value.name].ndim - 1)]
                value.CopyFrom(helper.make_tensor_value_info(value.name, tensor.elem_type, dims))

    def _all(
        self, run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        return [run(feeds) for feeds in runtime.batches(self._inputs, self._batch)]

    def _worst(self, got: list[dict[str, np.ndarray]]) -> float:
        worst = compare.IDENTICAL
        for name in self._expected[0]:
            wanted = [piece[name] for piece in self._expected]
            found = [piece[name] for piece in got]
            if any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
                return -compare.IDENTICAL
            first = np.concatenate([piece.ravel() for piece in wanted])
            second = np.concatenate([piece.ravel() for piece in found])
            if first.dtype.kind != "f":
                same = np.array_equal(first, second)
                worst = min(worst, compare.IDENTICAL if same else -compare.IDENTICAL)
                continue
            finite = np.isfinite(first)
            if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
                return -compare.IDENTICAL
            first, second = first[finite], second[finite]
            if name in self._bounded and np.abs(first).max(initial=0.0) < _BOUNDED_SIGNAL:
                first, second = first + _BOUNDED_SIGNAL, second + _BOUNDED_SIGNAL
            worst = min(worst, compare.sqnr(first, second))
        return worst


def _random(proto: onnx.ModelProto) -> list[str]:
    """The operators that draw random numbers."""
    return sorted(
        {
            node.op_type
            for node in graph.all_nodes(proto)
            if node.op_type in rewrite.RANDOM or (node.op_type == "Dropout" and len(node.input) > 2)
        }
    )


def _holds_nan(weight: TensorProto) -> bool:
    return weight.data_type == TensorProto.FLOAT and bool(np.isnan(array_of(weight)).any())


def _batches(model: FloatModel) -> list[int]:
    """The sizes that the inputs of the original give their batch; 0 where it varies."""
    names = {entry.name for entry in model.inputs}  # older files list their weights as inputs, too
    found = []
    for value in model.original.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in names and dims:
            found.append(dims[model.batch_axis.get(value.name, 0)].dim_value)
    return found


def _free_batch(proto: onnx.ModelProto, model: FloatModel, inputs: Mapping[str, np.ndarray]) -> int | None:
    """Make the first dimension vary; returns its size if the graph insists on one."""
    body = proto.graph
    del body.value_info[:]  # what an exporter wrote about intermediate shapes may contradict the new batch
    before = _copy(proto)
    fixed = max(entry.shape[0] for entry in model.inputs)
    for value in (*body.input, *body.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].ClearField("dim_value")
            dims[0].dim_param = BATCH
    try:
        session = runtime.open_session(proto)
        for count in (1, 3):
            feeds = next(runtime.batches({name: values[:count] for name, values in inputs.items()}, count))
            rows = len(next(iter(feeds.values())))
            outputs = runtime.run(session, feeds)
            if any(output.shape[:1] != (rows,) for output in outputs.values()):
                raise BadModel(f"outputs do not have a row for each of {rows} rows")
            for row in range(rows if rows > 1 else 0):
                alone = runtime.run(session, {name: values[row : row + 1] for name, values in feeds.items()})
                if not all(
                    len(alone[name]) == 1 and _close(alone[name][0], outputs[name][row]) for name in outputs
                ):
                    raise BadModel("rows that are run together give other results than rows run alone")
    except BadModel as error:
        # A batch that varies on paper only: rows one at a time, which every graph takes.
        fixed = max(fixed, 1)
        rows = len(next(iter(inputs.values())))
        if rows < fixed:
            raise BadData(f"{rows} calibration rows, the model takes {fixed} at a time") from error
        proto.CopyFrom(before)
        _fix_batch(proto.graph, fixed)
        return fixed
    return None


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    """The same but for rounding; what is told apart here is other rows' numbers."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    room = _CLOSE * max(float(np.abs(np.nan_to_num(one)).max(initial=0.0)), _BOUNDED_SIGNAL)
    return bool(np.allclose(one, other, rtol=0.0, atol=room, equal_nan=True))


def _fix_batch(body: onnx.GraphProto, size: int) -> None:
    for value in body.input:
        dims = value.type.tensor_type.shape.dim
        if dims and not (dims[0].HasField("dim_value") and dims[0].dim_value > 0):
            dims[0].dim_value = size
