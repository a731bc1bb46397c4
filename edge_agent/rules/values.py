"""What a rules.yaml says, as values.

Invariants: a ``Rules`` makes sense for its features (names exist, limits are in order, enough votes exist,
every alarm can come and go, every named rule has an effect), or it was never made. Rules that read others
read only those above them, so there is no circle. Times are seconds.

Words are those of ISA-18.2 (alarm limits HIHI, HI, LO, LOLO, deadband, on-delay, off-delay, latching).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

from edge_agent.errors import BadRules
from edge_agent.rules import expression
from edge_agent.rules.names import meant

Decision = Literal["pass", "fail"]
CountAs = Literal["ok", "violation", "fail"]
Effect = Literal["fail", "pass", "vote", "none"]

# A score is sent as JSON and exported as a metric, so it stays finite. A million spans out is far enough.
MAX_SCORE: Final = 1e6
# The score of a failure that has no degree: a missing value that counts as one, a default of fail.
FLAT_FAIL: Final = 2.0
MAX_RULES: Final = 500  # named rules: what a plant still oversees, and what a row may cost
A_HAIR: Final = 1e-9  # of the votes asked: 0.1 + 0.2 + 0.4 is 0.7 to people
MAX_SECONDS: Final = 366 * 86400.0


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of one feature, in its own unit; ``None``: no limit on that side.

    Outside ``low``..``high`` the feature has ``weight`` votes to fail. Outside ``lolo``..``hihi`` it fails
    the row alone. The other four shape the alarm over time, each of the four limits by itself.
    """

    low: float | None = None
    high: float | None = None
    lolo: float | None = None
    hihi: float | None = None
    weight: float = 1.0
    deadband: float = 0.0  # how far back inside the limit the value must come before the alarm goes
    on_delay: float = 0.0
    off_delay: float = 0.0
    latch: bool = False  # stays until a reset

    @property
    def timed(self) -> bool:
        """Whether it asks for more than the present value."""
        return bool(self.deadband or self.on_delay or self.off_delay or self.latch)


@dataclass(frozen=True, slots=True)
class Centre:
    """Where a feature normally is and how far it normally strays (median and scaled MAD, or similar)."""

    centre: float
    scale: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Distance:
    """Root mean square of ``(x - centre) / scale`` over ``features``; a row beyond ``limit`` fails."""

    limit: float
    features: Mapping[str, Centre]


@dataclass(frozen=True, slots=True)
class Missing:
    """What a missing value means, and from which share of missing values on a row cannot be judged."""

    count_as: CountAs = "ok"
    max_share: float = 0.5


@dataclass(frozen=True, slots=True)
class When:
    """The expression is known to be true."""

    expression: str


@dataclass(frozen=True, slots=True)
class Lacking:
    """The feature's value is missing."""

    feature: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """The feature has not changed by more than ``within`` for ``seconds``: a frozen sensor."""

    feature: str
    seconds: float
    within: float = 0.0


@dataclass(frozen=True, slots=True)
class Rate:
    """The feature rose by more than ``rise``, or fell by more than ``fall``, within ``per`` seconds."""

    feature: str
    per: float
    rise: float | None = None
    fall: float | None = None


@dataclass(frozen=True, slots=True)
class Of:
    """Active rules among ``rules`` weigh ``k`` or more together: k of n where all weigh 1."""

    rules: tuple[str, ...]
    k: float


Condition = When | Lacking | Stuck | Rate | Of


@dataclass(frozen=True, slots=True)
class Rule:
    """A named rule: active while its condition holds (delays and latch applied), and then has its effect."""

    condition: Condition
    decision: Effect = "fail"
    score: float | None = None  # of a row that it decides; None: 2 to fail or vote, 0 to pass
    weight: float = 1.0  # its votes, and what it weighs in the rules that combine it
    on_delay: float = 0.0
    off_delay: float = 0.0
    latch: bool = False

    @property
    def timed(self) -> bool:
        """Whether it asks for more than the present row."""
        return bool(self.on_delay or self.off_delay or self.latch) or isinstance(self.condition, Stuck | Rate)

    @property
    def effective_score(self) -> float:
        """The score it gives a row."""
        if self.score is not None:
            return self.score
        return 0.0 if self.decision == "pass" else FLAT_FAIL


