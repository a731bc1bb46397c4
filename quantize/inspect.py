"""``quantize-model --inspect``: what a model is, and what would be done with it. Writes nothing.

The idea: the same loading, normalisation and planning as for a bundle, on random rows in place of data. What
depends on data (ranges, accuracy, the score) is not guessed.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from quantize import graph
from quantize.errors import QuantizeError
from quantize.load import FloatModel, Input, load_model, read_model
from quantize.normalise import NormalForm, normalise
from quantize.plan import Mode, plan_of

# Sizes for dimensions that vary: of a small and a usual image, of a window of audio, of short sequences.
_GUESSES: Final = (64, 224, 512, 16, 1)
_WIDTHS_TRIED: Final = 8
_WIDEST: Final = 1 << 12
_ROWS: Final = 16
_SEED: Final = 7
_INTEGERS_BELOW: Final = 2  # smaller than any table that integer inputs may look up
_SUBGRAPHS_SHOWN: Final = 4
_WEIGHTED: Final = ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM", "GRU", "RNN")


def facts_of(path: Path, settings: Mapping[str, float], *, trust: bool = False) -> dict[str, Any]:
    """What ``path`` holds, as JSON.

    Raises:
        BadModel: it cannot be read. A model that is read and then refused is described, with the reason.
    """
    with tempfile.TemporaryDirectory(prefix="quantize-") as folder:  # for large weights
        return _facts(path, settings, Path(folder), trust=trust)


def _facts(path: Path, settings: Mapping[str, float], folder: Path, *, trust: bool) -> dict[str, Any]:
    proto, digest, size = read_model(path, trust=trust)
    facts: dict[str, Any] = {
        "file": path.name,
        "bytes": size,
        "digest": str(digest),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "ir": proto.ir_version,
        "producer": " ".join(filter(None, (proto.producer_name, proto.producer_version))),
        "inputs": _values(proto.graph, proto.graph.input),
        "outputs": _values(proto.graph, proto.graph.output),
        "nodes": sum(1 for _ in graph.all_nodes(proto)),
        "operators": dict(Counter(node.op_type for node in graph.all_nodes(proto)).most_common()),
        "parameter_bytes": _parameters(proto),
        "subgraphs": _subgraphs(proto),
        "local_functions": len(proto.functions),
        "refused": None,
        "notes": [],
        "passes": [],
        "int8": None,
    }
    del proto  # a large one is in memory once
    try:
        model = load_model(path, settings, trust=trust, folder=folder)
    except QuantizeError as error:
        return facts | {"refused": str(error)}
    facts["notes"] = list(model.notes)
    facts["model_inputs"] = [_input(entry) for entry in model.inputs]
    normal = _normal_form(model)
    if isinstance(normal, QuantizeError):
        facts["notes"].append(
            f"nothing came out on random rows ({normal}): real ones will show what can be done"
        )
        return facts
    facts["passes"] = [str(step) for step in normal.passes]
    facts["fixed_batch"] = normal.fixed_batch
    facts["int8"] = _int8(normal.proto)
    return facts


def _values(body: onnx.GraphProto, values: Any) -> list[dict[str, Any]]:
    weights = {tensor.name for tensor in body.initializer}
    found = []
    for value in values:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        kind = TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else "not a tensor"
        dims = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim
        ]
        found.append({"name": value.name, "type": kind, "shape": dims})
    return found


def _input(entry: Input) -> dict[str, Any]:
    return {"name": entry.name, "type": str(entry.dtype), "shape": list(entry.shape), "table": entry.tabular}


@dataclass(slots=True)
class _Weight:
    size: int  # bytes
    counted: bool = False


def _parameters(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of weights by the operator that reads them, subgraphs included, the most first."""
    found: Counter[str] = Counter()
    bodies = [proto.graph, *(onnx.GraphProto(node=function.node) for function in proto.functions)]
    for body in bodies:
        _count_parameters(body, {}, found)
    return dict(found.most_common())


def _count_parameters(body: onnx.GraphProto, outer: Mapping[str, _Weight], found: Counter[str]) -> None:
    """Add the weights a body reads, each once. ``outer``: those of the bodies around it, by name."""
    seen = dict(outer)
    for tensor in body.initializer:
        seen[tensor.name] = _Weight(_bytes_of(tensor))
    for node in body.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    seen[node.output[0]] = _Weight(_bytes_of(attribute.t))
    for node in body.node:
        for name in node.input:
            weight = seen.get(name)
            if weight is not None and not weight.counted:
                weight.counted = True
                found[node.op_type] += weight.size
        for subgraph in graph.subgraphs(node):
            _count_parameters(subgraph, seen, found)


def _bytes_of(tensor: TensorProto) -> int:
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * itemsize


