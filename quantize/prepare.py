"""Step 2: put missing values, scaling and the score into the FP32 graph.

The result is the *reference*: every INT8 candidate is compared with it, and the agent sends it raw numbers.

::

    x ─ IsNaN ─ Where(substitute) ─ Sub(offset) ─ Mul(factor) ─┬─ the model ─ y ─ Sub ─ ReduceMean ─ score
                                                               └──────────────────┘

Invariants: the input keeps its name; the first dimension of every input and output varies if the model
allows it; what the model computes is not changed (``normalise`` proves every pass on calibration rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract.manifest import Datatype, Task, TensorSpec
from quantize import runtime
from quantize.config import Impute, PrepareConfig, Scale, Score
from quantize.errors import BadData, BadModel
from quantize.graph import all_nodes, drop_unused, imputes, opset_of, rename_reads, unique
from quantize.load import FloatModel, Input, Rows
from quantize.normalise import BATCH, Pass, normalise
from quantize.weights import check

__all__ = ["PreparedModel", "drop_unused", "prepare", "unique"]

SCORE: Final = "score"
PROBABILITIES: Final = "probabilities"
CLASS: Final = "class"
_RECONSTRUCTION: Final = (Score.MSE, Score.MAE, Score.WEIGHTED)
_CLASSES: Final = (Score.SOFTMAX, Score.ARGMAX)
_FEW: Final = 4
_PROBED: Final = 256  # rows that show whether an output holds probabilities
_EXACT_ENOUGH: Final = 1e-3  # probabilities sum to one within this
_FLOOR: Final = 0.05  # of the median error: a feature that is always right does not decide the weighted score

_AS_MUCH_AS_FOUND: Final = ("NonMaxSuppression", "NonZero", "Unique", "Compress")

_DATATYPES: Final[Mapping[str, Datatype]] = {
    "float32": Datatype.FP32, "float64": Datatype.FP64, "float16": Datatype.FP16, "bool": Datatype.BOOL,
    "int8": Datatype.INT8, "int16": Datatype.INT16, "int32": Datatype.INT32, "int64": Datatype.INT64,
    "uint8": Datatype.UINT8, "uint16": Datatype.UINT16, "uint32": Datatype.UINT32, "uint64": Datatype.UINT64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """The FP32 reference graph: raw numbers in, score (or the model's own outputs) out."""

    proto: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: Task
    score: str | None  # the output that holds one score a row
    fixed_batch: int | None  # rows of every batch where the model takes no other
    notes: tuple[str, ...]
    passes: tuple[Pass, ...] = ()  # of normalisation

    @property
    def batch(self) -> int:
        """Rows to run at a time."""
        return self.fixed_batch or runtime.BATCH

    def trim(self, rows: Rows) -> Rows:
        """``rows``, cut to whole batches where the batch is fixed."""
        return (
            rows if self.fixed_batch is None else rows.take(np.arange(len(rows) // self.batch * self.batch))
        )


def prepare(model: FloatModel, calibration: Rows, config: PrepareConfig) -> PreparedModel:
    """Bring ``model`` to normal form and wrap it in pre-processing and score.

    Raises:
        BadModel: the options do not fit the model (MSE without a reconstruction, scaling of an image).
        BadData: NaN in the data with nothing to stand in for it, or what stands in is not finite.
    """
    only = model.inputs[0] if len(model.inputs) == 1 else None
    steps, own = None, False
    filled = dict(calibration.inputs)
    if only is not None and only.tabular:
        own = _imputes_itself(model, only.name, filled[only.name])
        steps = _steps_of(filled[only.name], config, own=own)
        filled[only.name] = steps.apply(filled[only.name])
    else:
        _refuse_preprocessing(config, calibration)

    normal = normalise(model, filled)
    proto = normal.proto
    notes = [*model.notes, *(str(step) for step in normal.passes)]
    if own and steps is not None and steps.substitute is None:
        notes.append("missing values are left to the model, which puts something in their place itself")
    if normal.fixed_batch:
        notes.append(f"the model takes batches of {normal.fixed_batch} only")
    if len(calibration) < calibration.in_file:
        notes.append(
            f"{len(calibration)} good rows stand for the {calibration.in_file} of {calibration.source}"
        )

    classes = config.fail_class is not None or config.score in _CLASSES
    batch = runtime.BATCH if steps is not None else _FEW  # an image takes more memory than a table's row
    finder = _Finder(proto, calibration, filled, normal.fixed_batch or batch)
    # What the score takes is found on the model alone, before the input's numbers are the raw ones.
    score = _classes(proto, finder, config) if classes else _score(proto, only, finder, config.score)
    if steps is not None and only is not None:
        _insert(proto, only.name, steps)
    check(proto)
    return PreparedModel(
        proto=proto,
        inputs=tuple(_input_spec(entry, calibration, normal.fixed_batch) for entry in model.inputs),
        outputs=_output_specs(proto, calibration, normal.fixed_batch),
        task=Task.CLASSIFICATION if classes else Task.RAW if score is None else Task.ANOMALY,
        score=score,
        fixed_batch=normal.fixed_batch,
        notes=tuple(notes),
        passes=normal.passes,
    )


# -- before the model -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """What happens to a row before the model: (f,) each, None where nothing happens."""

    substitute: np.ndarray | None
    offset: np.ndarray | None
    factor: np.ndarray | None

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """The same in numpy, float32 like the graph."""
        if self.substitute is not None:
            rows = np.where(np.isnan(rows), self.substitute, rows)
        if self.offset is not None and self.factor is not None:
            rows = (rows - self.offset) * self.factor
        return rows


def _imputes_itself(model: FloatModel, name: str, rows: np.ndarray) -> bool:
    """Whether missing values can be left to it. A reconstruction is compared with its input, so not there."""
    if not imputes(model.proto.graph, name):
        return False
    first = next(runtime.batches({name: rows}, 1))
    outputs = runtime.run(runtime.open_session(model.proto), first)
    return all(values.shape != first[name].shape for values in outputs.values())


def _steps_of(rows: np.ndarray, config: PrepareConfig, *, own: bool) -> _Steps:
    """``own``: the model takes missing values."""
    substitute = None
    filled = rows
    if own and config.impute in (Impute.AUTO, Impute.NONE):
        pass
    elif config.impute is not Impute.NONE:
        if config.impute is Impute.CONSTANT:
            substitute = np.full(rows.shape[1], config.constant, np.float32)
        else:
            centre = np.nanmean if config.impute is Impute.MEAN else np.nanmedian
            substitute = centre(rows.astype(np.float64), axis=0).astype(np.float32)
        filled = np.where(np.isnan(rows), substitute, rows)
    elif np.isnan(rows).any():
        count = int(np.isnan(rows).any(axis=1).sum())
        raise BadData(
            f"{count} calibration rows have missing values (NaN), which the model has nothing for: "
            "use --impute median, mean or constant:VALUE"
        )
    if config.scale is Scale.NONE:
        return _Steps(substitute, None, None)
    # A constant that stands in is not a measurement: the scale is that of what was measured.
    measured = rows if config.impute is Impute.CONSTANT else filled
    return _Steps(substitute, *_scaling(measured.astype(np.float64), config.scale))


def _scaling(rows: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Offset and factor per feature. A constant feature keeps its unit: (x - offset) * 1."""
    if scale is Scale.STANDARD:
        offset, width = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    elif scale is Scale.ROBUST:
        low, offset, high = np.nanquantile(rows, (0.25, 0.5, 0.75), axis=0)
        width = high - low
        # More than half of the values equal: the quartiles do not see the others, the deviation does.
        width = np.where(width > 0, width, np.nanstd(rows, axis=0))
    else:
        offset = np.nanmin(rows, axis=0)
        width = np.nanmax(rows, axis=0) - offset
    # Rounding leaves a constant column a width of a few float32 ulps, which would be divided by.
    constant = width <= 1e-6 * np.maximum(np.abs(offset), 1e-30)
    return offset.astype(np.float32), (1.0 / np.where(constant, 1.0, width)).astype(np.float32)


def _insert(proto: onnx.ModelProto, name: str, steps: _Steps) -> None:
    """Put imputation and scaling between the input and whoever reads it."""
    graph = proto.graph
    nodes: list[onnx.NodeProto] = []
    tensor = name
    if steps.substitute is not None:
        missing, present = unique(graph, "missing"), unique(graph, "present")
        constant = _constant(graph, "substitute", steps.substitute)
        nodes += [
            helper.make_node("IsNaN", [tensor], [missing], missing),
            helper.make_node("Where", [missing, constant, tensor], [present], present),
        ]
        tensor = present
    if steps.offset is not None and steps.factor is not None:
        centred, scaled = unique(graph, "centred"), unique(graph, "scaled")
        nodes += [
            helper.make_node("Sub", [tensor, _constant(graph, "offset", steps.offset)], [centred], centred),
            helper.make_node("Mul", [centred, _constant(graph, "factor", steps.factor)], [scaled], scaled),
        ]
        tensor = scaled
    if not nodes:
        return
    rename_reads(graph, name, tensor)
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])


def _constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    name = unique(graph, name)
    graph.initializer.append(numpy_helper.from_array(values.reshape(1, -1), name))
    return name


def _refuse_preprocessing(config: PrepareConfig, rows: Rows) -> None:
    if config.scale is not Scale.NONE:
        raise BadModel("scaling needs a model with one input of shape [N, features]: use --scale none")
    for name, values in rows.inputs.items():
        pieces = values if values.dtype == object else [values]
        if any(piece.dtype.kind == "f" and np.isnan(piece).any() for piece in pieces):
            raise BadData(
                f"data {rows.source}: {name!r} has missing values (NaN), which only tables may have"
            )


# -- after the model --------------------------------------------------------------------------------------


class _Finder:
    """What the outputs of the model look like on calibration rows, after imputation and scaling."""

    def __init__(
        self, proto: onnx.ModelProto, rows: Rows, filled: Mapping[str, np.ndarray], batch: int
    ) -> None:
        self._session = runtime.open_session(proto)
        self.filled, self._batch = filled, batch
        feeds = next(runtime.batches(filled, batch))
        self.rows = len(next(iter(feeds.values())))
        self.outputs = runtime.run(self._session, feeds)

    @property
    def listed(self) -> str:
        """The outputs, for messages."""
        return ", ".join(f"{name} {list(values.shape)}" for name, values in self.outputs.items())

    def first(self, name: str, count: int) -> np.ndarray:
        """An output on the first rows."""
        whole = max(count // self._batch, 1) * self._batch
        inputs = {key: values[:whole] for key, values in self.filled.items()}
        return runtime.run_all(self._session, inputs, self._batch)[name]

    def squared_error(self, entry: str, reconstruction: str) -> np.ndarray:
        """Mean squared error of each feature: (f,)."""
        total, count = np.zeros(self.filled[entry].shape[1]), 0
        for feeds in runtime.batches(self.filled, self._batch):
            if len(feeds[entry]) < self._batch and self._batch != runtime.BATCH:
                break  # the rest of rows that a fixed batch cannot take
            error = runtime.run(self._session, feeds)[reconstruction].astype(np.float64) - feeds[entry]
            total += (error**2).sum(axis=0)
            count += len(error)
        mean: np.ndarray = total / count
        return mean


def _score(proto: onnx.ModelProto, entry: Input | None, finder: _Finder, score: Score) -> str | None:
    """Make the score an output; returns its name, or None where there is none."""
    outputs = finder.outputs
    reconstruction = None
    if entry is not None and entry.tabular:
        wanted = (finder.rows, entry.shape[1])
        given = finder.filled[entry.name][: finder.rows]
        alike = [
            name
            for name, values in outputs.items()
            if values.shape == wanted
            and values.dtype.kind == "f"
            and not np.array_equal(values, given)  # the input itself, handed through
        ]
        asked = score in _RECONSTRUCTION
        reconstruction = alike[0] if len(alike) == 1 and (wanted[1] > 1 or asked) else None
    if score in _RECONSTRUCTION or (score is Score.AUTO and reconstruction):
        if reconstruction is None or entry is None:
            raise BadModel(
                f"score {score} needs one output of the input's shape (a reconstruction), outputs are "
                f"{finder.listed}: use --score none"
            )
        weights = None
        if score is Score.WEIGHTED:
            error = finder.squared_error(entry.name, reconstruction)
            weights = 1.0 / np.maximum(error, max(_FLOOR * float(np.median(error)), 1e-30))
        return _reconstruction_error(proto, entry.name, reconstruction, score, weights)
    single = [
        name for name, values in outputs.items() if values.shape in ((finder.rows,), (finder.rows, 1))
    ]  # as many numbers as rows; others give as many as they find
    if len(outputs) != 1 or not single or outputs[single[0]].dtype != np.float32:
        return None
    if outputs[single[0]].shape[1:] == (1,):
        _flatten(proto.graph, single[0])
    return single[0]


def _reconstruction_error(
    proto: onnx.ModelProto, entry: str, reconstruction: str, score: Score, weights: np.ndarray | None
) -> str:
    graph = proto.graph
    name, error = unique(graph, SCORE), unique(graph, "error")
    size = unique(graph, "absolute" if score is Score.MAE else "squared")
    nodes = [helper.make_node("Sub", [reconstruction, entry], [error], error)]
    if score is Score.MAE:
        nodes.append(helper.make_node("Abs", [error], [size], size))
    else:
        nodes.append(helper.make_node("Mul", [error, error], [size], size))
    if weights is not None:
        weighted = unique(graph, "weighted")
        constant = _constant(graph, "score_weights", weights.astype(np.float32))
        nodes.append(helper.make_node("Mul", [size, constant], [weighted], weighted))
        size = weighted
    if opset_of(proto) >= 18:  # axes became an input
        axes = unique(graph, "score_axes")
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), axes))
        nodes.append(helper.make_node("ReduceMean", [size, axes], [name], name, keepdims=0))
    else:
        nodes.append(helper.make_node("ReduceMean", [size], [name], name, keepdims=0, axes=[1]))
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH]))
    return name


def _flatten(graph: onnx.GraphProto, output: str) -> None:
    """An output [N, 1] becomes [N] under its own name: one number a row."""
    column = unique(graph, f"{output}_column")
    shape = unique(graph, f"{output}_shape")
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == output:
                node.output[index] = column
    rename_reads(graph, output, column)
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), shape))
    graph.node.append(helper.make_node("Reshape", [column, shape], [output], f"{output}_flat"))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [BATCH]))


def _classes(proto: onnx.ModelProto, finder: _Finder, config: PrepareConfig) -> str | None:
    """Probabilities, the chosen class, and the score of the class that fails."""
    graph = proto.graph
    if config.score in _RECONSTRUCTION:
        raise BadModel(f"score {config.score} is a reconstruction error, --fail-class is for a classifier")
    tables = [
        name
        for name, values in finder.outputs.items()
        if values.ndim == 2
        and len(values) == finder.rows
        and values.shape[1] > 1
        and values.dtype == np.float32
    ]
    if len(tables) != 1:
        raise BadModel(
            f"a classifier has one output [N, classes] of at least two classes, outputs are {finder.listed}"
        )
    table = tables[0]
    count = finder.outputs[table].shape[1]
    if config.fail_class is not None and not 0 <= config.fail_class < count:
        raise BadModel(
            f"--fail-class {config.fail_class}: output {table!r} has {count} classes, 0 to {count - 1}"
        )
    if config.score is Score.ARGMAX:
        return _argmax(proto, table, config.fail_class)
    values = finder.first(table, _PROBED)
    are_probabilities = bool((values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < _EXACT_ENOUGH).all())
    if config.score is Score.SOFTMAX or (config.score is Score.AUTO and not are_probabilities):
        name = unique(graph, PROBABILITIES)
        graph.node.append(helper.make_node("Softmax", [table], [name], name, axis=1))
        _replace_output(graph, table, helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, count]))
        table = name
    if config.fail_class is None:
        return None
    score, index = unique(graph, SCORE), unique(graph, "fail_class")
    graph.initializer.append(numpy_helper.from_array(np.array(config.fail_class, np.int64), index))
    graph.node.append(helper.make_node("Gather", [table, index], [score], score, axis=1))
    graph.output.append(helper.make_tensor_value_info(score, TensorProto.FLOAT, [BATCH]))
    return score


def _argmax(proto: onnx.ModelProto, table: str, fail_class: int | None) -> str | None:
    graph = proto.graph
    chosen = unique(graph, CLASS)
    graph.node.append(helper.make_node("ArgMax", [table], [chosen], chosen, axis=1, keepdims=0))
    graph.output.append(helper.make_tensor_value_info(chosen, TensorProto.INT64, [BATCH]))
    if fail_class is None:
        return None
    score, index, fails = unique(graph, SCORE), unique(graph, "fail_class"), unique(graph, "fails")
    graph.initializer.append(numpy_helper.from_array(np.array(fail_class, np.int64), index))
    graph.node.append(helper.make_node("Equal", [chosen, index], [fails], fails))
    graph.node.append(helper.make_node("Cast", [fails], [score], score, to=TensorProto.FLOAT))
    graph.output.append(helper.make_tensor_value_info(score, TensorProto.FLOAT, [BATCH]))
    return score


def _replace_output(graph: onnx.GraphProto, name: str, value: onnx.ValueInfoProto) -> None:
    others = [value if output.name == name else output for output in graph.output]
    del graph.output[:]
    graph.output.extend(others)


# -- the manifest's view ----------------------------------------------------------------------------------


def _input_spec(entry: Input, rows: Rows, fixed: int | None) -> TensorSpec:
    return TensorSpec(
        entry.name,
        _DATATYPES[entry.dtype.name],
        (fixed or -1, *entry.shape[1:]),
        features=rows.features if entry.tabular else None,
        units=rows.units if entry.tabular else None,
    )


def _output_specs(proto: onnx.ModelProto, rows: Rows, fixed: int | None) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of the outputs as they come, from runs with one and with two rows.

    What varies with the length of a row is what the model does not give a size, if its inputs have such, or
    if it gives as much as it finds.
    """
    session = runtime.open_session(proto)
    counts = (fixed, fixed) if fixed else (1, 2)
    first, second = (
        runtime.run(
            session,
            next(runtime.batches({name: values[:count] for name, values in rows.inputs.items()}, count)),
        )
        for count in counts
    )
    lengths_vary = any(
        not (dim.HasField("dim_value") and dim.dim_value > 0)
        for value in proto.graph.input
        for dim in value.type.tensor_type.shape.dim[1:]
    )
    found = any(node.op_type in _AS_MUCH_AS_FOUND for node in all_nodes(proto))
    declared = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.output}
    specs = []
    for name, values in first.items():
        if values.dtype.name not in _DATATYPES:
            raise BadModel(f"output {name!r} has type {values.dtype}, which a bundle cannot carry")
        if not values.size:
            raise BadModel(f"output {name!r} has shape {list(values.shape)}: it holds nothing, leave it out")
        shape = [a if a == b else -1 for a, b in zip(values.shape, second[name].shape, strict=True)]
        if not fixed and len(values) == len(second[name]) == 1:
            shape[0] = -1  # two rows of different lengths do not make a batch of two
        if (lengths_vary or found) and len(declared[name]) == len(shape):
            for place, dim in enumerate(declared[name]):
                if (place or found) and not (dim.HasField("dim_value") and dim.dim_value > 0):
                    shape[place] = -1
        specs.append(TensorSpec(name, _DATATYPES[values.dtype.name], tuple(shape)))
    return tuple(specs)
