"""Names, units and labels of every metric, in one place (docs/metrics.md is checked against it).

Rules (https://prometheus.io/docs/practices/naming/): base units, ``_total`` for counters, ``_info`` for
facts, closed label sets that exist at 0 from the start, no per-feature series. The series carry no device
label: the scrape configuration or the remote-write sender adds ``device``.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Metric(NamedTuple):
    """One metric family."""

    name: str  # as exposed, with _total where it is a counter
    kind: str  # counter, gauge, histogram
    labels: tuple[str, ...]
    help: str


AGENT_INFO: Final = Metric(
    "edge_agent_info", "gauge", ("device", "version"), "1; the agent's device name and version"
)
START_TIME: Final = Metric("edge_agent_start_timestamp_seconds", "gauge", (), "When this process started")
HEARTBEAT: Final = Metric("edge_agent_heartbeat_timestamp_seconds", "gauge", (), "Now, by the device's clock")
STORE_WRITABLE: Final = Metric(
    "edge_store_writable",
    "gauge",
    (),
    "1: this agent holds the store; 0: it only serves what is in it, another agent or the disk is in the way",
)

ANSWERS: Final = Metric(
    "edge_answers_total",
    "counter",
    ("model", "version", "source", "reason"),
    "Rows answered, by who answered (model, fallback) and why",
)
DECISIONS: Final = Metric(
    "edge_decisions_total", "counter", ("model", "version", "decision"), "Rows decided pass or fail"
)
INFERENCE_SECONDS: Final = Metric(
    "edge_inference_duration_seconds",
    "histogram",
    ("model", "version"),
    "From a request's tensors to its answer: waiting for the engine, computing, deciding; by request",
)
BATCH_ROWS: Final = Metric(
    "edge_batch_rows", "histogram", ("model", "version"), "Rows that went through the engine together"
)
REQUESTS: Final = Metric(
    "edge_requests_total",
    "counter",
    ("protocol", "status"),
    "Requests, by protocol (http, mqtt) and status (ok, client_error, unavailable, error)",
)
MODEL_INFO: Final = Metric(
    "edge_model_info", "gauge", ("model", "version", "digest"), "1; the release that answers now"
)
MODEL_STATE: Final = Metric(
    "edge_model_state", "gauge", ("model", "state"), "1 for the state the model is in, else 0"
)
MODEL_LOAD_SECONDS: Final = Metric(
    "edge_model_load_duration_seconds", "gauge", ("model",), "Last load and warm-up"
)
SERVING_GAP: Final = Metric(
    "edge_serving_gap_seconds",
    "gauge",
    ("model",),
    "Longest time the engine was kept from answering during the last swap",
)
SPLIT_SHARE: Final = Metric(
    "edge_split_share",
    "gauge",
    ("model", "version"),
    "Share of the requests that a candidate answers beside the release; 0: it failed and answers none",
)

DRIFT_SCORE: Final = Metric(
    "edge_drift_score",
    "gauge",
    ("model", "statistic"),
    "psi_max, psi_score, missing_max of the last full window",
)
DRIFT_FEATURES: Final = Metric(
    "edge_drift_features", "gauge", ("model",), "Features that drift in the last full window"
)
DRIFT_WINDOW_ROWS: Final = Metric(
    "edge_drift_window_rows", "gauge", ("model",), "Rows in the window being filled"
)

UPDATE_STATE: Final = Metric(
    "edge_update_state", "gauge", ("model", "state"), "1 for the state of the update machine, else 0"
)
UPDATE_RESULTS: Final = Metric(
    "edge_update_results_total", "counter", ("model", "result"), "Finished updates, by result"
)
UPDATE_CHECK_TIME: Final = Metric(
    "edge_update_last_check_timestamp_seconds", "gauge", (), "Last time the release repository was reached"
)
METADATA_EXPIRY: Final = Metric(
    "edge_update_metadata_expiry_timestamp_seconds", "gauge", (), "When the trusted release metadata expires"
)
ASSIGNMENTS_SERIAL: Final = Metric(
    "edge_update_assignments_serial", "gauge", (), "Serial of the trusted assignments"
)

QUEUE_PENDING: Final = Metric("edge_remote_write_pending_samples", "gauge", (), "Samples waiting on disk")
QUEUE_SENT: Final = Metric(
    "edge_remote_write_sent_samples_total", "counter", (), "Samples accepted by the receiver"
)
QUEUE_DROPPED: Final = Metric(
    "edge_remote_write_dropped_samples_total",
    "counter",
    ("reason",),
    "Samples given up, by reason (full, rejected, corrupt)",
)
QUEUE_LAST_SUCCESS: Final = Metric(
    "edge_remote_write_last_success_timestamp_seconds", "gauge", (), "Last time the receiver accepted samples"
)

# Sub-millisecond models: the buckets are dense where they live. Seconds.
LATENCY_BUCKETS: Final = (
    25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 100e-3, 1.0,
)  # fmt: skip
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)

SOURCES: Final = ("model", "fallback")
# Why an answer came from where it came from. "ok" goes with the model, everything else with the fallback.
REASONS: Final = (
    "ok",
    "no_model",  # nothing installed, or its files are gone
    "corrupt_model",  # its files are not what the manifest says
    "unloaded",  # an operator unloaded it
    "killed",  # the signed kill switch of the assignments
    "rejected",  # it failed on probation, and there is no release to go back to
    "model_error",  # the engine raised
    "non_finite",  # NaN or infinity in the output
    "deadline",  # no time left
    "breaker_open",  # it failed too often a moment ago
)
DECISIONS_MADE: Final = ("pass", "fail")
MODEL_STATES: Final = ("ready", "loading", "absent", "corrupt", "unloaded", "failed", "rejected")

ALL: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
