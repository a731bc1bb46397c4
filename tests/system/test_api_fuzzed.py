"""Schemathesis against a real agent and its /openapi.json: no 5xx, nothing undescribed, nothing bad accepted.

Schemathesis is not among the test dependencies: ``pip install schemathesis`` into an environment of its own,
put its ``bin`` on the PATH and this runs. ``EDGE_FUZZ_EXAMPLES`` (per operation) and ``EDGE_FUZZ_SEED`` steer
it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.agents import AgentProcess, run_cli
from tests.support.bundles import tiny_bundle

EXAMPLES = os.environ.get("EDGE_FUZZ_EXAMPLES", "30")

CONFIG = """
[parameters]
"path.model" = "demo"
"path.version" = "1.0.0"

# The document cannot say how many features the model at hand takes: a row of another width is a 400.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "409"]
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    program = shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not on the PATH: pip install schemathesis, in an environment of its own")
    bundle = tiny_bundle(tmp_path / "bundle")
    agent = AgentProcess(tmp_path / "agent")
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    agent.start()
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    seed = os.environ.get("EDGE_FUZZ_SEED")
    try:
        done = subprocess.run(
            [
                program, "--config-file", str(tmp_path / "schemathesis.toml"), "run",
                f"http://127.0.0.1:{agent.port}/openapi.json", "--max-examples", EXAMPLES, "--no-color",
                "--continue-on-failure", *(["--seed", seed] if seed else []),
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        assert agent.predict([1, 1, 1, 1])["source"] == "model"
    finally:
        agent.stop()
    errors = [line for line in agent.log.read_text().splitlines() if json.loads(line)["level"] == "error"]
    assert errors == []
