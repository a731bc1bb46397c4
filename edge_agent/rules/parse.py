"""rules.yaml: reader and writer. Made to be read and edited by a plant engineer; docs/rules.md explains it.

Invariants: what is not understood is refused (unknown key, key given twice, alias), with a suggestion;
a feature's name is text whatever YAML makes of it (``no``, ``1``, ``on``); reading is bounded in size;
``parse(to_yaml(rules), rules.features) == rules``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from edge_agent.errors import BadRules
from edge_agent.rules.evaluate import Centre, CountAs, Decision, Distance, Limit, Missing, RuleSet, meant

FILE_NAME: Final = "rules.yaml"
FORMAT: Final = 1
MAX_BYTES: Final = 4 << 20  # a rule set of 10,000 features is about 1 MB

_MAX_DEPTH: Final = 8  # rules need 4

_TOP: Final = ("format", "default", "missing", "vote", "limits", "distance")
_LIMIT: Final = ("low", "high", "lolo", "hihi", "weight")
_CENTRE: Final = ("centre", "scale", "weight")

_HEADER: Final = """\
# Fallback rules: they decide pass or fail when the model cannot answer.
# Every key is explained in docs/rules.md. Numbers are in the unit of the feature.
"""


def parse(text: bytes | str, features: Sequence[str]) -> RuleSet:
    """Read rules.yaml for a model with these features, in input order.

    Raises:
        BadRules: not YAML, too large, unknown or repeated key, unknown feature, wrong type, limits out of
            order.
    """
    try:
        return _rules(_load(text), tuple(features))
    except BadRules as error:
        raise BadRules(f"{FILE_NAME}: {error}") from error.__cause__


def to_yaml(rules: RuleSet) -> str:
    """Write rules with a comment on every section."""
    lines = [
        _HEADER,
        f"format: {FORMAT}",
        f"default: {rules.default}  # when no rule can judge a row",
        "missing:",
        f"  count_as: {rules.missing.count_as}  # one missing value is: ok, violation (it votes) or fail",
        f"  max_share: {rules.missing.max_share!r}  # more missing than this share: default",
    ]
    if rules.limits:
        lines += [
            "",
            "# Votes (number of violated limits, each times its weight) that fail a row.",
            f"vote: {{k: {_whole(rules.votes)!r}}}",
            "",
            "# Outside low..high a feature votes to fail; outside lolo..hihi it fails the row alone.",
            "limits:",
            *(f"  {_key(name)}: {_flow(limit, _LIMIT)}" for name, limit in rules.limits.items()),
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
    return "\n".join(lines) + "\n"


def _rules(content: Any, features: tuple[str, ...]) -> RuleSet:
    top = _mapping(content, "the file", _TOP)
    if top.get("format") != FORMAT:
        raise BadRules(
            f"format is {top.get('format')!r}, this program reads {FORMAT}; write format: {FORMAT}"
        )
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
    return RuleSet(
        features=features,
        default=default,
        missing=Missing(count_as, _number(missing.get("max_share", 0.5), "missing.max_share")),
        limits={name: _limit(item, f"limits.{name}") for name, item in limits.items()},
        votes=_number(vote.get("k", 1), "vote.k"),
        distance=_distance(top["distance"]) if "distance" in top else None,
    )


def _limit(content: Any, where: str) -> Limit:
    item = _mapping(content, where, _LIMIT)
    return Limit(**{key: _number(value, f"{where}.{key}") for key, value in item.items()})


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


def _mapping(content: Any, where: str, keys: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise BadRules(f"{where} is {_shown(content)}, expected keys and values")
    for key in content if keys is not None else ():
        if keys is not None and key not in keys:
            raise BadRules(f"{where} has an unknown key {key!r}; {meant(key, keys)}")
    return content


def _number(content: Any, where: str) -> float:
    if isinstance(content, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", content):
        content = float(content)  # 1e5 is a number to people, but text to YAML 1.1
    if isinstance(content, bool) or not isinstance(content, int | float) or not math.isfinite(content):
        raise BadRules(f"{where} is {_shown(content)}, expected a number")
    return float(content)


def _one_of(content: Any, where: str, choices: Sequence[Any]) -> Any:
    if content not in choices:
        raise BadRules(f"{where} is {_shown(content)}, expected one of: {', '.join(choices)}")
    return content


def _shown(content: Any) -> str:
    if content is None:
        return "empty"
    text = repr(content)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _flow(item: Any, keys: Sequence[str]) -> str:
    """``{low: 1.0, high: 2.0}``; what is absent or a weight of 1 is left out."""
    pairs = [(key, getattr(item, key)) for key in keys]
    shown = [
        f"{key}: {value!r}" for key, value in pairs if value is not None and (key, value) != ("weight", 1.0)
    ]
    return "{" + ", ".join(shown) + "}"


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII) else json.dumps(name)


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
