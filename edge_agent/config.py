"""agent.yaml: every option, its default and its unit. Unknown keys are refused, with a suggestion.

Everything has a default: ``edge-agent run`` works without a file. Each class gets the part it needs.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import yaml

from edge_agent.contract.registry import is_registry, parse_place
from edge_agent.errors import ConfigError

CONTROL_SOCKET: Final = "control.sock"  # in the store: whoever may write the store may command the agent

_CLOCK = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TlsConfig(_Section, frozen=True):
    """TLS of the HTTP listener. Files are PEM; replaced files are taken up without a restart."""

    certificate: str  # the chain, the server's own first
    key: str  # not encrypted
    client_ca: str = ""  # clients show a certificate that this signed
    client_certificates: Literal["required", "accepted"] = "required"  # accepted: or else a token


class HttpConfig(_Section, frozen=True):
    """The HTTP listener."""

    host: str = "127.0.0.1"
    port: Port = 8080  # 0: any free port, printed at start
    max_body_bytes: Count = 16 << 20
    max_connections: Count = 512
    header_timeout_seconds: Positive = 10.0  # a client has this long to send a whole request
    idle_timeout_seconds: Positive = 75.0
    tls: TlsConfig | None = None
    tokens_file: str | None = None  # clients send a bearer token; made by `edge-agent token`
    requests_per_second: NotNegative = 0.0  # per client: token name, certificate or address; 0: no limit
    request_burst: Count = 100  # requests that a client may send at once under that limit


class MqttTlsConfig(_Section, frozen=True):
    """TLS to the broker. Files are PEM, and read again at every connection."""

    ca: str = ""  # who signed the broker's certificate; empty: the system's authorities
    certificate: str = ""  # our own chain, where the broker wants one
    key: str = ""


class MqttConfig(_Section, frozen=True):
    """The MQTT client. Topics begin with ``{prefix}/{device}/``."""

    host: str = "127.0.0.1"
    port: Port = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    prefix: str = "edge"
    username: str | None = None
    password_file: str | None = None
    keepalive_seconds: Count = 30
    reply_prefixes: tuple[str, ...] = ()  # response topics outside these are refused; none: `{prefix}/`
    max_payload_bytes: Count = 16 << 20
    max_pending: Count = 256  # requests being answered; beyond it they are refused at once
    reconnect_max_seconds: Positive = 30.0
    tls: MqttTlsConfig | None = None
    session_expiry_seconds: Count = 86_400  # how long the broker keeps inputs for a device that is away
    max_queue_bytes: Count = 64 << 20  # decisions that wait on disk for the broker; beyond it the oldest go
    holds: bool = False  # updates may be held by a message, for a day at most


class EngineConfig(_Section, frozen=True):
    """onnxruntime. The defaults are the low-jitter profile: one thread, no spinning, arena off."""

    threads: Count = 1
    inline_below_ms: NotNegative = 2.0  # a model measured faster runs on the event loop, else in a thread
    max_batch_rows: Count = 64
    # A request waits so long for others to go through the model with it; 0: not at all. It costs every answer
    # that time, and processor time below a millisecond; worth it only for models that gain much by batches.
    batch_delay_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    warmup_runs: Count = 20
    # Models in memory together, candidates in the shadow or in A/B among them, each at twice its file
    # (onnxruntime keeps a packed copy), a file that several have once; 0: no limit. Beyond it the one not
    # asked for longest is unloaded, its rules answer, and the next request brings it back.
    memory_budget_mb: NotNegative = 0.0
    stay_seconds: NotNegative = 5.0  # a loaded model stays so long before another comes back in its place
    # onnxruntime session options by their own names, on top of the profile: a device's remedy, not a setting
    # (`mlas.disable_kleidiai: "1"` where SME is detected falsely, `session.disable_prepacking: "1"` for less
    # memory).
    options: dict[str, str] = {}


class ServingConfig(_Section, frozen=True):
    """What an answer may take, and when a failing model is left alone."""

    deadline_ms: Positive = 100.0  # the rules take over 5 % before it, at most 5 ms, to answer inside it
    max_pending_rows: Count = 4096  # rows waiting for the engine; beyond it requests are refused at once
    max_request_rows: Count = 1024
    breaker_failures: Count = 5  # consecutive failures that open the breaker
    breaker_seconds: Positive = (
        5.0  # then one request tries the model, the others wait for what becomes of it
    )
    max_sources: Count = 1000  # whose alarms over time are remembered, per model
    default_decision: Literal["pass", "fail"] = "fail"  # when neither model nor rules exist


class ProbationConfig(_Section, frozen=True):
    """How a new release proves itself before it is committed."""

    seconds: NotNegative = 60.0
    requests: Annotated[int, msgspec.Meta(ge=0)] = 100  # both must pass, or `max_seconds`
    max_seconds: Positive = 3600.0  # a device without traffic commits after this long
    max_fallback_ratio: Share = 0.05  # model failures among its answers
    max_restarts: Count = 3  # the process died this often in probation: roll back at start
    max_non_finite_ratio: Share = 0.02  # rows answered NaN or infinite
    # Against the release before, once both have answered enough rows to compare; 0 switches one off.
    max_latency_ratio: NotNegative = 4.0  # its 95th percentile over the one before
    max_fail_shift: Share = 0.3  # change of the share of rows decided fail
    max_score_shift: NotNegative = 3.0  # mean move of score/threshold, in doublings


class ShadowConfig(_Section, frozen=True):
    """A candidate in mode `shadow` sees requests beside the release that answers: so long, and how well."""

    requests: Count = 1000  # compared; this many or `seconds`, whichever comes first
    seconds: Positive = 3600.0
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2  # of the requests that it sees
    max_disagreement: Share = 0.05  # rows decided otherwise, or not finite
    max_latency_ratio: NotNegative = 4.0  # its median over that of the release that answers; 0: not judged


class WindowConfig(_Section, frozen=True):
    """A maintenance window, in the device's local time. ``end`` before ``start`` ends the day after."""

    start: str | int  # 22:00; YAML 1.1 reads some of those as a number, which is minutes after midnight
    end: str | int
    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = ()  # none: every day