def _subgraphs(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    found = []
    for node in graph.all_nodes(proto):
        bodies = graph.subgraphs(node)
        if bodies:
            found.append(
                {
                    "operator": node.op_type,
                    "reads": list(node.input),
                    "nodes": sum(len(b.node) for b in bodies),
                }
            )
    return found


def _normal_form(model: FloatModel) -> NormalForm | QuantizeError:
    """The normal form on random rows of the first size that the model takes, or why it takes none."""
    random = np.random.default_rng(_SEED)
    varies = any(size < 0 for entry in model.inputs for size in entry.shape[1:])
    sizes = Counter(size for tensor in model.proto.graph.initializer for size in tensor.dims)
    # A width that is not written anywhere is one of those of the weights.
    widths = [size for size, _ in sizes.most_common() if 1 < size <= _WIDEST]
    refused: QuantizeError | None = None
    for guess in (*_GUESSES, *widths[:_WIDTHS_TRIED]) if varies else _GUESSES[:1]:
        inputs = {}
        for entry in model.inputs:
            shape = (max(_ROWS, entry.shape[0]), *(size if size > 0 else guess for size in entry.shape[1:]))
            if entry.dtype.kind == "f":
                inputs[entry.name] = random.standard_normal(shape).astype(entry.dtype)
            else:
                inputs[entry.name] = random.integers(0, _INTEGERS_BELOW, shape).astype(entry.dtype)
        try:
            return normalise(model, inputs)
        except QuantizeError as error:
            refused = refused or error
    assert refused is not None
    return refused


def _int8(proto: onnx.ModelProto) -> dict[str, Any]:
    """What the static form would make INT8, and what would stay float."""
    layers = plan_of(proto).layers
    sizes = {tensor.name: _bytes_of(tensor) for tensor in proto.graph.initializer}
    computed = [layer for layer in layers if layer.modes != (Mode.STORED,)]
    planned = {layer.node for layer in computed}
    left = Counter(
        node.op_type
        for position, node in enumerate(proto.graph.node)
        if position not in planned and node.op_type in _WEIGHTED
    )
    quantized = sum(sizes.get(name, 0) for name in {layer.weight for layer in layers})
    total = sum(sizes.values())
    return {
        "layers": dict(Counter(layer.kind for layer in computed).most_common()),
        "left_float": dict(left.most_common()),
        "parameter_bytes": total,
        "int8_parameter_bytes": quantized,
        "expected_bytes": total - quantized + quantized // 4,
    }


def text_of(facts: Mapping[str, Any]) -> str:
    """The facts for people."""
    opset = ", ".join(f"{domain} {version}" for domain, version in facts["opset"].items())
    lines = [
        f"{facts['file']}  {_size(facts['bytes'])}, opset {opset}, IR {facts['ir']}"
        + (f", by {facts['producer']}" if facts["producer"] else ""),
    ]
    for kind in ("inputs", "outputs"):
        lines += [
            f"  {kind[:-1]:<8} {value['name']}  {value['type']} {_shape(value['shape'])}"
            for value in facts[kind]
        ]
    shown = ", ".join(f"{count} {kind}" for kind, count in list(facts["operators"].items())[:12])
    lines.append(f"  nodes    {facts['nodes']}: {shown}{', ...' if len(facts['operators']) > 12 else ''}")
    weights = ", ".join(f"{kind} {_size(size)}" for kind, size in list(facts["parameter_bytes"].items())[:8])
    lines.append(f"  weights  {weights or 'none'}")
    bodies = facts["subgraphs"]
    for body in bodies[:_SUBGRAPHS_SHOWN]:
        lines.append(
            f"  subgraph {body['operator']} on {', '.join(body['reads'])}: {body['nodes']} nodes inside"
        )
    if len(bodies) > _SUBGRAPHS_SHOWN:
        lines.append(f"  and {len(bodies) - _SUBGRAPHS_SHOWN} subgraphs more")
    if facts["refused"]:
        return "\n".join([*lines, f"Cannot be quantized: {facts['refused']}"]) + "\n"
    lines.append("What would be done (proven on random rows here, on calibration rows then):")
    lines += [f"  {note}" for note in (*facts["notes"], *facts["passes"])]
    if facts.get("fixed_batch"):
        lines.append(f"  batches of {facts['fixed_batch']} only")
    int8 = facts["int8"]
    if int8 is not None:
        layers = ", ".join(f"{count} {kind}" for kind, count in int8["layers"].items())
        lines.append(f"  INT8: {layers or 'no layer'}")
        if int8["left_float"]:
            left = ", ".join(f"{count} {kind}" for kind, count in int8["left_float"].items())
            lines.append(f"  stay float in the static form: {left}")
        before, after = _size(int8["parameter_bytes"]), _size(int8["expected_bytes"])
        lines.append(f"  weights {before} -> about {after}")
    return "\n".join(lines) + "\n"


def _shape(dims: list[Any]) -> str:
    return f"[{', '.join(str(dim) for dim in dims)}]"


def _size(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e6:.2f} MB" if size >= 1_000_000 else f"{size / 1e3:.1f} kB"
