"""Train the example's FP32 autoencoder: ``python -m examples.train_autoencoder [FILE]``.

A denoising autoencoder 30-512-256-16-256-512-30 on the good rows of ``examples.dataset``, trained with
scikit-learn and written as plain ONNX (Gemm and Relu), 1.2 MB. It expects standard-scaled inputs and returns
their reconstruction: missing values, scaling and the score are for ``quantize-model`` to put into the graph.

The noise has one standard deviation of the features: with less, 150 rows are few enough for the network to
copy its input, bad rows included. Everything is seeded: the same machine and versions give the same file;
another BLAS gives other last bits, which is why the file is committed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from examples import dataset

OUTPUT: Final = Path(__file__).parent / "data" / "autoencoder_fp32.onnx"
HIDDEN: Final = (512, 256, 16, 256, 512)
NOISE: Final = 1.0  # standard deviations of the scaled features
COPIES: Final = 16  # noisy copies of every training row
EPOCHS: Final = 20
SEED: Final = 0


def train(rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights (inputs, outputs) and biases of each layer, trained on scaled good ``rows``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    random = np.random.default_rng(SEED)
    targets = np.concatenate([rows] * COPIES)
    noisy = targets + NOISE * random.standard_normal(targets.shape)
    network = MLPRegressor(hidden_layer_sizes=HIDDEN, alpha=0.01, max_iter=EPOCHS, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is chosen, not reached
        network.fit(noisy, targets)
    return list(zip(network.coefs_, network.intercepts_, strict=True))


def to_onnx(layers: list[tuple[np.ndarray, np.ndarray]]) -> onnx.ModelProto:
    """The network as ``x [N, inputs] -> reconstruction [N, inputs]``."""
    nodes, initializers, tensor = [], [], "x"
    for index, (weights, bias) in enumerate(layers):
        last = index == len(layers) - 1
        for name, values in ((f"W{index}", weights), (f"b{index}", bias)):
            initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
        output = "reconstruction" if last else f"h{index}"
        nodes.append(helper.make_node("Gemm", [tensor, f"W{index}", f"b{index}"], [output], f"dense{index}"))
        if not last:
            nodes.append(helper.make_node("Relu", [output], [f"{output}_relu"], f"relu{index}"))
        tensor = f"{output}_relu"
    width = layers[0][0].shape[0]
    graph = helper.make_graph(
        nodes,
        "autoencoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("reconstruction", TensorProto.FLOAT, ["N", width])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def main() -> int:
    """Train, write the file, print what it reaches on held-out rows (FP32, scaled like the training rows)."""
    parser = argparse.ArgumentParser(prog="python -m examples.train_autoencoder", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=OUTPUT)
    file: Path = parser.parse_args().file

    split = dataset.load()
    mean, deviation = split.train.mean(axis=0), split.train.std(axis=0)
    layers = train((split.train - mean) / deviation)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(to_onnx(layers), file)

    from sklearn.metrics import roc_auc_score

    scaled = values = (split.held_out - mean) / deviation
    for index, (weights, bias) in enumerate(layers):
        values = values @ weights + bias
        if index < len(layers) - 1:
            values = np.maximum(values, 0)
    auc = roc_auc_score(split.labels, ((values - scaled) ** 2).mean(axis=1))
    sys.stdout.write(f"{file}: {file.stat().st_size / 1e6:.2f} MB, ROC-AUC on held-out rows {auc:.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
