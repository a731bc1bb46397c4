"""LitServe, one worker, no batching: its batches wait for a timeout."""

import os

import litserve
import numpy as np
import onnxruntime as ort


class Autoencoder(litserve.LitAPI):
    """One row in, one decision out."""

    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        return np.array([request["features"]], dtype=np.float32)

    def predict(self, rows):
        return self.session.run(["score"], {"x": rows})[0]

    def encode_response(self, scores):
        score = float(scores[0])
        return {"decision": "fail" if score > 1.0 else "pass", "score": score}


if __name__ == "__main__":
    server = litserve.LitServer(Autoencoder(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(os.environ["PORT"]), num_api_servers=1, generate_client_file=False,
        log_level="warning", access_log=False,
    )  # fmt: skip
