from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_agent import config
from edge_agent.config import Config
from edge_agent.errors import ConfigError


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "agent.yaml"
    path.write_text(text)
    return config.load(path)


def test_an_empty_file_and_no_file_give_the_same_defaults(tmp_path):
    assert load(tmp_path, "") == load(tmp_path, "# nothing\n") == config.load(None)


def test_defaults_listen_on_loopback_and_follow_nobody():
    defaults = config.load(None)
    assert defaults.http.host == "127.0.0.1"
    assert (defaults.updates.source, defaults.mqtt, defaults.remote_write) == ("", None, None)


def test_every_section_reads_what_it_writes(tmp_path):
    written = msgspec.to_builtins(config.load(None))
    assert config.from_mapping(written, "again") == config.load(None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("htp: {}", "unknown key htp; did you mean http?"),
        ("http: {prot: 1}", r"unknown key http\.prot; did you mean http\.port\?"),
        ("updates: {probation: {secnds: 1}}", r"did you mean updates\.probation\.seconds\?"),
        ("mqtt: {hots: x}", r"did you mean mqtt\.host\?"),
        ("zzz: 1", "known keys: device, store"),
        ("http: {port: many}", r"agent\.yaml: http\.port: expected `int`, got `str`; correct it"),
        ("http: {port: 70000}", r"http\.port: expected `int` <= 65535; correct it"),
        ("log_level: loud", "log_level: invalid enum value 'loud'"),
        ("device: 'has spaces'", "device"),
        ("[1, 2]", "Expected `object`, got `array`"),
        ("http: {host: 0.0.0.0}", r"http\.host 0\.0\.0\.0"),
        ("updates: {source: 'http://x/'}", r"updates\.root is not"),
        (
            "updates: {windows: [{start: '25:00', end: '1:00'}]}",
            r"windows\[0\]\.start '25:00': expected a time",
        ),
        ("updates: {windows: [{start: '1:00', end: 24:00}]}", r"windows\[0\]\.end 1440: expected a time"),
        ("a: [", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("\0", "is not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_the_file(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says) as raised:
        load(tmp_path, text)
    assert "agent.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"agent\.yaml: No such file"):
        config.load(tmp_path / "agent.yaml")
    (tmp_path / "agent.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"agent\.yaml: not UTF-8 text"):
        config.load(tmp_path / "agent.yaml")


def test_the_times_of_a_window_need_no_quotes(tmp_path):
    """YAML 1.1 reads 22:00 as a number to the base of sixty, and 02:00 as a text."""
    (window,) = load(tmp_path, "updates: {windows: [{start: 22:00, end: 02:00}]}").updates.windows
    assert (config.minutes_of_day(window.start), config.minutes_of_day(window.end)) == (1320, 120)