@dataclass(frozen=True)
class Rules:
    """Everything a rules.yaml says about a model with these features.

    Raises:
        BadRules: it makes no sense: a rule for a feature that the model lacks, limits out of order, more
            votes asked than there are, an alarm that could never go, a rule without effect.
    """

    features: tuple[str, ...]  # the model's features, in input order
    default: Decision
    missing: Missing = Missing()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    votes: float = 1.0  # votes (weights of violated limits and of active voting rules) that fail a row
    distance: Distance | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    reset: str | None = None  # the condition that releases latched alarms

    def __post_init__(self) -> None:
        _check(self)

    @property
    def stateful(self) -> bool:
        """Whether a verdict depends on earlier rows of the same source."""
        return any(limit.timed for limit in self.limits.values()) or any(
            rule.timed for rule in self.rules.values()
        )


def features_of(condition: Condition, features: Sequence[str]) -> tuple[str, ...]:
    """The features that a condition reads itself, each once."""
    match condition:
        case When(text):
            return tuple(dict.fromkeys(expression.names(expression.parse(text, features))))
        case Of():
            return ()
        case _:
            return (condition.feature,)


def _check(rules: Rules) -> None:
    near = rules.distance.features if rules.distance else {}
    known = frozenset(rules.features)
    for section, names in (("limits", rules.limits), ("distance", near)):
        for name in names:
            _check_feature(section, name, rules.features, known)
    for name, limit in rules.limits.items():
        _check_limit(f"limits: {name}", limit)
    if not 0.0 < rules.votes < math.inf:
        raise BadRules(f"vote: k is {rules.votes:g}, expected more than 0")
    if not 0.0 <= rules.missing.max_share <= 1.0:
        raise BadRules(f"missing: max_share is {rules.missing.max_share:g}, expected a share from 0 to 1")
    if rules.distance is not None:
        _check_distance(rules.distance)
    _check_rules(rules)
    total = sum(limit.weight for limit in rules.limits.values() if not (limit.low is limit.high is None))
    total += sum(rule.weight for rule in rules.rules.values() if rule.decision == "vote")
    if total and rules.votes * (1.0 - A_HAIR) > total:
        raise BadRules(
            f"vote: k is {rules.votes:g}, but the limits and rules have only {total:g} votes together; "
            f"lower k to {total:g} or less"
        )


def _check_feature(where: str, name: str, features: Sequence[str], known: Collection[str]) -> None:
    if name not in known:
        raise BadRules(f"{where}: the model has no feature {name!r}; {meant(name, features)}")


def _check_limit(where: str, limit: Limit) -> None:
    bounds = [(key, getattr(limit, key)) for key in ("lolo", "low", "high", "hihi")]
    present = [(key, value) for key, value in bounds if value is not None]
    if not present:
        raise BadRules(f"{where} has no limit; give at least one of low, high, lolo, hihi")
    for (lower, low), (upper, high) in pairwise(present):
        if not low <= high:
            raise BadRules(f"{where}: {lower} {low:g} is above {upper} {high:g}; swap or correct them")
    if not 0.0 <= limit.weight < math.inf:
        raise BadRules(f"{where}: weight is {limit.weight:g}, expected 0 or more")
    if not 0.0 <= limit.deadband < math.inf:
        raise BadRules(f"{where}: deadband is {limit.deadband:g}, expected 0 or more")
    for low_key, high_key in (("low", "high"), ("lolo", "hihi")):
        least, most = getattr(limit, low_key), getattr(limit, high_key)
        if limit.deadband and least is not None and most is not None and limit.deadband > most - least:
            raise BadRules(
                f"{where}: deadband {limit.deadband:g} is wider than from {low_key} to {high_key} "
                f"({most - least:g}): the alarm could not go while the value is good; make it smaller"
            )
    _check_seconds(where, limit)


def _check_seconds(where: str, item: Limit | Rule) -> None:
    for key in ("on_delay", "off_delay"):
        _check_duration(where, key, getattr(item, key))


def _check_duration(where: str, key: str, seconds: float) -> None:
    if not 0.0 <= seconds <= MAX_SECONDS:
        raise BadRules(f"{where}: {key} is {seconds:g} s, expected from 0 to {MAX_SECONDS:g} s")


def _check_distance(distance: Distance) -> None:
    if not 0.0 < distance.limit < math.inf:
        raise BadRules(f"distance: limit is {distance.limit:g}, expected more than 0")
    for name, centre in distance.features.items():
        if not 0.0 < centre.scale < math.inf:
            raise BadRules(f"distance: the scale of {name} is {centre.scale:g}, expected more than 0")
        if not 0.0 <= centre.weight < math.inf:
            raise BadRules(f"distance: the weight of {name} is {centre.weight:g}, expected 0 or more")
    if not any(centre.weight for centre in distance.features.values()):
        raise BadRules("distance has no feature with a weight; name some under features, or leave it out")


