"""The service of the usual tutorial: FastAPI, pydantic, uvicorn, onnxruntime."""

import os

import numpy as np
import onnxruntime as ort
from fastapi import FastAPI
from pydantic import BaseModel

options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()


class Row(BaseModel):
    """What is asked."""

    features: list[float]


class Verdict(BaseModel):
    """What is answered."""

    decision: str
    score: float


@app.post("/predict")
async def predict(row: Row) -> Verdict:
    """One row in, one decision out."""
    (scores,) = session.run(["score"], {"x": np.array([row.features], dtype=np.float32)})
    score = float(scores[0])
    return Verdict(decision="fail" if score > 1.0 else "pass", score=score)
