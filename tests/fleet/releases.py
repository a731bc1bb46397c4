"""Bundles whose members are plain bytes: nothing on the fleet side looks into them."""

from __future__ import annotations

from pathlib import Path

from edge_agent.contract.bundle import MODEL, RULES, Bundle, write_bundle
from edge_agent.contract.manifest import Datatype, Decision, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version


def bundle(folder: Path, version: str, *, name: str = "pump", model: bytes | None = None) -> Bundle:
    """A bundle that differs from other versions in its model only: rules.yaml is shared."""
    folder.mkdir(parents=True)
    manifest = Manifest(
        name=name,
        version=Version(version),
        task=Task.ANOMALY,
        inputs=(TensorSpec("x", Datatype.FP32, (-1, 2)),),
        outputs=(TensorSpec("score", Datatype.FP32, (-1,)),),
        members={},
        decision=Decision("score", 1.0),
    )
    files = {MODEL: model or b"weights of " + version.encode() * 50, RULES: b"default: fail\n"}
    return write_bundle(folder, manifest, files)
