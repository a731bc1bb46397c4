"""/openapi.json, /docs and the page: complete, self-contained, and true."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge_agent.transport import openapi, routes
from edge_agent.transport.page import DOCS_PAGE, PAGE
from tests.transport.agent import Agent, Client

DOCUMENT = json.loads(openapi.openapi_document("0.0.0"))
METHODS = {(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods}


def _routed() -> set[str]:
    """Every path of the ``case`` patterns of ``Routes._resolve``, names in braces."""
    tree = ast.parse(Path(routes.__file__).read_text())
    (resolve,) = (node for node in ast.walk(tree) if getattr(node, "name", None) == "_resolve")
    whole, rests = set(), set()
    for case in (node for node in ast.walk(resolve) if isinstance(node, ast.match_case)):
        for pattern in case.pattern.patterns if isinstance(case.pattern, ast.MatchOr) else [case.pattern]:
            if not isinstance(pattern, ast.MatchSequence):
                continue
            parts = [_part(part) for part in pattern.patterns]
            if parts[:1] and parts[0] not in ("ready", "infer", "stats"):
                whole.add("/" + "/".join(parts))
            else:
                rests.add("".join(f"/{part}" for part in parts))
    open_ended = {path for path in whole if path.endswith("*")}
    return (whole - open_ended) | {path.removesuffix("/*") + rest for path in open_ended for rest in rests}


def _part(part: ast.pattern) -> str:
    match part:
        case ast.MatchValue(value=ast.Constant(value=str(text))):
            return text
        case ast.MatchAs(name=str(name)):
            return {"model": "{model}", "named": "{version}"}[name]
        case _:
            return "*"


def test_every_path_of_the_port_is_described_and_no_other() -> None:
    on_the_port = {path for path in _routed() if not path.startswith("/admin/")} - {"/v2/"}
    assert on_the_port == set(DOCUMENT["paths"])


def test_every_reference_leads_somewhere_and_every_name_is_used() -> None:
    text = json.dumps(DOCUMENT)
    used = set(re.findall(r'"#/components/(\w+)/(\w+)"', text))
    there = {(kind, name) for kind in DOCUMENT["components"] for name in DOCUMENT["components"][kind]}
    assert used <= there
    assert {pair for pair in there if pair[0] != "securitySchemes"} == used


def test_operation_ids_are_unique_and_every_tag_is_explained() -> None:
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    identifiers = [operation["operationId"] for operation in operations]
    assert len(set(identifiers)) == len(identifiers)
    assert {tag for operation in operations for tag in operation["tags"]} == {
        tag["name"] for tag in DOCUMENT["tags"]
    }


@pytest.mark.parametrize(("path", "method"), sorted(METHODS))
def test_what_is_described_is_answered_as_described(
    agent: Agent, client: Client, path: str, method: str
) -> None:
    target = path.replace("{model}", "demo").replace("{version}", "1.0.0")
    answer = client.ask(method, target, b"" if method == "POST" else None)
    operation = DOCUMENT["paths"][path][method.lower()]
    assert str(answer.status) in operation["responses"], answer.body
    content = _resolved(operation["responses"][str(answer.status)]).get("content", {})
    assert answer.headers["content-type"].partition(";")[0] in content
    other = client.ask("DELETE", target)
    assert other.status in (403, 405)


def _resolved(value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    _, _, kind, name = value["$ref"].split("/")
    found: dict[str, Any] = DOCUMENT["components"][kind][name]
    return found


def test_the_fields_of_answers_are_the_fields_described(agent: Agent, client: Client, tmp_path: Path) -> None:
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}
    for schema, body in (
        ("Prediction", client.post("/predict", {"features": [1, 1, 1, 1], "id": "a"}).json),
        ("InferResponse", client.post("/v2/models/demo/infer", {"inputs": [tensor], "id": "a"}).json),
        ("ModelMetadata", client.get("/v2/models/demo").json),
        ("ServerMetadata", client.get("/v2").json),
        ("Statistics", client.get("/v2/models/stats").json),
        ("Ready", client.get("/v2/health/ready").json),
    ):
        described = DOCUMENT["components"]["schemas"][schema]
        assert set(described["required"]) <= set(body) <= set(described["properties"]), schema
    (entry,) = client.post("/v2/repository/index").json
    items = DOCUMENT["components"]["schemas"]["RepositoryIndex"]["items"]
    assert set(items["required"]) <= set(entry) <= set(items["properties"])


@pytest.mark.parametrize("page", [PAGE, DOCS_PAGE], ids=["page", "docs"])
def test_the_pages_ask_no_other_host_and_write_no_markup(page: bytes) -> None:
    text = page.decode()
    addresses = set(re.findall(r"https?://[^\s'\"]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in text
    assert "document.write" not in text
    for asked in re.findall(r"ask\('(/[^']*)'", text):
        assert asked in DOCUMENT["paths"]


def test_the_metrics_that_the_page_reads_exist(agent: Agent, client: Client, tmp_path: Path) -> None:
    client.post("/predict", {"features": [1, 1, 1, 1]})
    exposed = set(re.findall(r"^# TYPE (\w+)", client.get("/metrics").body.decode(), re.MULTILINE))
    for name in set(re.findall(r"edge_\w+", PAGE.decode())):
        assert name.removesuffix("_bucket") in exposed or name.removesuffix("_total") in exposed, name
