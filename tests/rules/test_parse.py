"""rules.yaml is read strictly and written readably."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import BadRules
from edge_agent.rules import parse as parse_module
from edge_agent.rules.evaluate import (
    Centre,
    Distance,
    Lacking,
    Limit,
    Missing,
    Of,
    Rate,
    Rule,
    RuleSet,
    RuleState,
    Stuck,
    When,
    constant,
)
from edge_agent.rules.parse import MAX_BYTES

parse = RuleSet.parse

FEATURES = ("oil_temperature", "oil_pressure", "vibration")
DOCUMENT = Path(__file__).parents[2] / "docs" / "rules.md"


def rules(text: str, features: tuple[str, ...] = FEATURES) -> RuleSet:
    return parse(f"format: 1\ndefault: fail\n{text}", features)


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


def examples() -> list[tuple[str, list[str], list[list[str]]]]:
    """Each yaml block of the documentation with the header and the rows of the table that follows it."""
    found = []
    for part in re.split(r"```yaml\n", DOCUMENT.read_text())[1:]:
        block, rest = part.split("```", 1)
        lines = [line for line in rest.split("\n## ")[0].splitlines() if line.startswith("|")]
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        header = table[0]
        found.append((block, header, [row for row in table[2:] if len(row) == len(header)]))
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_example_of_the_documentation_decides_as_its_table_says(number: int) -> None:
    block, header, table = examples()[number]
    assert len(examples()) == 3
    assert len(table) >= 7
    names = header[: header.index("decision")]
    features = [name for name in names if name != "time"]
    read = RuleSet.parse(block, features)
    assert RuleSet.parse(read.to_yaml(), features) == read
    cells = {name: [row[at] for row in table] for at, name in enumerate(header)}
    rows = np.array([[float(cell.replace("missing", "nan")) for cell in cells[name]] for name in features]).T
    assert read.stateful is ("time" in names)
    times = np.array(cells["time"], dtype=float) if read.stateful else None
    verdicts = read.evaluate(rows, state=RuleState() if read.stateful else None, now=times)
    assert ["fail" if failed else "pass" for failed in verdicts.failed] == cells["decision"]


def test_every_key_that_is_read_is_documented() -> None:
    section = DOCUMENT.read_text().split("## Every key")[1].split("\n## ")[0]
    first = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    documented = {word.split(".")[-1] for word in re.findall(r"`([^`]+)`", first)}
    condition_keys = {key for keys in (*parse_module._CONDITIONS.values(),) for key in keys}
    read = {
        *parse_module._LIMIT_2,
        *parse_module._CENTRE,
        *parse_module._RULE,
        *parse_module._CONDITIONS,
        *condition_keys,
    }
    assert read <= documented
    for unit in parse_module._UNITS:
        assert re.search(rf"`\d+{unit}`", section)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
numbers = st.floats(-1e9, 1e9)
positive = st.floats(1e-3, 1e6)
times = st.one_of(st.just(0.0), st.floats(0.001, 1e6), st.integers(1, 48).map(lambda n: n * 900.0))
shapes = {"on_delay": times, "off_delay": times, "latch": st.booleans()}


@st.composite
def rule_sets(draw: st.DrawFn) -> RuleSet:
    features = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    feature = st.sampled_from(features)

    def limit() -> Limit:
        ends = [end if draw(st.booleans()) else None for end in sorted(draw(st.tuples(*[numbers] * 4)))]
        lolo, low, high, hihi = ends if any(end is not None for end in ends) else [None, None, 1.0, None]
        return Limit(
            low, high, lolo, hihi, draw(positive), **draw(st.fixed_dictionaries({}, optional=shapes))
        )

    rules: dict[str, Rule] = {}
    for name in draw(st.lists(texts, max_size=5, unique=True)):
        condition = draw(
            st.one_of(
                st.tuples(feature, numbers).map(lambda two: When(f"{json.dumps(two[0])} > {two[1]!r}")),
                st.builds(Lacking, feature),
                st.builds(Stuck, feature, st.floats(0.001, 1e6), positive),
                st.builds(Rate, feature, st.floats(0.001, 1e6), st.none() | positive, positive),
                *([st.just(Of(tuple(rules), min(rule.weight for rule in rules.values())))] if rules else []),
            )
        )
        shape = draw(st.fixed_dictionaries({"weight": positive}, optional=shapes))
        rules[name] = Rule(condition, draw(st.sampled_from(["fail", "pass", "vote"])), **shape)
    centres = st.builds(Centre, numbers, positive).map(lambda centre: {features[0]: centre})
    return RuleSet(
        tuple(features),
        draw(st.sampled_from(["pass", "fail"])),
        Missing(draw(st.sampled_from(["ok", "violation", "fail"])), draw(st.floats(0, 1))),
        {name: limit() for name in features},
        0.001,
        draw(st.none() | st.builds(Distance, positive, centres)),
        rules,
    )


@settings(deadline=None)
@given(rule_sets())
def test_whatever_is_written_reads_back_equal(written: RuleSet) -> None:
    text = written.to_yaml()
    assert parse(text, written.features) == written
    assert parse(text.encode(), written.features) == written
    old = not (written.stateful or written.rules)
    assert f"\nformat: {1 if old else 2}\n" in text


@settings(deadline=None)
@given(st.text(max_size=200), st.sampled_from(["", "limits: ", "rules: ", "rules: {x: {when: ", "reset: "]))
def test_whatever_is_in_the_file_is_read_or_refused(text: str, before: str) -> None:
    try:
        rules(before + text)
        says = ""
    except BadRules as refused:
        says = str(refused)
    assert "\n" not in says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: {x: {}}", "rules.x has none of when, missing, stuck, rate, of; give it exactly one"),
        ("rules: {x: {when: a > 1, missing: a}}", "rules.x has when and missing of"),
        ("rules: {x: {wen: a > 1}}", "rules.x has none of"),
        ("rules: {x: {when: vibration > 1, k: 2}}", "rules.x has an unknown key 'k'"),
        ("rules: {x: {when: vibration > 1, decison: pass}}", "unknown key 'decison'; did you mean decision?"),
        ("rules: {x: {when: vibration > 1, decision: maybe}}", "expected one of: fail, pass, vote, none"),
        (
            "rules: {x: {when: vibratoin > 1}}",
            "rules: x: when: column 1: the model has no feature 'vibratoin'; did",
        ),
        ("rules: {x: {when: 3}}", "rules.x.when is 3, expected text"),
        (
            "rules: {x: {missing: no}}",
            "rules.x.missing is False, expected text; a name such as no or 1 is written",
        ),
        ("rules: {x: {stuck: vibration}}", "rules.x.for is missing"),
        ("rules: {x: {stuck: vibration, for: 3}}", "rules.x.for is 3, expected a time with its unit"),
        (
            "rules: {x: {stuck: vibration, for: 3 days}}",
            "expected a time with its unit: 500ms, 3s, 10min, 2h",
        ),
        ("rules: {x: {stuck: vibration, for: 999999h}}", "rules: x: for is 3.6e+09 s, expected from 0"),
        ("rules: {x: {rate: vibration, rise: 1}}", "rules.x.per is missing"),
        ("rules: {x: {of: y, k: 1}}", "rules.x.of is 'y', expected a list of rules"),
        ("rules: {x: {of: [y]}}", "rules.x.k is missing"),
        ("rules: {x: {when: vibration > 1, latch: 1}}", "rules.x.latch is 1, expected true or false"),
        ("rules: []", "rules is [], expected keys and values"),
        ("reset: {}", "reset.when is missing"),
        ("limits: {vibration: {high: 1, on_dealy: 3s}}", "unknown key 'on_dealy'; did you mean on_delay?"),
    ],
)
def test_what_is_not_understood_in_format_2_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(BadRules, match=r"^rules\.yaml: ") as refused:
        parse(f"format: 2\ndefault: pass\n{text}", FEATURES)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["rules: {}", "limits: {vibration: {high: 1, latch: true}}"])
def test_format_1_says_that_what_it_lacks_is_in_format_2(text: str) -> None:
    with pytest.raises(BadRules, match="which format 1 does not know; write format: 2 at the top"):
        rules(text)


def test_times_are_written_as_people_write_them() -> None:
    limit = parse(
        "format: 2\ndefault: fail\nlimits: {vibration: {high: 1, on_delay: 1.5 s, off_delay: 500ms}}",
        FEATURES,
    ).limits["vibration"]
    assert (limit.on_delay, limit.off_delay) == (1.5, 0.5)
    text = RuleSet(("a",), "fail", limits={"a": Limit(high=1, on_delay=600, off_delay=7200)}).to_yaml()
    assert "{high: 1, on_delay: 10min, off_delay: 2h}" in text
