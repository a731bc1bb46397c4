"""The two dense autoencoders that pruning is measured on, trained here with numpy: nothing to download.

512 correlated sensors follow 24 slow latent processes (AR(1)) plus noise of their own; an anomaly disturbs
8 to 40 of them with noise as large as their signal. ``python -m benchmarks.autoencoders FOLDER [NAME]``
trains one (narrow or wide) into ``FOLDER/NAME/{model.onnx, calibration.npz, validation.npz}``; what is there
is kept. The wide one takes about ten minutes on two cores.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

SENSORS = 512
WIDTHS = {
    "narrow": (2048, 1024, 64, 1024, 2048),  # 25.7 MB
    "wide": (8192, 2560, 64, 2560, 8192),  # 202 MB
}
EPOCHS = {"narrow": 4, "wide": 3}
TRAINING, CALIBRATION, VALIDATION = 20_000, 2_815, 4_000  # rows
LATENT, MEMORY, NOISE = 24, 0.95, 0.42  # processes, AR(1) coefficient, standard deviation
DISTURBED = 1.0  # standard deviation of what an anomaly adds
BATCH = 256


def sensors(count: int, seed: int) -> np.ndarray:
    """Rows of normal operation: (count, 512) float32, unit variance."""
    chance = np.random.default_rng(seed)
    mixing = np.random.default_rng(42).normal(size=(LATENT, SENSORS)) / LATENT**0.5
    state = chance.normal(size=LATENT)
    latent = np.empty((count, LATENT))
    for row in range(count):
        state = MEMORY * state + (1 - MEMORY**2) ** 0.5 * chance.normal(size=LATENT)
        latent[row] = state
    scale = (1 - NOISE**2) ** 0.5 / np.sqrt((mixing**2).sum(axis=0))
    return ((latent @ mixing) * scale + NOISE * chance.normal(size=(count, SENSORS))).astype(np.float32)


def labelled(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Half good, half anomalous rows, and the labels (1 = bad)."""
    chance = np.random.default_rng(seed + 1)
    rows, labels = sensors(count, seed), np.arange(count) % 2
    for row in np.flatnonzero(labels):
        hit = chance.choice(SENSORS, chance.integers(8, 41), replace=False)
        rows[row, hit] += chance.normal(0, DISTURBED, len(hit)).astype(np.float32)
    return rows, labels


def train(
    rows: np.ndarray, widths: tuple[int, ...], epochs: int, seed: int = 0, noise: float = 0.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train a Relu autoencoder by Adam on the mean squared error.

    Args:
        rows: (n, features) float32, scaled.
        widths: of the hidden layers.
        epochs: passes over ``rows``.
        seed: of weights, order and noise.
        noise: standard deviation of what is added to a row that is to be given back without it.

    Returns:
        Weights (in, out) and biases of each layer.
    """
    chance = np.random.default_rng(seed)
    sizes = [rows.shape[1], *widths, rows.shape[1]]
    layers = [
        [
            (chance.standard_normal((a, b), np.float32) * np.float32((1 / (3 * a)) ** 0.5)),
            np.zeros(b, np.float32),
        ]
        for a, b in itertools.pairwise(sizes)
    ]
    first = [[np.zeros_like(tensor) for tensor in layer] for layer in layers]
    second = [[np.zeros_like(tensor) for tensor in layer] for layer in layers]
    steps = epochs * (len(rows) // BATCH)
    began, said, step = time.perf_counter(), 0.0, 0
    for epoch in range(epochs):
        order, losses = chance.permutation(len(rows)), []
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            step += 1
            clean = rows[order[start : start + BATCH]]
            seen = [clean]
            if noise:
                seen = [clean + np.float32(noise) * chance.standard_normal(clean.shape, np.float32)]
            for index, (weight, bias) in enumerate(layers):
                out = seen[-1] @ weight + bias
                seen.append(np.maximum(out, 0) if index < len(layers) - 1 else out)
            slope = (seen[-1] - clean) * np.float32(2 / BATCH)
            losses.append(float(((seen[-1] - clean) ** 2).mean()))
            rate = 1e-3 * min(1.0, step / 40) * 0.5 * (1 + np.cos(np.pi * step / steps))
            for index in range(len(layers) - 1, -1, -1):
                gradients = (seen[index].T @ slope, slope.sum(axis=0))
                if index:
                    slope = (slope @ layers[index][0].T) * (seen[index] > 0)
                for kind, gradient in enumerate(gradients):
                    _adam(layers[index][kind], first[index][kind], second[index][kind], gradient, step, rate)
        spent = time.perf_counter() - began
        if epoch == epochs - 1 or spent - said > 10:
            said = spent
            loss = np.mean(losses[-20:])
            print(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}, {spent:.0f} s", file=sys.stderr, flush=True)
    return [(weight, bias) for weight, bias in layers]


def _adam(
    tensor: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    gradient: np.ndarray,
    step: int,
    rate: float,
) -> None:
    first += np.float32(0.1) * (gradient - first)
    np.multiply(gradient, gradient, out=gradient)
    second += np.float32(0.001) * (gradient - second)
    np.sqrt(second, out=gradient)
    gradient += np.float32(1e-8)
    np.divide(first, gradient, out=gradient)
    gradient *= np.float32(rate * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step))
    tensor -= gradient


def write(path: Path, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Gemm (transB) and Relu, as PyTorch exports it."""
    features = layers[0][0].shape[0]
    nodes, weights, tensor = [], [], "x"
    for index, (weight, bias) in enumerate(layers):
        last = index == len(layers) - 1
        out = "y" if last else f"h{index}"
        weights.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"layer{index}.weight"))
        weights.append(numpy_helper.from_array(bias, f"layer{index}.bias"))
        reads = [tensor, f"layer{index}.weight", f"layer{index}.bias"]
        nodes.append(helper.make_node("Gemm", reads, [out], f"layer{index}", transB=1))
        tensor = out
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"r{index}"], f"relu{index}"))
            tensor = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "autoencoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", features])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, path)


def made(folder: Path, name: str) -> Path:
    """The folder with the trained model and its data; trains it if it is not there yet."""
    target = folder / name
    if not (target / "model.onnx").exists():
        target.mkdir(parents=True, exist_ok=True)
        np.savez(target / "calibration.npz", X=sensors(CALIBRATION, seed=2))
        rows, labels = labelled(VALIDATION, seed=3)
        np.savez(target / "validation.npz", X=rows, y=labels)
        part = target / "model.part"
        write(part, train(sensors(TRAINING, seed=1), WIDTHS[name], EPOCHS[name]))
        part.rename(target / "model.onnx")
    return target


if __name__ == "__main__":
    for wanted in sys.argv[2:] or list(WIDTHS):
        print(made(Path(sys.argv[1]), wanted))
