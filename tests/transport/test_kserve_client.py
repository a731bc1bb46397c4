"""KServe's own REST client against this server: ``pip install kserve`` runs it.

It is not among the test dependencies: it brings Kubernetes, FastAPI, gRPC and a hundred megabytes with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from tests.support.bundles import expected_score
from tests.transport.agent import Agent

kserve = pytest.importorskip("kserve", reason="kserve is not installed: pip install kserve")
RequestedOutput = kserve.protocol.infer_type.RequestedOutput

pytestmark = pytest.mark.filterwarnings("default")  # its dependencies warn about each other

ROWS = np.array([[1, 2, 3, 4], [0.5, -0.5, 0.5, -0.5], [3, 3, 3, 3]], np.float32)


@pytest.fixture
def url(agent: Agent) -> str:
    return agent.listen().url


def _with_client(work: Any) -> Any:
    async def run() -> Any:
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", retries=1, timeout=20))
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def _request(*, binary: bool, rows: np.ndarray[Any, Any] = ROWS) -> Any:
    tensor = kserve.InferInput("features", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=binary)
    return kserve.InferRequest(model_name="demo", infer_inputs=[tensor], request_id="request-7")


def test_it_finds_the_server_and_the_model_live_and_ready(url: str) -> None:
    async def ask(client: Any) -> tuple[bool, bool, bool]:
        return (
            await client.is_server_live(url),
            await client.is_server_ready(url),
            await client.is_model_ready(url, "demo"),
        )

    assert _with_client(ask) == (True, True, True)


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "json out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "json in"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "single"])
def test_it_infers(url: str, rows: np.ndarray[Any, Any], binary_in: bool, binary_out: bool) -> None:
    request = _request(binary=binary_in, rows=rows)
    request.request_outputs = [RequestedOutput("score", parameters={"binary_data": binary_out})]

    def ask(client: Any) -> Coroutine[Any, Any, Any]:
        return client.infer(url, request, model_name="demo")

    response = _with_client(ask)
    assert (response.id, response.model_name) == ("request-7", "demo")  # kserve 0.21 keeps no version
    (output,) = response.outputs
    np.testing.assert_allclose(output.as_numpy(), expected_score(rows), rtol=1e-6)


def test_it_reads_our_errors(url: str) -> None:
    def ask(client: Any) -> Coroutine[Any, Any, Any]:
        return client.infer(url, _request(binary=False, rows=ROWS[:, :2].copy()), model_name="demo")

    with pytest.raises(Exception, match="400"):
        _with_client(ask)
