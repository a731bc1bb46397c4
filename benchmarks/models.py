"""Models to measure with: dense autoencoders of a given width with random weights, made in code."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

FEATURES = 512


def autoencoder(path: Path, widths: list[int], features: int = FEATURES, seed: int = 0) -> Path:
    """Write an FP32 autoencoder ``features -> widths -> features`` (Gemm, Relu); He-scaled random weights."""
    chance = np.random.default_rng(seed)
    sizes = [features, *widths, features]
    nodes, weights, name = [], [], "x"
    for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
        matrix = chance.normal(0, (2 / before) ** 0.5, (before, after)).astype(np.float32)
        bias = chance.normal(0, 0.01, after).astype(np.float32)
        weights += [
            numpy_helper.from_array(matrix, f"w{layer}"),
            numpy_helper.from_array(bias, f"b{layer}"),
        ]
        last = layer == len(sizes) - 2
        output = "y" if last else f"h{layer}"
        nodes.append(
            helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [output if last else f"g{layer}"])
        )
        if not last:
            nodes.append(helper.make_node("Relu", [f"g{layer}"], [output]))
        name = output
    graph = helper.make_graph(
        nodes,
        "autoencoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", features])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    save(model, path)
    return path


def rows(count: int, features: int = FEATURES, seed: int = 1) -> np.ndarray:
    """Correlated rows, as sensors give them: (count, features) float32."""
    chance = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(24, features))
    return (chance.normal(size=(count, 24)) @ mixing / 24**0.5).astype(np.float32)
