"""rules.yaml is read strictly and written readably."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import BadRules
from edge_agent.rules.evaluate import Centre, Distance, Limit, Missing, RuleSet, constant
from edge_agent.rules.parse import MAX_BYTES

parse = RuleSet.parse

FEATURES = ("oil_temperature", "oil_pressure", "vibration")
DOCUMENT = Path(__file__).parents[2] / "docs" / "rules.md"


def rules(text: str, features: tuple[str, ...] = FEATURES) -> RuleSet:
    return parse(f"format: 1\ndefault: fail\n{text}", features)


def test_the_example_of_the_documentation_decides_as_its_table_says() -> None:
    document = DOCUMENT.read_text()
    example = re.search(r"```yaml\n(.*?)```", document, re.DOTALL)
    assert example is not None
    read = RuleSet.parse(example[1], FEATURES)
    table = [line.split("|")[1:5] for line in document.splitlines() if re.search(r"\| (pass|fail) \|", line)]
    assert len(table) == 7
    rows = np.array([[np.nan if "missing" in cell else float(cell) for cell in row[:3]] for row in table])
    decisions = ["fail" if failed else "pass" for failed in read.evaluate(rows).failed]
    assert decisions == [row[3].strip() for row in table]


def test_every_key_of_the_format_is_documented() -> None:
    document = DOCUMENT.read_text()
    for key in ("format", "default", "missing.count_as", "missing.max_share", "vote.k", "distance.limit"):
        assert f"`{key}`" in document
    for key in ("low", "high", "lolo", "hihi", "weight", "centre", "scale"):
        assert re.search(rf"<feature>\.{key}`|, `{key}`", document), key


def test_what_is_written_reads_back_equal() -> None:
    written = RuleSet(
        features=("a b", "no", "x1", 'quo"te: {', "ärger", "1"),
        default="pass",
        missing=Missing("violation", 0.25),
        limits={
            "a b": Limit(low=1e-7, high=2.5),
            "no": Limit(hihi=1e22, weight=0.5),
            'quo"te: {': Limit(lolo=-3.0, high=7.0),
        },
        votes=1.5,
        distance=Distance(2.25, {"ärger": Centre(-1.0, 0.125), "1": Centre(0.1 + 0.2, 3.0, 2.0)}),
    )
    assert parse(written.to_yaml(), written.features) == written
    assert parse(written.to_yaml().encode(), written.features) == written


def test_the_last_resort_reads_back_equal() -> None:
    assert parse(constant("pass", FEATURES).to_yaml(), FEATURES) == constant("pass", FEATURES)


def test_written_rules_explain_themselves() -> None:
    text = rules("limits: {vibration: {high: 4.5}}").to_yaml()
    assert text.startswith("# Fallback rules")
    assert "  vibration: {high: 4.5}\n" in text


@pytest.mark.parametrize("name", ["no", "on", "yes", "null", "1", "1.5", "2020-01-01", "~"])
def test_a_feature_name_is_text_even_where_yaml_thinks_otherwise(name: str) -> None:
    assert set(rules(f"limits: {{{name}: {{high: 1}}}}", (name,)).limits) == {name}


def test_scientific_notation_is_a_number() -> None:
    assert rules("limits: {vibration: {low: -1e5, high: 1E+5}}").limits["vibration"] == Limit(-1e5, 1e5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("limit: {}", "did you mean limits?"),
        ("limits: {vibratoin: {high: 1}}", "no feature 'vibratoin'; did you mean vibration?"),
        (
            "limits: {vibration: {higher: 1}}",
            "limits.vibration has an unknown key 'higher'; did you mean high?",
        ),
        ("limits: {vibration: {high: 1, low: 2}}", "low 2 is above high 1"),
        ("limits: {vibration: {high: 3, hihi: 2}}", "high 3 is above hihi 2"),
        ("limits: {vibration: {}}", "no limit; give at least one"),
        ("limits: {vibration: {high: hot}}", "limits.vibration.high is 'hot', expected a number"),
        ("limits: {vibration: {high: }}", "limits.vibration.high is empty, expected a number"),
        ("limits: {vibration: {high: .nan}}", "expected a number"),
        ("limits: {vibration: {high: true}}", "expected a number"),
        ("limits: {vibration: {high: 1, weight: -1}}", "weight is -1"),
        ("limits: {vibration: 3}", "limits.vibration is 3, expected keys and values"),
        ("limits: {vibration: {high: 1}, vibration: {high: 2}}", "line 3: 'vibration' is given twice"),
        ("limits: {vibration: {high: 1}}\nvote: {k: 2}", "only 1 votes together; lower k to 1"),
        ("vote: {k: 0}", "k is 0"),
        ("missing: {count_as: maybe}", "missing.count_as is 'maybe', expected one of: ok, violation, fail"),
        ("missing: {max_share: 50}", "expected a share from 0 to 1"),
        ("distance: {limit: 3}", "distance.features is missing"),
        ("distance: {limit: 0, features: {vibration: {centre: 1, scale: 1}}}", "limit is 0"),
        ("distance: {limit: 3, features: {vibration: {center: 1, scale: 1}}}", "did you mean centre?"),
        ("distance: {limit: 3, features: {vibration: {centre: 1, scale: 0}}}", "scale of vibration is 0"),
        ("distance: {limit: 3, features: {}}", "no feature with a weight"),
        ("a: &x {}\nlimits: *x", "aliases are not read"),
        ("limits: {<<: {vibration: {high: 1}}}", "a key must be a name"),
        ("limits: {[1]: {high: 1}}", "a key must be a name"),
        ("limits: [", "not YAML"),
        ("limits: " + "[" * 100_000, "nested deeper"),
        ("# " + "x" * MAX_BYTES, "bytes, at most"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(BadRules, match=r"^rules\.yaml: ") as refused:
        rules(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected keys and values"),
        ("format: 1", "default is missing; add default: fail or default: pass"),
        ("format: 1\ndefault: maybe", "expected one of: fail, pass"),
        ("default: fail", "format is empty, this program reads 1 and 2"),
        ("format: 3\ndefault: fail", "format is 3, this program reads 1 and 2"),
        ("\x00", "not YAML"),
    ],
)
def test_the_head_is_mandatory(text: str, says: str) -> None:
    with pytest.raises(BadRules) as refused:
        parse(text, FEATURES)
    assert says in str(refused.value)


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(BadRules, match="not YAML"):
        parse(b"format: \xff\xfe", FEATURES)
