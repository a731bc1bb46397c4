"""The report as a page and as a comparison of two bundles."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from quantize import page, report
from quantize.cli import main
from quantize.errors import QuantizeError
from tests.quantize import models


def wide(path: Path) -> Path:
    """An autoencoder large enough for INT8 to pay."""
    nodes = [
        helper.make_node("Gemm", ["x", "W0", "b0"], ["h0"]),
        helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("Gemm", ["r0", "W1", "b1"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("Gemm", ["r1", "W2", "b2"], ["y"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", models.WIDTH])]
    weights = models.dense([models.WIDTH, 384, 384, models.WIDTH])
    return models.save(path, nodes, weights, inputs, [("y", ["N", models.WIDTH])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of one model: 1.2.3, and 2.0.0 that was pruned."""
    folder = tmp_path_factory.mktemp("reports")
    model = wide(folder / "m.onnx")
    data = models.write_rows(folder / "x.npz", models.rows(300))
    held = models.write_rows(
        folder / "v.npz",
        np.concatenate([models.rows(60, 5), models.bad_rows(60, 6)]),
        y=np.repeat([0, 1], 60),
    )
    common = [str(model), "--calibration", str(data), "--validation", str(held), "--scale", "standard"]
    common += ["--name", "unit", "--out", str(folder / "out"), "--quiet", "--max-drop", "0.1"]
    assert main([*common, "--version", "1.2.3"]) == 0
    assert main([*common, "--version", "2.0.0", "--prune", "0.5"]) == 0
    return folder / "out"


class Reader(html.parser.HTMLParser):
    """Checks that tags nest; keeps text and attributes."""

    void = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path: Path) -> tuple[Reader, str]:
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader, text


def test_the_page_asks_the_network_for_nothing(folder):
    reader, text = read(folder / "unit-2.0.0.report.html")
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text, re.IGNORECASE)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    policy = next(found["content"] for tag, found in reader.tags if tag == "meta" and "http-equiv" in found)
    assert policy.startswith("default-src 'none'")
    assert not any(name in ("src", "href", "srcset") for _, found in reader.tags for name in found)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_that_shows_the_page_asks_nobody_for_anything(folder, tmp_path):
    """A real one, with its log of the network: nothing is asked for but by the browser itself."""
    shown = subprocess.run(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom",
            f"file://{folder}/unit-2.0.0.report.html",
        ],
        capture_output=True, text=True, timeout=100, check=True,
    ).stdout  # fmt: skip
    assert shown.count("<svg") == 3
    log = json.loads((tmp_path / "net.json").read_text())
    kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event.get("params", {}) for event in log["events"] if event["type"] == kind]
    # What a browser asks its maker for comes from no page.
    assert [
        found["url"] for found in asked if "url" in found and found.get("initiator") != "not an origin"
    ] == []


def test_every_plot_is_there_and_described_in_words(folder):
    reader, _ = read(folder / "unit-2.0.0.report.html")
    plots = [found for tag, found in reader.tags if tag == "svg"]
    assert [found["aria-labelledby"].split("-title")[0] for found in plots] == [
        "size-accuracy", "layer-error", "scores",
    ]  # fmt: skip
    ids = {found["id"] for _, found in reader.tags if "id" in found}
    assert all(set(found["aria-labelledby"].split()) <= ids for found in plots)
    assert sum(tag == "rect" for tag, _ in reader.tags) > 20


