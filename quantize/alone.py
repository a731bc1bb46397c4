"""Step 4c's measuring device: every layer's INT8 form in one graph, one of them switched on at a time.

Invariants: with one form on, the graph computes what the file with this one layer in INT8 computes; with
none, what the FP32 graph computes. The graph that it is made of is left as it is.

Written and loaded one by one, the sensitivities of a model of sixty layers are sixty files, and most of the
time is onnxruntime preparing the same float layers again. Here each layer is an ``If`` on a number that is
fed::

    which ─ Equal(k) ─ If ┬─ then: Q ─ DQ ─ Conv of int8 weights ─ Relu ─ Q ─ DQ
                          └─ else: Conv ─ Relu
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract.bundle import ROWS_APART, ROWS_KEY
from quantize import runtime
from quantize.graph import drop_unused, unique
from quantize.int8 import MICROSOFT, Recipe, write_graph
from quantize.plan import Layer, Mode, Plan, Wiring

_NONE: Final = -1
# Most of what the higher levels look for ends at an If, and looking takes as long as running.
_LEVEL: Final = runtime.OptimizationLevel.ORT_ENABLE_BASIC

Form = tuple[Layer, Mode]


@dataclass(frozen=True, slots=True)
class Alone:
    """A loaded graph with a switch."""

    session: runtime.Session
    which: str
    forms: tuple[Form, ...]

    def switched(self, form: Form | None) -> runtime.Session:
        """The session with this form on and all others off, or all off."""
        return _Switched(self.session, self.which, _NONE if form is None else self.forms.index(form))


@dataclass(frozen=True, slots=True)
class _Switched:
    session: runtime.Session
    which: str
    number: int

    """A session as ``runtime`` sees it, with one input less."""

    def get_inputs(self) -> Sequence[runtime.Tensor]:
        """All but the switch."""
        return [entry for entry in self.session.get_inputs() if entry.name != self.which]

    def get_outputs(self) -> Sequence[runtime.Tensor]:
        """As they are."""
        return self.session.get_outputs()

    def get_modelmeta(self) -> Any:
        """As it is."""
        return self.session.get_modelmeta()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """With the switch where it stands."""
        return self.session.run(outputs, {**feeds, self.which: np.array(self.number, np.int64)})


def open_alone(proto: onnx.ModelProto, plan: Plan, recipe: Recipe) -> Alone:
    """Load ``proto`` with every INT8 form of every layer of ``plan``, as ``recipe`` has them.

    Raises:
        BadModel: onnxruntime does not load it: some form is not one, and they have to be tried one by one.
    """
    wiring = Wiring(proto.graph)
    forms = tuple((layer, mode) for layer in plan.layers for mode in layer.modes)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    which = unique(graph, "which")
    graph.input.append(helper.make_tensor_value_info(which, TensorProto.INT64, []))
    placed: dict[int, list[onnx.NodeProto]] = {}  # by the position of the last node of the layer
    gone: set[int] = set()
    conditions: list[onnx.NodeProto] = []
    for layer in plan.layers:
        positions = _positions(wiring, proto.graph, layer)
        nodes = [proto.graph.node[position] for position in positions]
        outputs = [name for name in nodes[-1].output if name]
        made = _branch(nodes, outputs, f"{which}/{layer.node}/")
        for mode in layer.modes:
            number = forms.index((layer, mode))
            form = _int8_form(wiring, nodes, layer, mode, plan, recipe)
            chosen = _branch(form.node, outputs, f"{which}/{layer.node}/{mode}/", form.initializer)
            constant, condition = f"{which}/{number}", f"{which}/{number}/on"
            graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), constant))
            conditions.append(helper.make_node("Equal", [which, constant], [condition]))
            made = _if(condition, chosen, made, outputs, last=mode is layer.modes[-1], prefix=constant)
        placed[positions[-1]] = list(made.node)
        gone.update(positions)
    nodes = [*conditions]
    for position, node in enumerate(proto.graph.node):
        if position in placed:
            nodes += placed[position]
        elif position not in gone:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    if not any(entry.domain == MICROSOFT for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    if any(mode is Mode.DYNAMIC for _, mode in forms):
        result.metadata_props.add(key=ROWS_KEY, value=ROWS_APART)
    return Alone(runtime.open_session(result, level=_LEVEL), which, forms)


def _positions(wiring: Wiring, graph: onnx.GraphProto, layer: Layer) -> list[int]:
    """The layer's node, and the Relu or Clip that its INT8 form absorbs."""
    if layer.result in graph.node[layer.node].output:
        return [layer.node]
    return [layer.node, wiring.positions[id(wiring.producers[layer.result])]]


def _int8_form(
    wiring: Wiring,
    nodes: Sequence[onnx.NodeProto],
    layer: Layer,
    mode: Mode,
    plan: Plan,
    recipe: Recipe,
) -> onnx.GraphProto:
    """The layer by itself, as the writer of files writes it."""
    form = onnx.GraphProto()
    form.node.extend(nodes)
    inside = {name for node in nodes for name in node.output}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name):
        if name in wiring.weights:
            form.initializer.append(wiring.weights[name])
        elif name not in inside:
            form.input.append(onnx.ValueInfoProto(name=name))
    form.output.extend(onnx.ValueInfoProto(name=name) for name in nodes[-1].output if name)
    write_graph(
        form,
        replace(plan, layers=(replace(layer, node=0),)),
        replace(
            recipe,
            modes={0: mode},
            per_tensor=frozenset({0} if layer.node in recipe.per_tensor else ()),
            rounded={0: recipe.rounded[layer.node]} if layer.node in recipe.rounded else {},
        ),
    )
    return form


def _branch(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    prefix: str,
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.GraphProto:
    """The body of an If: names of its own, for what the graph around it has no other name either."""
    own = {name for node in nodes for name in node.output if name} | {tensor.name for tensor in constants}
    body = onnx.GraphProto(name=prefix)
    for tensor in constants:
        body.initializer.append(tensor)
        body.initializer[-1].name = prefix + tensor.name
    for node in nodes:
        body.node.append(node)
        copied = body.node[-1]
        for names in (copied.input, copied.output):
            for index, name in enumerate(names):
                if name in own:
                    names[index] = prefix + name
    body.output.extend(onnx.ValueInfoProto(name=prefix + name) for name in outputs)
    return body


def _if(
    condition: str,
    then: onnx.GraphProto,
    otherwise: onnx.GraphProto,
    outputs: Sequence[str],
    *,
    last: bool,
    prefix: str,
) -> onnx.GraphProto:
    """A body of one If; that of the last form gives the layer's own outputs."""
    given = list(outputs) if last else [f"{prefix}/{name}" for name in outputs]
    node = helper.make_node("If", [condition], given, prefix, then_branch=then, else_branch=otherwise)
    body = onnx.GraphProto(name=f"{prefix}/if")
    body.node.append(node)
    body.output.extend(onnx.ValueInfoProto(name=name) for name in given)
    return body
