"""Small operations on ONNX graphs that several steps need. Subgraphs (If, Loop, Scan) are seen everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import onnx

_WORTH_SHARING: Final = 256  # bytes
_LONGEST_NAME: Final = 64  # letters

# What is missing in their input is missing in their output.
_KEEPS_MISSING: Final = ("Identity", "Cast", "Scaler", "Add", "Sub", "Mul", "Div")


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the default operator set; 0 if the model names none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node: of the graph, of subgraphs, of local functions."""
    yield from _nodes(proto.graph.node)
    for function in proto.functions:
        yield from _nodes(function.node)


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for subgraph in subgraphs(node):
            yield from _nodes(subgraph.node)


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies of a control flow node."""
    found = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    for attribute in node.attribute:
        found.extend(attribute.graphs)
    return found


def reads(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, its subgraphs included."""
    names = {name for name in node.input if name}
    for subgraph in subgraphs(node):
        names |= names_read(subgraph)
    return names


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Names read by the nodes of a graph, and the outputs of its subgraphs."""
    names: set[str] = set()
    for node in graph.node:
        names.update(name for name in node.input if name)
        for subgraph in subgraphs(node):
            names |= names_read(subgraph) | {value.name for value in subgraph.output}
    return names


def users(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each name."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in _needs(node):
            found.setdefault(name, []).append(node)
    return found


def imputes(graph: onnx.GraphProto, tensor: str) -> bool:
    """Whether the graph has something to put in place of every missing value (NaN) of ``tensor``.

    That is an Imputer, or Where(IsNaN(x), ..., x), perhaps after arithmetic with constants. An answer that
    is finite proves nothing: Relu makes NaN 0 on some processors.
    """
    readers = users(graph).get(tensor, [])
    if not readers or tensor in {value.name for value in graph.output}:
        return False
    tests = {node.output[0] for node in readers if node.op_type == "IsNaN"}
    constants = {value.name for value in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in readers:
        if node.op_type in ("Imputer", "IsNaN") or (node.op_type == "Where" and node.input[0] in tests):
            continue
        alone = all(name == tensor or name in constants for name in node.input)
        if node.op_type not in _KEEPS_MISSING or not alone or not imputes(graph, node.output[0]):
            return False
    return True


def rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Whoever reads ``old`` reads ``new``; outputs of the graph keep their names."""
    _rename_all(graph, {old: new})


def _rename_all(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
        for subgraph in subgraphs(node):
            _rename_all(subgraph, names)
            for value in subgraph.output:
                if value.name in names:
                    value.name = names[value.name]


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that nothing reads."""
    read = {value.name for value in graph.output} | names_read(graph)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def share_equal(graph: onnx.GraphProto) -> None:
    """Keep weights that are alike once: a recurrent net unrolled over time reads one matrix in every step."""
    outputs = {value.name for value in graph.output}
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    again: dict[str, str] = {}
    for tensor in graph.initializer:
        if len(tensor.raw_data) >= _WORTH_SHARING and tensor.name not in outputs:
            content = hashlib.sha256(tensor.raw_data).digest()
            name = first.setdefault((tensor.data_type, tuple(tensor.dims), content), tensor.name)
            if name != tensor.name:
                again[tensor.name] = name
    if not again:
        return
    _rename_all(graph, again)
    kept = [tensor for tensor in graph.initializer if tensor.name not in again]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def unique(graph: onnx.GraphProto, name: str) -> str:
    """``name``, or with underscores until nothing in the graph is called so."""
    taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        taken.update((*node.input, *node.output))
        for subgraph in subgraphs(node):
            _names(subgraph, taken)
    while name in taken:
        name += "_"
    return name


def _names(graph: onnx.GraphProto, names: set[str]) -> None:
    names.update(value.name for value in (*graph.input, *graph.output, *graph.initializer))
    for node in graph.node:
        names.update((*node.input, *node.output))
        for subgraph in subgraphs(node):
            _names(subgraph, names)


def drop_remarks(graph: onnx.GraphProto) -> None:
    """Remove what exporters note at every node: of a small model it can be half the file."""
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for node in graph.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
        for subgraph in subgraphs(node):
            drop_remarks(subgraph)


def shorten_names(graph: onnx.GraphProto) -> None:
    """Names of hundreds of letters inside the graph keep their ends: every Q and DQ repeats them."""
    doors = {value.name for value in (*graph.input, *graph.output)}
    taken = doors | names_read(graph) | {name for node in graph.node for name in (node.name, *node.output)}
    inside = [tensor.name for tensor in graph.initializer]
    inside += [name for node in graph.node for name in node.output]
    shorter: dict[str, str] = {}
    for name in inside:
        if len(name) > _LONGEST_NAME and name not in doors:
            shorter[name] = _short(name, taken)
    _rename_all(graph, shorter)
    for part in (*graph.initializer, *graph.value_info):
        part.name = shorter.get(part.name, part.name)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name in shorter:
                node.output[index] = shorter[name]
        if len(node.name) > _LONGEST_NAME:
            node.name = _short(node.name, taken)


def _short(name: str, taken: set[str]) -> str:
    end = name[-_LONGEST_NAME // 2 :]
    short = next(
        each for each in (end, *(f"{end}_{count}" for count in range(2, len(taken) + 3))) if each not in taken
    )
    taken.add(short)
    return short


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node behind those it reads from, as ONNX asks for. A graph that is so is left as it is."""
    for node in graph.node:
        for subgraph in subgraphs(node):
            sort_nodes(subgraph)
    made = {name for node in graph.node for name in node.output if name}
    left, order, known = list(graph.node), [], set[str]()
    while left:
        later = []
        for node in left:
            if all(name in known for name in _needs(node) & made):
                order.append(node)
                known.update(node.output)
            else:
                later.append(node)
        if len(later) == len(left):
            return  # a cycle, which onnxruntime refuses
        left = later
    if any(node is not other for node, other in zip(order, graph.node, strict=True)):
        replace_nodes(graph, order)


def _needs(node: onnx.NodeProto) -> set[str]:
    return reads(node) | {value.name for body in subgraphs(node) for value in body.output}


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put ``nodes`` in place of the graph's own."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
