"""The services that other tests rely on do what their fixtures promise."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.services import Mosquitto, Prometheus, eventually, require


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_the_broker_goes_away_and_comes_back_on_the_same_port(mosquitto: Mosquitto) -> None:
    assert _accepts(mosquitto.port)
    mosquitto.stop()
    assert not _accepts(mosquitto.port)
    mosquitto.start()
    assert _accepts(mosquitto.port)


@pytest.fixture
def exposition() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"edge_sample_total 7\n")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_prometheus_scrapes_what_it_is_told_and_keeps_it_over_a_kill(
    prometheus: Prometheus, exposition: str
) -> None:
    prometheus.scrape({exposition: {"device": "line-1"}})
    eventually(lambda: bool(prometheus.query("edge_sample_total")), "the target is scraped")
    (sample,) = prometheus.query("edge_sample_total")
    assert (sample.labels["device"], sample.value) == ("line-1", 7.0)

    prometheus.scrape({})
    prometheus.stop(kill=True)
    prometheus.start()

    (series,) = prometheus.series("edge_sample_total[1h]")
    assert {value for _, value in series.points} == {7.0}


def test_a_missing_service_fails_in_ci_and_skips_elsewhere() -> None:
    before = os.environ.get("CI")
    try:
        os.environ["CI"] = "true"
        with pytest.raises(pytest.fail.Exception, match="no-such-daemon is not installed"):
            require("no-such-daemon")
        del os.environ["CI"]
        with pytest.raises(pytest.skip.Exception, match="apt-get install no-such-daemon"):
            require("no-such-daemon")
    finally:
        if before is not None:
            os.environ["CI"] = before
