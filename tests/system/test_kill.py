"""kill -9 of a real agent at random moments of real updates under load.

``EDGE_KILLS`` says how often; ``make test-kill`` takes 500, the normal suite a bounded sample.
"""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from edge_agent.contract.assignments import Release
from fleet.release import with_stable
from fleet.repository import Keys, Repository
from tests.support.agents import AgentProcess, Stream
from tests.support.bundles import tiny_bundle

KILLS = int(os.environ.get("EDGE_KILLS", "6"))
SHORTEST_UPDATE = 1.0  # seconds from an assignment to the end of probation, on an idle machine


@pytest.mark.timeout(60 + 20 * KILLS)
def test_a_killed_agent_always_serves_after_restart_old_or_new_never_neither(tmp_path):
    seed = int(os.environ.get("EDGE_SEED", random.SystemRandom().randrange(1 << 30)))
    chance = random.Random(seed)
    print(f"seed {seed}")
    repository = Repository.create(tmp_path / "repository", Keys(tmp_path / "keys"))
    releases = [
        repository.publish(tiny_bundle(tmp_path / version, version=version)).release
        for version in ("1.0.0", "2.0.0")
    ]
    assign(repository, releases[0])
    root = tmp_path / "root.json"
    root.write_bytes(repository.root())
    agent = AgentProcess(
        tmp_path / "agent",
        updates={
            "source": str(repository.path),
            "root": str(root),
            "interval_seconds": 0.2,
            # A kill is not the model's fault here: the limit on restarts has its own test.
            "probation": {"seconds": 0.3, "requests": 5, "max_seconds": 5, "max_restarts": 1000},
        },
        serving={"deadline_ms": 5000},  # how long the machine takes is not what is looked at
    )
    agent.start()
    agent.wait_for(version="1.0.0", source="model")
    seen = set()
    assign(repository, releases[1])
    began = time.monotonic()
    agent.wait_for(version="2.0.0", source="model")
    longest = max(SHORTEST_UPDATE, 2 * (time.monotonic() - began))  # kills fall anywhere in it, and after it
    try:
        with Stream(agent, [0.1, 0.2, 0.3, 0.4]) as stream:
            for number in range(KILLS):
                target = releases[number % 2]
                assign(repository, target)
                threading.Event().wait(chance.uniform(0, longest))  # the moment is the experiment
                agent.kill()
                agent.start()
                answer = agent.wait_for(source="model")
                assert answer["version"] in {"1.0.0", "2.0.0"}
                seen.add(answer["version"] == target.version)
                agent.wait_for(version=target.version, source="model")  # and the update ends where it should
        assert not stream.wrong
        assert {source for source, _, _ in stream.answers} == {"model"}
    finally:
        agent.stop()
    print(f"{KILLS} kills, restarted on the new release: {sorted(seen)}")


def assign(repository: Repository, release: Release) -> None:
    repository.assign(with_stable(repository.assignments(), "demo", release))