class UpdatesConfig(_Section, frozen=True):
    """Where releases come from.

    ``source`` is an http(s) URL, a file: URL, a path, or a branch of a git repository
    (`git+https://host/fleet.git#main:repository`); empty: nowhere.
    """

    source: str = ""
    root: str = ""  # path of the embedded TUF root.json, the anchor of all trust
    blobs: str = ""  # URL or path that members are fetched from, or oci://host/name; empty: the source
    credentials_file: str = ""  # for that registry: `user:password`, or Docker's config.json
    proxy: str = ""  # http://host:port; empty: as the environment says
    ca_file: str = ""  # PEM: who signs the server's certificate; empty: the system's authorities
    client_certificate: str = ""  # PEM that the server asks for
    client_key: str = ""  # its key, where it is not in the same file
    windows: tuple[WindowConfig, ...] = ()  # maintenance windows: updates begin only there; none: any time
    models: tuple[str, ...] = ()  # models to follow; none: those that the assignments name
    interval_seconds: Positive = 15.0
    jitter: Share = 0.2  # share of the interval, per device
    timeout_seconds: Positive = 30.0
    max_bundle_bytes: Count = 512 << 20
    probation: ProbationConfig = ProbationConfig()
    shadow: ShadowConfig = ShadowConfig()
    in_process: bool = False  # check in this process instead of a short-lived child: tests and simulation


class RemoteWriteConfig(_Section, frozen=True):
    """Prometheus remote write 1.0, from a queue on disk."""

    url: str
    interval_seconds: Positive = 15.0
    max_queue_bytes: Count = 64 << 20
    timeout_seconds: Positive = 10.0


class DriftConfig(_Section, frozen=True):
    """Drift detection on answered rows."""

    enabled: bool = True
    window_rows: Count = 1000
    max_rows_per_second: Positive = 200.0  # rows beyond it are not looked at: bounded CPU


