"""The import rules hold, and the check that says so notices when they do not.

import-linter checks the same (pyproject.toml); this needs nothing but pytest and also covers who may import
which third-party package. docs/architecture.md draws the picture.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("edge_agent", "quantize", "fleet")

# Upper layers import lower ones only; neighbours in one layer do not import each other.
LAYERS: Final = (
    ("cli",),
    ("app",),
    ("transport", "update", "standby"),
    ("serving",),
    ("rules", "drift", "store"),
    ("telemetry",),
    ("config",),
    ("errors",),
    ("contract",),
)

# What the other two programs use of the agent. The most specific entry counts.
USES: Final = {
    "quantize": ("contract", "rules", "drift", "errors"),
    "fleet": ("contract",),
    "fleet.simulate": ("contract", "update", "store", "config", "errors", "telemetry"),
}

# Who may import a third-party package; a package not named here is anybody's, except contract's.
ONLY_IN: Final = {
    "onnxruntime": ("edge_agent.serving.engine", "quantize"),
    "onnx": ("quantize",),
    "aiomqtt": (),
    "paho": (),
    "tuf": ("edge_agent.update", "fleet"),
    "securesystemslib": ("edge_agent.update", "fleet"),
    "cryptography": ("edge_agent.update", "fleet"),
}
CONTRACT_USES: Final = ("msgspec",)


class Import(NamedTuple):
    """``module`` imports ``target`` (a dotted name) on ``line``."""

    module: str
    target: str
    line: int


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that a rule forbids, as one sentence each."""
    return [
        f"{found.module}:{found.line} imports {found.target}: {rule}"
        for found in _imports(root)
        if (rule := _broken_rule(found))
    ]


def _broken_rule(found: Import) -> str | None:
    module, target = found.module, found.target
    package, top = module.split(".")[0], target.split(".")[0]
    if module == "edge_agent":
        return None if target == "__future__" else "edge_agent/__init__.py imports nothing"
    if top in ONLY_IN and not any(_within(module, owner) for owner in ONLY_IN[top]):
        owners = ", ".join(ONLY_IN[top])
        return f"{top} is imported only in {owners}" if owners else f"{top} is imported nowhere"
    if _within(module, "edge_agent.contract") and not (
        top in sys.stdlib_module_names or top in CONTRACT_USES or _within(target, "edge_agent.contract")
    ):
        return "contract uses itself, the standard library and msgspec"
    if top not in PACKAGES:
        return None
    if package != top:
        return _broken_wall(module, target)
    if package == "edge_agent":
        return _broken_layer(module, target)
    return None


def _broken_wall(module: str, target: str) -> str | None:
    if not _within(target, "edge_agent"):
        return "the programs do not import each other"
    if target == "edge_agent":  # the version
        return None
    if _within(module, "edge_agent"):
        return "the device knows nothing of the workstation or the operator"
    user = max((name for name in USES if _within(module, name)), key=len)
    if target.split(".")[1] in USES[user]:
        return None
    return f"{user} uses only {', '.join(USES[user])} of the agent"


def _broken_layer(module: str, target: str) -> str | None:
    if target == "edge_agent":
        return None
    ours, theirs = module.split(".")[1], target.split(".")[1]
    if ours == theirs:
        return None
    depth = {name: level for level, names in enumerate(LAYERS) for name in names}
    for name in (ours, theirs):
        if name not in depth:
            return f"{name} is in no layer"
    if depth[ours] < depth[theirs]:
        return None
    return f"{ours} is not above {theirs}"


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _imports(root: Path) -> Iterator[Import]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            inside = parts[:-1]
            module = ".".join(inside if parts[-1] == "__init__" else parts)
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.Import):
                    for name in node.names:
                        yield Import(module, name.name, node.lineno)
                elif isinstance(node, ast.ImportFrom):
                    up = len(inside) - node.level + 1
                    source = (
                        ".".join((*inside[:up], *filter(None, [node.module]))) if node.level else node.module
                    )
                    assert source is not None
                    for name in node.names:
                        inner = f"{source}.{name.name}"
                        yield Import(module, inner if _is_module(root, inner) else source, node.lineno)