def test_the_page_follows_light_and_dark(folder):
    _, text = read(folder / "unit-1.2.3.report.html")
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?<![-\w])(?:fill|stroke|background|color): (#\w+)", text) == []  # only variables


def test_the_page_says_what_people_ask(folder):
    reader, _ = read(folder / "unit-2.0.0.report.html")
    text = " ".join(reader.text)
    for part in (
        "Before and after", "Size and accuracy", "Error per layer", "threshold",
        "What is computed in FP32, and why",
        "On generic-arm64", "a bound, not a promise", "Checks of the written bundle", "ROC-AUC", "Channels:",
    ):  # fmt: skip
        assert part in text


def test_names_from_the_model_cannot_become_markup(folder):
    facts = json.loads((folder / "unit-1.2.3.report.json").read_bytes())
    facts["model"]["name"] = "<script>alert(1)</script>"
    facts["int8"]["layer_facts"][0]["name"] = '"><img src=x onerror=y>'
    facts["warnings"] = ["<b>bold</b>"]
    text = page.render(facts)
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text


def test_a_report_without_scores_layers_or_times_is_a_page_too(folder):
    facts = json.loads((folder / "unit-1.2.3" / "report.json").read_bytes())
    facts |= {"scores": None, "arm": None, "pruning": None}
    facts["int8"] |= {"layer_facts": [], "candidates": [], "precision": "fp32"}
    text = page.render(facts)
    assert "<svg" not in text
    assert "the bundle carries the FP32 model" in text


def test_a_hundred_layers_of_long_names_are_told_apart(folder):
    facts = json.loads((folder / "unit-1.2.3.report.json").read_bytes())
    facts["int8"]["layer_facts"] = [
        facts["int8"]["layer_facts"][0]
        | {"name": f"/encoder/layers.{index}/attention/output/dense/Gemm", "sqnr": 20.0 + (index * 7) % 100}
        for index in range(100)
    ]
    text = page.render(facts)
    labels = re.findall(r'text-anchor="end">([^<]*layers[^<]*|\d+)</text>', text.partition("layer-error")[2])
    drawn = [label for label in labels if re.fullmatch(r"(layers\.)?\d+", label)][:60]
    assert len(set(drawn)) == 60
    assert "Drawn are the 60 worst of 100" in text
    assert ": 20.0 dB" in text.partition("layer-error")[2].partition("</svg>")[0]
    assert ": 119.0 dB" not in text.partition("layer-error")[2].partition("</svg>")[0]


def test_a_threshold_beyond_every_row_is_said(folder):
    facts = json.loads((folder / "unit-1.2.3.report.json").read_bytes())
    facts["scores"]["threshold"] = facts["scores"]["edges"][-1] * 3
    assert "(not in the plot: no row comes near)" in page.render(facts)


def test_the_curve_of_pruning_is_in_the_report(folder):
    pruning = json.loads((folder / "unit-2.0.0" / "report.json").read_bytes())["pruning"]
    assert len(pruning["curve"]) >= 2
    assert [point["bytes"] for point in pruning["curve"]] == sorted(
        (point["bytes"] for point in pruning["curve"]), reverse=True
    )
    assert sum(point["chosen"] for point in pruning["curve"]) == 1
    assert all(width["after"] < width["before"] for width in pruning["widths"])


def test_two_bundles_are_compared_by_folder_tar_or_report(folder):
    by_folder = report.compare_facts(folder / "unit-1.2.3", folder / "unit-2.0.0")
    by_tar = report.compare_facts(folder / "unit-1.2.3.tar", folder / "unit-2.0.0.tar")
    by_report = report.compare_facts(folder / "unit-1.2.3.report.json", folder / "unit-2.0.0.report.json")
    assert by_folder["rows"] == by_tar["rows"] == by_report["rows"]
    rows = {row["what"]: (row["a"], row["b"]) for row in by_folder["rows"]}
    assert rows["version"] == ("1.2.3", "2.0.0")
    assert rows["bytes of model.onnx"][0] > rows["bytes of model.onnx"][1]


def test_a_tar_alone_still_has_its_report(folder, tmp_path):
    (tmp_path / "alone.tar").write_bytes((folder / "unit-1.2.3.tar").read_bytes())
    text = report.compare_bundles(tmp_path / "alone.tar", folder / "unit-1.2.3")
    assert re.search(r"bytes of model.onnx +\d+ +\d+ +=", text)


def test_the_command_compares(folder, capsys):
    assert main(["--compare", str(folder / "unit-1.2.3"), str(folder / "unit-2.0.0")]) == 0
    assert re.search(r"bytes of model\.onnx +\d+ +\d+ +-", capsys.readouterr().out)


def test_what_is_no_bundle_is_one_line(folder, tmp_path, capsys):
    with pytest.raises(QuantizeError, match="no report of quantize-model"):
        report.compare_facts(tmp_path, folder / "unit-1.2.3")
    assert main(["--compare", str(tmp_path), str(folder / "unit-1.2.3")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
