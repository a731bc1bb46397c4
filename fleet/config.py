"""fleet.yaml: how this fleet is measured and how its roll-outs go.

People write ``fleet.yaml`` and ``devices.yaml`` and the tool never rewrites them; the tool writes
``repository/`` and ``rollouts/``. Unknown keys are refused, with a suggestion. Policy names are Argo
Rollouts' and Rancher Fleet's where one exists, in snake_case and with the unit at the end.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import yaml

from fleet.errors import FleetConfigError
from fleet.registry import RegistryConfig
from fleet.repository import ExpiryConfig

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Limit = Annotated[int, msgspec.Meta(ge=0)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
T = TypeVar("T")

_MAX_DEPTH: Final = 32  # levels; policies and inventories need six


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class MetricConfig(_Section, frozen=True):
    """One metric of the analysis, and what makes it fail. Without any condition it is refused.

    Argo's ``failureCondition`` with a fixed bound is ``failure_above``/``failure_below`` here and is applied
    to every device under test; ``compare: control`` judges the devices under test against the others of the
    same minutes.
    """

    name: Literal["fallback_ratio", "fail_ratio", "error_ratio", "p99_seconds"]
    failure_above: float | None = None
    failure_below: float | None = None
    compare: Literal["control"] | None = None
    direction: Literal["increase", "decrease", "either"] = "increase"  # which difference is a failure
    allowed_increase: NotNegative = 0.0  # difference of the means that is tolerated, in the metric's unit
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05  # the difference is real below this p
    min_rows: Count = 20  # rows (requests for error_ratio) of a device in one interval, else no data
    must_have_data: bool = True  # False: no data counts as a pass
    failure_limit: Limit = 0  # failed measurements tolerated
    inconclusive_limit: Limit = 8  # measurements without data, in a row, before a person is asked
    consecutive_error_limit: Limit = 4  # measurements that could not be taken, in a row
    dry_run: bool = False  # measured and reported, never decides


# Four figures that any model has. The limits are starting points, written out by `edge-fleet init`.
METRICS: Final = (
    MetricConfig(name="fallback_ratio", failure_above=0.05),
    MetricConfig(name="error_ratio", failure_above=0.01, must_have_data=False),
    MetricConfig(name="fail_ratio", compare="control", direction="either", allowed_increase=0.10),
    MetricConfig(name="p99_seconds", compare="control", allowed_increase=0.010, failure_limit=2),
)


class AnalysisConfig(_Section, frozen=True):
    """How a wave is judged: ``count`` passes of every metric, one measurement per ``interval_seconds``."""

    initial_delay_seconds: NotNegative = 30.0  # after the wave runs the candidate: caches warm up
    count: Count = 10
    metrics: tuple[MetricConfig, ...] = METRICS


class CanaryConfig(_Section, frozen=True):
    """The first wave."""

    devices: Count = 10
    stratify_by: tuple[str, ...] = ()  # labels: the canary is chosen in proportion from every combination


class Policy(_Section, frozen=True):
    """How a roll-out goes. Kept in its record, so that editing fleet.yaml never changes one that runs."""

    canary: CanaryConfig = CanaryConfig()
    waves: tuple[Annotated[float, msgspec.Meta(gt=0, lt=1)], ...] = (0.1,)  # shares after the canary
    interval_seconds: Positive = 15.0  # between two looks
    analysis: AnalysisConfig = AnalysisConfig()
    max_failed: Limit = 0  # devices that went back by themselves or never took the candidate
    max_unreachable: Ratio = 0.1  # share of a wave that may be silent; never counted as failed
    in_progress_timeout_seconds: Positive = 120.0  # a reachable device that has not taken it by then failed
    progress_deadline_seconds: Positive = 900.0  # a wave that is not decided by then waits for a person


class PrometheusConfig(_Section, frozen=True):
    """Where the devices' metrics are, with a ``device`` label. Without it the devices are scraped."""

    address: str
    timeout_seconds: Positive = 10.0
    stale_after_seconds: Positive = 60.0  # a device whose newest sample is older is unreachable


class ScrapeConfig(_Section, frozen=True):
    """Reading ``{address}/metrics`` of every device."""

    timeout_seconds: Positive = 5.0
    connections: Count = 32


class FleetConfig(_Section, frozen=True):
    """The whole of fleet.yaml."""

    name: str = "fleet"
    prometheus: PrometheusConfig | None = None
    registry: RegistryConfig | None = None
    scrape: ScrapeConfig = ScrapeConfig()
    expiry: ExpiryConfig = ExpiryConfig()
    policy: Policy = Policy()


