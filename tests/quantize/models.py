"""Small FP32 models and data built in code, and the command as a function."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize.cli import main

WIDTH = 12
NAMES = tuple(f"sensor_{index}" for index in range(WIDTH))


def rows(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Correlated features of very different units: (count, width) float32."""
    random = np.random.default_rng(seed)
    latent = random.standard_normal((count, 3))
    mixing = np.random.default_rng(99).standard_normal((3, width))
    units = np.logspace(-2, 3, width)
    return ((latent @ mixing + 0.1 * random.standard_normal((count, width)) + 4) * units).astype(np.float32)


def bad_rows(count: int, seed: int = 1) -> np.ndarray:
    """Rows whose features are no longer correlated as they should be."""
    good = rows(count, seed)
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(column) for column in good.T], axis=1) * np.float32(1.3)


def save(path: Path, nodes, weights, inputs, outputs, *, opset: int = 17, ir: int = 8) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def dense(shapes: list[int], seed: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = {}
    for index, (inputs, outputs) in enumerate(pairwise(shapes)):
        scale = np.sqrt(2 / inputs)
        weights[f"W{index}"] = (random.standard_normal((inputs, outputs)) * scale).astype(np.float32)
        weights[f"b{index}"] = (random.standard_normal(outputs) * 0.1).astype(np.float32)
    return weights


def autoencoder(path: Path, *, opset: int = 17, matmul: bool = False, constants: bool = False) -> Path:
    """12-64-64-12 for scaled inputs: Gemm, or MatMul and Add; weights optionally as Constant nodes."""
    weights = dense([WIDTH, 64, 64, WIDTH])
    nodes, tensor = [], "x"
    if constants:
        nodes += [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))
            for name, values in weights.items()
        ]
    for index in range(3):
        out = "y" if index == 2 else f"h{index}"
        if matmul:
            nodes.append(helper.make_node("MatMul", [tensor, f"W{index}"], [f"m{index}"]))
            nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [out]))
        else:
            nodes.append(helper.make_node("Gemm", [tensor, f"W{index}", f"b{index}"], [out]))
        if index < 2:
            nodes.append(helper.make_node("Relu", [out], [f"r{index}"]))
        tensor = f"r{index}"
    return save(
        path,
        nodes,
        {} if constants else weights,
        [("x", TensorProto.FLOAT, ["N", WIDTH])],
        [("y", ["N", WIDTH])],
        opset=opset,
        ir=8 if opset >= 17 else 4,
    )


def convolution(path: Path) -> Path:
    """Two convolutions, pooling, a dense layer with four classes; images [N, 3, 16, 16]."""
    random = np.random.default_rng(5)
    weights = {
        "K0": (random.standard_normal((16, 3, 3, 3)) * 0.3).astype(np.float32),
        "k0": (random.standard_normal(16) * 0.1).astype(np.float32),
        "K1": (random.standard_normal((32, 16, 3, 3)) * 0.1).astype(np.float32),
        "k1": (random.standard_normal(32) * 0.1).astype(np.float32),
        "W": (random.standard_normal((4, 512)) * 0.1).astype(np.float32),
        "b": np.zeros(4, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "K0", "k0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "K1", "k1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["c1", "zero", "six"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p1"], ["f"]),
        helper.make_node("Gemm", ["f", "W", "b"], ["classes"], transB=1),
    ]
    weights |= {"zero": np.float32(0), "six": np.float32(6)}
    weights = {name: np.asarray(values) for name, values in weights.items()}
    inputs = [("image", TensorProto.FLOAT, ["N", 3, 16, 16])]
    return save(path, nodes, weights, inputs, [("classes", ["N", 4])])


def images(count: int) -> np.ndarray:
    return np.random.default_rng(6).standard_normal((count, 3, 16, 16)).astype(np.float32)


def scorer(path: Path, *, batch: str | int = "N") -> Path:
    """A dense model whose only output [N, 1] is its score."""
    weights = dense([WIDTH, 32, 1])
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W1", "b1"], ["risk"]),
    ]
    inputs = [("x", TensorProto.FLOAT, [batch, WIDTH])]
    return save(path, nodes, weights, inputs, [("risk", [batch, 1])])


def write_rows(path: Path, values: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, X=values, **more)
    return path


def quantize(model: Path, data: Path, out: Path, *options: str) -> int:
    """``quantize-model`` in this process; its exit code."""
    common = ["--calibration", str(data), "--name", "unit", "--version", "1.2.3", "--out", str(out)]
    return main([str(model), *common, *options])


def quantize_fast(model: Path, data: Path, out: Path, *options: str) -> int:
    """The same with ``--fast``, for tests that are not about the search."""
    return quantize(model, data, out, "--fast", *options)
