"""Bundles small enough to be written a hundred times: the store does not look inside the members."""

from __future__ import annotations

from pathlib import Path

from edge_agent.contract.bundle import MODEL, RULES, Bundle, write_bundle
from edge_agent.contract.manifest import Datatype, Decision, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version


def plain_bundle(
    folder: Path, version: str, *, name: str = "demo", model: bytes = b"", rules: bytes = b"default: fail\n"
) -> Bundle:
    """A bundle of two members; without ``model`` its bytes depend on the version."""
    folder.mkdir(parents=True)
    manifest = Manifest(
        name=name,
        version=Version(version),
        task=Task.ANOMALY,
        inputs=(TensorSpec("features", Datatype.FP32, (-1, 2)),),
        outputs=(TensorSpec("score", Datatype.FP32, (-1,)),),
        members={},
        decision=Decision("score", 1.0),
    )
    return write_bundle(folder, manifest, {MODEL: model or version.encode() * 500, RULES: rules})