TEMPLATE: Final = """\
# A fleet: people edit this file and devices.yaml; edge-fleet writes repository/ and rollouts/.
name: {name}

# Where the devices' metrics are (label: device). Without it edge-fleet reads {{address}}/metrics of each.
# prometheus: {{address: "http://127.0.0.1:9090"}}

# An OCI registry that publish also pushes members to; devices name it in updates.blobs.
# registry: {{address: "oci://registry.example/plant/models", credentials_file: /path/to/config.json}}

policy:
  canary:
    devices: 10              # the first wave; 0 failures in 10 rule out only a failure rate above 26 %
    stratify_by: []          # labels of devices.yaml, for example [site, soc]
  waves: [0.1]               # shares of the fleet after the canary; then everyone
  interval_seconds: 15       # between two looks at the devices
  max_failed: 0              # devices that went back by themselves or refused the candidate
  max_unreachable: 0.1       # share that may be silent; silent is never failed
  in_progress_timeout_seconds: 120
  progress_deadline_seconds: 900
  analysis:
    initial_delay_seconds: 30
    count: 10                # measurements each metric must pass, one per interval
    metrics:                 # failure_above: a bound for every device; compare: against the other devices
      - {{name: fallback_ratio, failure_above: 0.05}}
      - {{name: error_ratio, failure_above: 0.01, must_have_data: false}}
      - {{name: fail_ratio, compare: control, direction: either, allowed_increase: 0.10}}
      - {{name: p99_seconds, compare: control, allowed_increase: 0.010, failure_limit: 2}}

# Days until signed metadata expires; `edge-fleet serve` and `edge-fleet refresh` re-sign the online roles.
expiry: {{root_days: 365, targets_days: 365, rollout_days: 90, snapshot_days: 14, timestamp_days: 7}}
"""


def load(path: Path) -> FleetConfig:
    """Read fleet.yaml.

    Raises:
        FleetConfigError: unreadable, not YAML, unknown key (with a suggestion), wrong type or value.
    """
    config = convert(read_yaml(path), FleetConfig, str(path))
    for metric in config.policy.analysis.metrics:
        if metric.failure_above is None and metric.failure_below is None and metric.compare is None:
            raise FleetConfigError(
                f"{path}: policy.analysis.metrics {metric.name} has no condition; "
                "give failure_above, failure_below or compare: control"
            )
    names = [metric.name for metric in config.policy.analysis.metrics]
    if len(set(names)) != len(names):
        raise FleetConfigError(f"{path}: policy.analysis.metrics names a metric twice")
    if list(config.policy.waves) != sorted(set(config.policy.waves)):
        raise FleetConfigError(
            f"{path}: policy.waves {list(config.policy.waves)} must grow, for example [0.1, 0.5]"
        )
    return config


def read_yaml(path: Path) -> Any:
    """A YAML file's content; {} for an empty one.

    Raises:
        FleetConfigError: unreadable or not YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = path.read_bytes()
        _refuse_depth(data, loader, path)
        content = yaml.load(data, Loader=loader)  # noqa: S506 - both are safe loaders
    except OSError as error:
        raise FleetConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise FleetConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return {} if content is None else content


def _refuse_depth(data: bytes, loader: Any, path: Path) -> None:
    """Refuse what libyaml would crash on: it builds nested values recursively, in C."""
    depth = 0
    for event in yaml.parse(data, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise FleetConfigError(f"{path}: nested deeper than {_MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def convert(content: Any, expected: type[T], where: str) -> T:
    """Content of a file people write as a typed value.

    Raises:
        FleetConfigError: unknown key (with a suggestion), wrong type or value.
    """
    _refuse_unknown_keys(content, expected, where, "")
    try:
        return msgspec.convert(content, expected)
    except msgspec.ValidationError as error:
        raise FleetConfigError(f"{where}: {str(error).replace('`$.', '`')}") from error


def _refuse_unknown_keys(content: Any, expected: Any, where: str, prefix: str) -> None:
    """Msgspec names an unknown key; a person also wants the one they meant."""
    if isinstance(content, list):
        for item in content:
            for inner in typing.get_args(expected):
                _refuse_unknown_keys(item, inner, where, prefix)
    elif isinstance(content, dict):
        if isinstance(expected, types.UnionType):
            for inner in typing.get_args(expected):
                _refuse_unknown_keys(content, inner, where, prefix)
        elif isinstance(expected, type) and issubclass(expected, msgspec.Struct):
            fields = {field.name: field.type for field in msgspec.structs.fields(expected)}
            for key, value in content.items():
                if key not in fields:
                    close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
                    hint = (
                        f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(fields)}"
                    )
                    raise FleetConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
                _refuse_unknown_keys(value, fields[key], where, f"{prefix}{key}.")
