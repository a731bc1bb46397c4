"""rules.yaml: reader and writer. Made to be read and edited by a plant engineer; docs/rules.md explains it.

Invariants: what is not understood is refused (unknown key, key given twice, alias), with a suggestion;
a feature's name is text whatever YAML makes of it (``no``, ``1``, ``on``); reading is bounded in size;
``parse(to_yaml(rules), rules.features) == rules``.

Format 1 has limits, vote and distance. Format 2 adds named rules, and times. What can be said in format 1 is
written in format 1, so that older agents read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from edge_agent.errors import BadRules
from edge_agent.rules.names import meant
from edge_agent.rules.values import (
    Centre,
    Condition,
    CountAs,
    Decision,
    Distance,
    Effect,
    Lacking,
    Limit,
    Missing,
    Of,
    Rate,
    Rule,
    Rules,
    Stuck,
    When,
)

FILE_NAME: Final = "rules.yaml"
FORMATS: Final = (1, 2)
MAX_BYTES: Final = 4 << 20  # a rule set of 10,000 features is about 1 MB

_MAX_DEPTH: Final = 8  # rules need 4

_TOP: Final = ("format", "default", "missing", "vote", "limits", "distance")
_TOP_2: Final = (*_TOP, "rules", "reset")
_LIMIT: Final = ("low", "high", "lolo", "hihi", "weight")
_TIMES: Final = ("on_delay", "off_delay", "latch")
_LIMIT_2: Final = (*_LIMIT, "deadband", *_TIMES)
_CENTRE: Final = ("centre", "scale", "weight")
_RULE: Final = ("decision", "score", "weight", *_TIMES)
# What a condition is introduced by, and the keys that belong to it.
_CONDITIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "when": (),
    "missing": (),
    "stuck": ("for", "within"),
    "rate": ("per", "rise", "fall"),
    "of": ("k",),
}
_UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}

_HEADER: Final = """\
# Fallback rules: they decide pass or fail when the model cannot answer.
# Every key is explained in docs/rules.md. Numbers are in the unit of the feature.
"""


def parse(text: bytes | str, features: Sequence[str]) -> Rules:
    """Read rules.yaml for a model with these features, in input order.

    Raises:
        BadRules: not YAML, too large, unknown or repeated key, unknown feature, wrong type, limits out of
            order, an expression that is not in the grammar.
    """
    try:
        return _rules(_load(text), tuple(features))
    except BadRules as error:
        raise BadRules(f"{FILE_NAME}: {error}") from error.__cause__


def to_yaml(rules: Rules) -> str:
    """Write rules with a comment on every section."""
    timed = any(limit.timed for limit in rules.limits.values())
    lines = [
        _HEADER,
        f"format: {2 if timed or rules.rules else 1}",
        f"default: {rules.default}  # when no rule can judge a row",
        "missing:",
        f"  count_as: {rules.missing.count_as}  # one missing value is: ok, violation (it votes) or fail",
        f"  max_share: {rules.missing.max_share!r}  # more missing than this share: default",
    ]
    if rules.limits or rules.votes != 1.0 or any(rule.decision == "vote" for rule in rules.rules.values()):
        lines += [
            "",
            "# Votes (number of violated limits, each times its weight) that fail a row.",
            f"vote: {{k: {_whole(rules.votes)!r}}}",
        ]
    if rules.limits:
        lines += [
            "",
            "# Outside low..high a feature votes to fail; outside lolo..hihi it fails the row alone.",
            "limits:",
            *(f"  {_key(name)}: {_flow(limit, _LIMIT_2)}" for name, limit in rules.limits.items()),
        ]
    if rules.distance is not None:
        lines += [
            "",
            "# How far a row is from the normal state: root mean square of (value - centre) / scale.",
            "distance:",
            f"  limit: {rules.distance.limit!r}  # a row further away fails",
            "  features:",
            *(f"    {_key(name)}: {_flow(item, _CENTRE)}" for name, item in rules.distance.features.items()),
        ]
    if rules.rules:
        lines += [
            "",
            "# Each has one condition, and decides while it holds: fail, pass, vote, or none.",
            "rules:",
        ]
        for name, rule in rules.rules.items():
            lines += [f"  {_key(name)}:", *(f"    {key}: {value}" for key, value in _written(rule))]
    if rules.reset is not None:
        lines += ["", "# Releases what is latched.", "reset:", f"  when: {_text(rules.reset)}"]
    return "\n".join(lines) + "\n"


def _rules(content: Any, features: tuple[str, ...]) -> Rules:
    top = _mapping(content, "the file")
    format_ = top.get("format")
    if isinstance(format_, bool) or format_ not in FORMATS:
        known = " and ".join(str(number) for number in FORMATS)
        raise BadRules(
            f"format is {_shown(format_)}, this program reads {known}; write format: {FORMATS[-1]}"
        )
    second = format_ == 2
    _refuse_unknown(top, "the file", _TOP_2 if second else _TOP, () if second else _TOP_2)
    if "default" not in top:
        raise BadRules(
            "default is missing; add default: fail or default: pass, the answer when no rule can judge"
        )
    default: Decision = _one_of(top["default"], "default", ("fail", "pass"))
    missing = _mapping(top.get("missing", {}), "missing", ("count_as", "max_share"))
    count_as: CountAs = _one_of(
        missing.get("count_as", "ok"), "missing.count_as", ("ok", "violation", "fail")
    )
    vote = _mapping(top.get("vote", {}), "vote", ("k",))
    limits = _mapping(top.get("limits", {}), "limits")
    return Rules(
        features=features,
        default=default,
        missing=Missing(count_as, _number(missing.get("max_share", 0.5), "missing.max_share")),
        limits={name: _limit(item, f"limits.{name}", second) for name, item in limits.items()},
        votes=_number(vote.get("k", 1), "vote.k"),
        distance=_distance(top["distance"]) if "distance" in top else None,
        rules={
            name: _rule(item, f"rules.{name}")
            for name, item in _mapping(top.get("rules", {}), "rules").items()
        },
        reset=_reset(top["reset"]) if "reset" in top else None,
    )


def _limit(content: Any, where: str, second: bool) -> Limit:
    item = _mapping(content, where)
    _refuse_unknown(item, where, _LIMIT_2 if second else _LIMIT, () if second else _LIMIT_2)
    return Limit(**{key: _READERS.get(key, _number)(value, f"{where}.{key}") for key, value in item.items()})


def _distance(content: Any) -> Distance:
    item = _mapping(content, "distance", ("limit", "features"))
    for key in ("limit", "features"):
        if key not in item:
            raise BadRules(f"distance.{key} is missing; give it, or leave the whole distance out")
    return Distance(
        limit=_number(item["limit"], "distance.limit"),
        features={
            name: _centre(value, f"distance.features.{name}")
            for name, value in _mapping(item["features"], "distance.features").items()
        },
    )


def _centre(content: Any, where: str) -> Centre:
    item = _mapping(content, where, _CENTRE)
    for key in ("centre", "scale"):
        if key not in item:
            raise BadRules(f"{where}.{key} is missing")
    return Centre(**{key: _number(value, f"{where}.{key}") for key, value in item.items()})


def _rule(content: Any, where: str) -> Rule:
    item = _mapping(content, where)
    kinds = [kind for kind in _CONDITIONS if kind in item]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "none"
        raise BadRules(f"{where} has {got} of {', '.join(_CONDITIONS)}; give it exactly one")
    (kind,) = kinds
    _refuse_unknown(item, where, (kind, *_CONDITIONS[kind], *_RULE))
    decision: Effect = _one_of(
        item.get("decision", "fail"), f"{where}.decision", ("fail", "pass", "vote", "none")
    )
    shaping = {
        key: _READERS.get(key, _number)(item[key], f"{where}.{key}") for key in _RULE[1:] if key in item
    }
    return Rule(_condition(kind, item, where), decision, **shaping)


def _condition(kind: str, item: Mapping[str, Any], where: str) -> Condition:
    for key in ("for", "per", "k"):
        if key in _CONDITIONS[kind] and key not in item:
            raise BadRules(f"{where}.{key} is missing")
    if kind == "of":
        members = item["of"]
        if not isinstance(members, list) or not members:
            raise BadRules(f"{where}.of is {_shown(members)}, expected a list of rules, as in [one, two]")
        return Of(tuple(_name(name, f"{where}.of") for name in members), _number(item["k"], f"{where}.k"))
    subject = _name(item[kind], f"{where}.{kind}")
    if kind == "when":
        return When(subject)
    if kind == "missing":
        return Lacking(subject)
    if kind == "stuck":
        within = _number(item.get("within", 0.0), f"{where}.within")
        return Stuck(subject, _seconds(item["for"], f"{where}.for"), within)
    rise, fall = (_number(item[key], f"{where}.{key}") if key in item else None for key in ("rise", "fall"))
    return Rate(subject, _seconds(item["per"], f"{where}.per"), rise, fall)


def _reset(content: Any) -> str:
    item = _mapping(content, "reset", ("when",))
    if "when" not in item:
        raise BadRules("reset.when is missing; give the condition that releases what is latched")
    return _name(item["when"], "reset.when")


def _written(rule: Rule) -> list[tuple[str, str]]:
    """Keys and values of a rule as they stand in the file; what is at its default is left out."""
    match rule.condition:
        case When(text):
            lines = [("when", _text(text))]
        case Lacking(feature):
            lines = [("missing", _text(feature))]
        case Stuck(feature, seconds, within):
            lines = [("stuck", _text(feature)), ("for", _duration(seconds))]
            lines += [("within", repr(within))] if within else []
        case Rate(feature, per, rise, fall):
            lines = [("rate", _text(feature)), ("per", _duration(per))]
            lines += [
                (key, repr(value)) for key, value in (("rise", rise), ("fall", fall)) if value is not None
            ]
        case Of(names, k):
            lines = [("of", f"[{', '.join(map(_text, names))}]"), ("k", repr(_whole(k)))]
    return [*lines, ("decision", rule.decision), *_shown_pairs(rule, _RULE[1:])]


def _mapping(content: Any, where: str, keys: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise BadRules(f"{where} is {_shown(content)}, expected keys and values")
    if keys is not None:
        _refuse_unknown(content, where, keys)
    return content


def _refuse_unknown(
    content: Mapping[str, Any], where: str, keys: Sequence[str], later: Sequence[str] = ()
) -> None:
    for key in content:
        if key in keys:
            continue
        if key in later:
            raise BadRules(f"{where} has {key}, which format 1 does not know; write format: 2 at the top")
        raise BadRules(f"{where} has an unknown key {key!r}; {meant(key, keys)}")


def _number(content: Any, where: str) -> float:
    if isinstance(content, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", content):
        content = float(content)  # 1e5 is a number to people, but text to YAML 1.1
    if isinstance(content, bool) or not isinstance(content, int | float) or not _finite(content):
        raise BadRules(f"{where} is {_shown(content)}, expected a number")
    return float(content)


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number of 400 digits
        return False


def _seconds(content: Any, where: str) -> float:
    found = (
        re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?) ?(ms|s|min|h)", content)
        if isinstance(content, str)
        else None
    )
    if found:
        seconds = float(found[1]) * _UNITS[found[2]]
        if math.isfinite(seconds):
            return seconds
    if content != 0 or isinstance(content, bool):
        raise BadRules(f"{where} is {_shown(content)}, expected a time with its unit: 500ms, 3s, 10min, 2h")
    return 0.0


def _yes_or_no(content: Any, where: str) -> bool:
    if not isinstance(content, bool):
        raise BadRules(f"{where} is {_shown(content)}, expected true or false")
    return content


_READERS: Final[Mapping[str, Any]] = {"on_delay": _seconds, "off_delay": _seconds, "latch": _yes_or_no}


def _name(content: Any, where: str) -> str:
    if not isinstance(content, str):
        raise BadRules(
            f"{where} is {_shown(content)}, expected text; a name such as no or 1 is written in quotes"
        )
    return content


def _one_of(content: Any, where: str, choices: Sequence[Any]) -> Any:
    if content not in choices:
        raise BadRules(f"{where} is {_shown(content)}, expected one of: {', '.join(choices)}")
    return content


def _shown(content: Any) -> str:
    if content is None:
        return "empty"
    try:
        text = repr(content)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a very long number"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _flow(item: Any, keys: Sequence[str]) -> str:
    """``{low: 1.0, high: 2.0}``."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in _shown_pairs(item, keys)) + "}"