def _check_rules(rules: Rules) -> None:
    if len(rules.rules) > MAX_RULES:
        raise BadRules(f"rules: there are {len(rules.rules)}, at most {MAX_RULES} are read")
    above: list[str] = []
    for name, rule in rules.rules.items():
        _check_rule(f"rules: {name}", rule)
        _check_condition(f"rules: {name}", rule.condition, rules, above)
        above.append(name)
    combined = {
        name
        for rule in rules.rules.values()
        if isinstance(rule.condition, Of)
        for name in rule.condition.rules
    }
    for name, rule in rules.rules.items():
        if rule.decision == "none" and name not in combined:
            raise BadRules(
                f"rules: {name} has no effect; give it a decision, or name it under of in a rule below it"
            )
    effects = {rule.decision for rule in rules.rules.values()}
    judging = bool(rules.limits) or rules.distance is not None or "vote" in effects
    if effects and not judging and not (effects | {rules.default}) >= {"fail", "pass"}:
        other = "pass" if rules.default == "fail" else "fail"
        raise BadRules(
            f"every row would {rules.default}: that is the default, and no rule decides {other}; "
            f"write default: {other}, or add a rule with decision: {other}"
        )
    if rules.reset is not None:
        try:
            expression.parse(rules.reset, rules.features)
        except BadRules as error:
            raise BadRules(f"reset.when: {error}") from error
        latched = [limit.latch for limit in rules.limits.values()] + [
            rule.latch for rule in rules.rules.values()
        ]
        if not any(latched):
            raise BadRules(
                "reset has nothing to release; set latch: true on a limit or a rule, or leave reset out"
            )


def _check_rule(where: str, rule: Rule) -> None:
    low, high = {"pass": (0.0, 1.0), "none": (math.inf, -math.inf)}.get(rule.decision, (1.0, MAX_SCORE))
    if rule.score is not None and not (low <= rule.score <= high and (low == 0.0 or rule.score > low)):
        expected = {
            "pass": "from 0 to 1, which passes",
            "none": "none, as the rule decides nothing; leave it out",
        }.get(rule.decision, f"more than 1, which fails, and at most {MAX_SCORE:g}")
        raise BadRules(f"{where}: score is {rule.score:g}, expected {expected}")
    if not 0.0 < rule.weight < math.inf:
        raise BadRules(f"{where}: weight is {rule.weight:g}, expected more than 0")
    _check_seconds(where, rule)


def _check_condition(where: str, condition: Condition, rules: Rules, above: Sequence[str]) -> None:
    match condition:
        case When(text):
            try:
                expression.parse(text, rules.features)
            except BadRules as error:
                raise BadRules(f"{where}: when: {error}") from error
        case Lacking(feature):
            _check_feature(f"{where}: missing", feature, rules.features, rules.features)
        case Stuck(feature, seconds, within):
            _check_feature(f"{where}: stuck", feature, rules.features, rules.features)
            _check_duration(where, "for", seconds)
            if seconds == 0.0:
                raise BadRules(f"{where}: for is 0 s, expected more: every value stands still for no time")
            if not 0.0 <= within < math.inf:
                raise BadRules(f"{where}: within is {within:g}, expected 0 or more")
        case Rate(feature, per, rise, fall):
            _check_feature(f"{where}: rate", feature, rules.features, rules.features)
            _check_duration(where, "per", per)
            if per < 0.001:
                raise BadRules(f"{where}: per is {per:g} s, expected 0.001 s or more")
            if rise is None and fall is None:
                raise BadRules(f"{where}: give rise, fall or both: how far the value may move within per")
            for key, value in (("rise", rise), ("fall", fall)):
                if value is not None and not 0.0 <= value < math.inf:
                    raise BadRules(f"{where}: {key} is {value:g}, expected 0 or more")
        case Of(names, k):
            for name in names:
                if name not in above:
                    says = "stands below; move it up" if name in rules.rules else meant(name, above)
                    raise BadRules(f"{where}: of: no rule {name!r} above this one; {says}")
            if len(set(names)) < len(names):
                raise BadRules(f"{where}: of names a rule twice; keep one")
            total = sum(rules.rules[name].weight for name in names)
            if not 0.0 < k * (1.0 - A_HAIR) <= total:
                raise BadRules(
                    f"{where}: k is {k:g}, expected more than 0, and at most {total:g}, their weight together"
                )