class Config(_Section, frozen=True):
    """The whole of agent.yaml."""

    device: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = ""
    store: str = ""
    insecure: bool = False  # allow listening beyond loopback without TLS and token
    http: HttpConfig = HttpConfig()
    mqtt: MqttConfig | None = None
    engine: EngineConfig = EngineConfig()
    serving: ServingConfig = ServingConfig()
    updates: UpdatesConfig = UpdatesConfig()
    remote_write: RemoteWriteConfig | None = None
    drift: DriftConfig = DriftConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def minutes_of_day(clock: str | int) -> int | None:
    """Minutes after midnight of a time such as ``22:00``; None if it is none."""
    if isinstance(clock, int):
        return clock if 0 <= clock < 24 * 60 else None
    found = _CLOCK.fullmatch(clock)
    return int(found[1]) * 60 + int(found[2]) if found else None


def default_store() -> Path:
    """StateDirectory= of systemd, else /var/lib/edge-agent for root, else $XDG_STATE_HOME/edge-agent."""
    if from_systemd := os.environ.get("STATE_DIRECTORY"):
        return Path(from_systemd.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/edge-agent")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "edge-agent"


def load(path: Path | None) -> Config:
    """Read agent.yaml; ``None`` gives the defaults.

    Raises:
        ConfigError: unreadable, not YAML, unknown key (with a suggestion), wrong type or value.
    """
    if path is None:
        return from_mapping({}, "defaults")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {why}; give another file with --config") from error
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if content is None:
        content = {}
    return from_mapping(content, str(path))


def from_mapping(content: Any, where: str) -> Config:
    """Check a mapping and fill in what depends on the machine: device name and store.

    Raises:
        ConfigError: as ``load``.
    """
    _refuse_unknown_keys(content, Config, where, "")
    if isinstance(content, dict):
        if not content.get("device"):
            content = {**content, "device": _device_name()}
        if not content.get("store"):
            content = {**content, "store": str(default_store())}
    try:
        config = msgspec.convert(content, Config)
    except msgspec.ValidationError as error:
        what, _, key = str(error).partition(" - at `$.")
        said = f"{key.rstrip('`')}: {what[:1].lower()}{what[1:]}" if key else what
        raise ConfigError(f"{where}: {said}; correct it") from error
    _check(config, where)
    return config


def _device_name() -> str:
    """EDGE_DEVICE (a pod sets it to its node: its own host name is the pod's), else the host name."""
    return os.environ.get("EDGE_DEVICE") or socket.gethostname().split(".")[0] or "device"


def _refuse_unknown_keys(content: Any, section: type, where: str, prefix: str) -> None:
    """Msgspec names an unknown key; a person also wants the one they meant."""
    if not isinstance(content, dict):
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    for key, value in content.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
        for candidate in (fields[key], *getattr(fields[key], "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, _Section):
                _refuse_unknown_keys(value, candidate, where, f"{prefix}{key}.")


def _check(config: Config, where: str) -> None:
    if config.updates.source and not config.updates.root:
        raise ConfigError(
            f"{where}: updates.source is set but updates.root is not; give the path of the fleet's "
            "root.json, without it no release can be trusted"
        )
    if is_registry(config.updates.blobs):
        try:
            parse_place(config.updates.blobs)
        except ValueError as error:
            raise ConfigError(f"{where}: updates.blobs {error}") from error
    for number, window in enumerate(config.updates.windows):
        for key, clock in (("start", window.start), ("end", window.end)):
            if minutes_of_day(clock) is None:
                raise ConfigError(
                    f"{where}: updates.windows[{number}].{key} {clock!r}: expected a time such as 22:00"
                )
    if config.updates.client_key and not config.updates.client_certificate:
        raise ConfigError(f"{where}: updates.client_key is set but updates.client_certificate is not")
    http = config.http
    if not _is_loopback(http.host) and not config.insecure:
        known = http.tokens_file or (http.tls is not None and http.tls.client_ca)
        lacks = [what for what, there in (("http.tls", http.tls), ("http.tokens_file", known)) if not there]
        if lacks:
            raise ConfigError(
                f"{where}: http.host {http.host} listens beyond loopback without TLS and a token or client "
                f"certificates; set {' and '.join(lacks)}, or http.host: 127.0.0.1, or insecure: true if the "
                "network is trusted"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