def _shown_pairs(item: Any, keys: Sequence[str]) -> list[tuple[str, str]]:
    """What is absent, or as it would be without being said, is left out."""
    usual = {"weight": 1.0, "deadband": 0.0, "on_delay": 0.0, "off_delay": 0.0, "latch": False}
    pairs = [(key, getattr(item, key)) for key in keys]
    return [
        (key, _shown_value(key, value))
        for key, value in pairs
        if value is not None and not (key in usual and value == usual[key])
    ]


def _shown_value(key: str, value: Any) -> str:
    if key == "latch":
        return "true"
    return _duration(value) if key in _READERS else repr(value)


def _duration(seconds: float) -> str:
    for unit in ("h", "min"):
        if seconds and seconds % _UNITS[unit] == 0.0:
            return f"{int(seconds / _UNITS[unit])}{unit}"
    return f"{_whole(seconds)!r}s"


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII) else _text(name)


def _text(text: str) -> str:
    """In double quotes, on one line; YAML's own writer knows what YAML needs escaped."""
    written: str = yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True)
    return written.rstrip("\n")


def _load(text: bytes | str) -> Any:
    if len(text) > MAX_BYTES:
        raise BadRules(f"{len(text)} bytes, at most {MAX_BYTES} are read")
    try:
        _refuse_depth(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a subclass of the safe loader
    except (yaml.YAMLError, ValueError) as error:
        raise BadRules(f"not YAML: {' '.join(str(error).split())}") from error


def _refuse_depth(text: bytes | str) -> None:
    """Look at the events before anything is built: libyaml's builder recurses, 100 kB of ``[`` kill it."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = event.start_mark.line + 1 if event.start_mark else 0
        if depth > _MAX_DEPTH:
            raise BadRules(f"line {line}: nested deeper than rules are")
        if isinstance(event, yaml.AliasEvent):
            raise BadRules(f"line {line}: YAML aliases are not read; write the values out")


_SafeLoader: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # libyaml where PyYAML has it: ten times faster


class _Loader(_SafeLoader):  # type: ignore[misc]
    """YAML without its traps: keys are text as written, none is given twice, nothing is merged in."""


def _construct_mapping(loader: Any, node: yaml.MappingNode) -> Any:
    result: dict[str, Any] = {}
    yield result
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
            raise BadRules(f"line {line}: a key must be a name")
        if key_node.value in result:
            raise BadRules(f"line {line}: {key_node.value!r} is given twice; keep one")
        result[key_node.value] = loader.construct_object(value_node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
