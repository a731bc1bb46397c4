"""BentoML, one worker."""

import os

import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service(workers=1, traffic={"timeout": 10})
class Autoencoder:
    """One row in, one decision out."""

    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    @bentoml.api
    def predict(self, features: list[float]) -> dict:
        (scores,) = self.session.run(["score"], {"x": np.array([features], dtype=np.float32)})
        score = float(scores[0])
        return {"decision": "fail" if score > 1.0 else "pass", "score": score}