def _is_module(root: Path, name: str) -> bool:
    path = root / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def _sources(name: str) -> list[str]:
    """The importable modules under a package folder."""
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / name).rglob("*.py")
    )


def test_no_import_crosses_a_wall() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("edge_agent/app.py", "import quantize", "the programs do not import each other"),
        ("edge_agent/update/updater.py", "from fleet import cli", "the programs do not import each other"),
        ("edge_agent/__init__.py", "import json", "imports nothing"),
        ("edge_agent/contract/manifest.py", "import numpy as np", "contract uses itself"),
        ("edge_agent/contract/wire.py", "from edge_agent.errors import EdgeError", "contract uses itself"),
        ("edge_agent/errors.py", "from . import config", "errors is not above config"),
        ("edge_agent/store/fs.py", "from ..serving import engine", "store is not above serving"),
        ("edge_agent/rules/parse.py", "import edge_agent.drift.window", "rules is not above drift"),
        ("edge_agent/transport/http.py", "from edge_agent.update import machine", "transport is not above"),
        (
            "edge_agent/update/machine.py",
            "def f():\n    import edge_agent.transport.http",
            "update is not above",
        ),
        ("edge_agent/extra.py", "import edge_agent.errors", "extra is in no layer"),
        ("edge_agent/serving/service.py", "import onnxruntime as ort", "onnxruntime is imported only in"),
        ("fleet/measure.py", "from onnxruntime import InferenceSession", "onnxruntime is imported only in"),
        ("edge_agent/transport/http.py", "import aiomqtt", "aiomqtt is imported nowhere"),
        ("edge_agent/app.py", "from paho.mqtt import client", "paho is imported nowhere"),
        ("edge_agent/app.py", "from tuf.ngclient import Updater", "tuf is imported only in"),
        ("edge_agent/serving/engine.py", "import onnx", "onnx is imported only in"),
        ("quantize/bundle.py", "from edge_agent.store import store", "quantize uses only contract"),
        ("quantize/cli.py", "import fleet.release", "the programs do not import each other"),
        ("fleet/cli.py", "from edge_agent import rules", "fleet uses only contract"),
        ("fleet/controller.py", "from edge_agent.update import updater", "fleet uses only contract"),
        ("fleet/simulate.py", "from edge_agent.serving import service", "fleet.simulate uses only"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = violations(tmp_path)
    changed = tmp_path / file
    with changed.open("a") as source:
        source.write(f"\n{line}\n")

    (found,) = [new for new in violations(tmp_path) if new not in before]

    assert complaint in found
    assert found.startswith(re.sub(r"/__init__|\.py", "", file).replace("/", ".") + ":")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("quantize/bundle.py", "from edge_agent import __version__\nfrom edge_agent.rules import parse"),
        ("fleet/simulate.py", "from edge_agent.update import updater\nfrom edge_agent.store import store"),
        ("edge_agent/cli.py", "from edge_agent import app, config"),
        ("edge_agent/serving/engine.py", "import onnxruntime"),
    ],
)
def test_an_allowed_import_is_not(tmp_path: Path, file: str, line: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = violations(tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    assert violations(tmp_path) == before


def _import_without(absent: tuple[str, ...], statements: str) -> None:
    """Run ``statements`` in a Python where importing any of ``absent`` raises ImportError."""
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"{statements}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_contract_works_where_only_msgspec_is_installed() -> None:
    modules = ", ".join(_sources("edge_agent/contract"))
    others = ("onnxruntime", "numpy", "yaml", "tuf", "securesystemslib", "prometheus_client", "aiomqtt")
    _import_without(others, f"import {modules}")


def test_edge_fleet_works_where_onnxruntime_is_not_installed() -> None:
    modules = ", ".join(_sources("fleet"))
    help_screen = (
        "import fleet.cli\n"
        "try: code = fleet.cli.main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "sys.exit(code)"
    )
    _import_without(("onnxruntime", "onnx"), f"import {modules}\n{help_screen}")
