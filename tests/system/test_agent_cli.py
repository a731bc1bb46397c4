from __future__ import annotations

import json
import os
import resource
import socket
import stat
import subprocess
import sys

import pytest

from edge_agent.contract.bundle import MODEL, pack
from tests.support.agents import BIN, AgentProcess, run_cli
from tests.support.bundles import tiny_bundle
from tests.support.services import eventually


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def agent(tmp_path):
    agent = AgentProcess(tmp_path / "agent", updates={"probation": {"seconds": 0, "requests": 0}})
    yield agent
    agent.stop()


def one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr


def test_with_no_configuration_it_starts_and_says_what_is_missing(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    config = tmp_path / "agent.yaml"
    config.write_text(f"store: {tmp_path / 'store'}\nhttp: {{port: 0}}\n")
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    said = []
    assert child.stderr is not None
    for line in child.stderr:
        said.append(line)
        if "answers on http://127.0.0.1:" in line:
            break
    child.terminate()
    child.stderr.read()
    child.stderr.close()
    assert child.wait(30) == 0
    text = "".join(said)
    assert "no model in" in text
    assert "edge-agent install BUNDLE" in text
    assert "set updates.source" in text
    assert "set mqtt.host" in text


def test_a_bundle_is_installed_into_a_running_agent_and_taken_back(agent, tmp_path, bundle):
    agent.start()
    assert agent.get("/v2/health/live")[0] == 200
    done = run_cli("edge-agent", "install", bundle.path, "--config", agent.config, "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["result"] == "succeeded"
    assert agent.predict([0.1, 0.2, 0.3, 0.4])["version"] == "1.0.0"

    second = tiny_bundle(tmp_path / "second", version="2.0.0")
    pack(second, tmp_path / "second.tar")
    done = run_cli("edge-agent", "install", tmp_path / "second.tar", "--config", agent.config)
    assert (done.returncode, done.stdout) == (0, "succeeded: demo 2.0.0 is live, on probation\n"), done
    assert agent.predict([0.1, 0.2, 0.3, 0.4])["version"] == "2.0.0"

    status = json.loads(run_cli("edge-agent", "status", "--config", agent.config, "--json").stdout)
    assert status["models"][0]["digest"] == second.digest
    assert status["device"] == "unit-1"

    done = run_cli("edge-agent", "rollback", "--config", agent.config)
    assert done.returncode == 0, done
    assert agent.predict([0.1, 0.2, 0.3, 0.4])["version"] == "1.0.0"


def test_a_bundle_is_installed_and_taken_back_where_no_agent_runs(agent, tmp_path, bundle):
    done = run_cli("edge-agent", "install", bundle.path, "--config", agent.config)
    assert done.returncode == 0, done
    assert "demo 1.0.0 is installed; no agent runs: it answers from the next start on" in done.stdout
    second = tiny_bundle(tmp_path / "second", version="2.0.0")
    assert run_cli("edge-agent", "install", second.path, "--config", agent.config).returncode == 0
    status = json.loads(run_cli("edge-agent", "status", "--config", agent.config, "--json").stdout)
    assert status["models"][0]["version"] == "2.0.0"
    assert run_cli("edge-agent", "rollback", "--config", agent.config).returncode == 0
    agent.start()
    agent.wait_for(version="1.0.0", source="model")


def test_verify_runs_the_golden_vectors(tmp_path, bundle):
    done = run_cli("edge-agent", "verify", bundle.path, "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["self_test"]["passed"] is True
    wrong = tiny_bundle(tmp_path / "wrong", bad=True)
    done = run_cli("edge-agent", "verify", wrong.path)
    assert done.returncode == 1
    assert "golden" in done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["verify", "install"])
@pytest.mark.parametrize("damage", ["missing", "not a bundle", "truncated", "tampered"])
def test_a_bad_bundle_is_one_line_and_changes_nothing(agent, tmp_path, bundle, verb, damage):
    path = tmp_path / "bundle.tar"
    pack(bundle, path)
    if damage == "missing":
        path.unlink()
    elif damage == "not a bundle":
        path.write_bytes(b"PK\x03\x04 something else")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4096])
    else:
        data = bytearray(path.read_bytes())
        data[2048] ^= 1
        path.write_bytes(data)
    one_line(run_cli("edge-agent", verb, path, "--config", agent.config), "bundle.tar")
    models = agent.store / "models"
    assert not models.exists() or not any(models.iterdir())


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(tmp_path):
    config = tmp_path / "agent.yaml"
    config.write_text("htttp: {port: 1}\n")
    one_line(run_cli("edge-agent", "run", "--config", config), "unknown key htttp", "did you mean http?")


def test_a_port_that_is_taken_is_named(agent):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", agent.port))
        taken.listen()
        done = run_cli("edge-agent", "run", "--config", agent.config)
    assert done.returncode == 1
    assert f"port {agent.port}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_store_that_cannot_be_written_is_named(agent):
    agent.store.mkdir()
    agent.store.chmod(stat.S_IRUSR | stat.S_IXUSR)
    command = [str(BIN / "edge-agent"), "run", "--config", str(agent.config)]
    if os.geteuid() == 0:
        # Root may write everywhere but on a read-only file system; the mount ends with the process.
        script = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
        isolated = ["unshare", "--mount", "sh", "-c", script, str(agent.store)]
        if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this root may not mount a read-only file system")
        command = [*isolated, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    agent.store.chmod(0o700)
    assert done.returncode == 1
    assert str(agent.store) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_store_in_the_way_of_a_file_is_named(agent, tmp_path):
    agent.store.write_text("a file")
    done = run_cli("edge-agent", "run", "--config", agent.config)
    assert done.returncode == 1
    assert str(agent.store) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_second_agent_in_the_same_store_is_refused(agent, tmp_path):
    agent.start()
    other = AgentProcess(tmp_path / "other", store=str(agent.store))
    done = run_cli("edge-agent", "run", "--config", other.config)
    assert done.returncode == 1
    assert "another" in done.stderr.splitlines()[-1]
    assert agent.get("/v2/health/live")[0] == 200


def test_the_version_is_printed_without_loading_anything_heavy():
    code = (
        "import sys\n"
        "from edge_agent.cli import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'onnxruntime', 'tuf', 'cryptography', 'uvloop'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "edge-agent" in done.stdout


def test_an_unknown_command_is_a_usage_error():
    assert run_cli("edge-agent", "fly").returncode == 2


def test_sigterm_drains_and_exits_with_0(agent, bundle):
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    agent.start()
    agent.wait_for(source="model")
    assert agent.stop() == 0


def test_a_token_is_printed_once_opens_the_port_and_can_be_revoked(agent, tmp_path):
    tokens = tmp_path / "tokens"
    content = json.loads(agent.config.read_text())
    agent.config.write_text(json.dumps(content | {"http": {"port": agent.port, "tokens_file": str(tokens)}}))
    refused = run_cli("edge-agent", "run", "--config", agent.config)
    assert refused.returncode == 1
    failed = json.loads(refused.stderr.splitlines()[-1])
    assert (failed["event"], failed["level"]) == ("agent_failed", "error")
    assert f"http.tokens_file {tokens}" in failed["message"]

    made = run_cli("edge-agent", "token", "alice", "--config", agent.config)
    assert made.returncode == 0, made
    token = made.stdout.strip()
    assert len(token) >= 43
    assert token not in made.stderr
    assert token not in tokens.read_text()
    one_line(run_cli("edge-agent", "token", "alice", "--config", agent.config), "alice", "revoke")
    one_line(run_cli("edge-agent", "token", "a/b", "--config", agent.config), "a/b")
    one_line(run_cli("edge-agent", "token", "--revoke", "bob", "--config", agent.config), "bob", "alice")

    agent.start()
    assert agent.get("/v2")[0] == 401
    assert agent.get("/v2/health/live")[0] == 200
    assert agent.get("/v2", token)[0] == 200
    assert (
        run_cli("edge-agent", "status", "--config", agent.config).returncode == 0
    )  # the socket asks for none
    assert run_cli("edge-agent", "token", "--revoke", "alice", "--config", agent.config).returncode == 0
    eventually(lambda: agent.get("/v2", token)[0] == 401, "the token to be refused", 20)


def test_a_token_needs_a_file_to_be_kept_in(agent):
    one_line(run_cli("edge-agent", "token", "alice", "--config", agent.config), "http.tokens_file", "--file")


def test_bench_measures_bundles_side_by_side(tmp_path, bundle):
    other = tiny_bundle(tmp_path / "other", version="2.0.0")
    done = run_cli("edge-agent", "bench", bundle.path, other.path, "--seconds", "0.3", "--json")
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    assert report["machine"]["cores"] >= 1
    first, second = report["bundles"]
    assert (first["version"], second["version"]) == ("1.0.0", "2.0.0")
    for what in ("model", "request", "rules"):
        assert 0 < first[what]["p50"] <= first[what]["p99"] <= first[what]["longest"]
    assert set(first["rows_per_second"]) == {"1", "2", "4", "8", "16", "32", "64"}
    shown = run_cli("edge-agent", "bench", bundle.path, "--seconds", "0.2")
    assert "rows per second" in shown.stdout
    assert "p99.9" in shown.stdout


def test_bench_of_what_is_no_bundle_is_one_line(tmp_path):
    one_line(run_cli("edge-agent", "bench", tmp_path / "absent"), "absent")
    one_line(run_cli("edge-agent", "bench", tmp_path, "--seconds", "0"), "--seconds")


def test_the_status_for_the_page_holds_no_paths(agent, bundle):
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    agent.start()
    status, body = agent.get("/status")
    assert status == 200
    assert str(agent.folder) not in body.decode()
    report = json.loads(body)
    assert report["models"][0]["name"] == "demo"
    assert report["health"]["live"] is True
    assert report["updates"]["models"]["demo"]["state"] in ("probation", "committed")


def test_a_local_install_leaves_probation_without_a_repository(agent, bundle):
    agent.start()
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0

    def state():
        return json.loads(agent.get("/status")[1])["updates"]["models"]["demo"]["state"]

    eventually(lambda: state() == "committed", "the release to be committed", 30)


def test_a_model_is_unloaded_and_loaded_in_the_running_agent(agent, bundle):
    assert run_cli("edge-agent", "install", bundle.path, "--config", agent.config).returncode == 0
    one_line(run_cli("edge-agent", "unload", "demo", "--config", agent.config), "no agent runs")
    agent.start()
    assert run_cli("edge-agent", "unload", "demo", "--config", agent.config).returncode == 0
    assert agent.predict([1, 1, 1, 1])["reason"] == "unloaded"
    done = run_cli("edge-agent", "load", "demo", "--config", agent.config, "--json")
    assert json.loads(done.stdout) == {"model": "demo", "result": "loaded"}
    assert agent.predict([1, 1, 1, 1])["source"] == "model"
    one_line(run_cli("edge-agent", "load", "absent/../x", "--config", agent.config), "absent/../x", "demo")


@pytest.mark.parametrize("running", [True, False])
def test_updates_are_held_and_released_by_hand(agent, running):
    if running:
        agent.start()
    asked = ("--until", "2999-01-01T06:00", "--reason", "audit")
    done = run_cli("edge-agent", "hold", *asked, "--config", agent.config)
    assert done.returncode == 0, done
    assert "updates are held until 2999-01-01T06:00:00" in done.stdout
    assert (agent.store / "hold").exists()
    status = run_cli("edge-agent", "status", "--config", agent.config).stdout
    assert "held     audit until 2999" in status
    done = run_cli("edge-agent", "hold", "--until", "yesterday", "--config", agent.config)
    assert (done.returncode, "no time" in done.stderr) == (1, True)
    done = run_cli("edge-agent", "hold", "--release", "--json", "--config", agent.config)
    assert json.loads(done.stdout)["held"] is False
    assert not (agent.store / "hold").exists()


def test_a_disk_without_room_is_named_and_nothing_stays_behind(agent, tmp_path, bundle):
    """What a full disk does to a write, a limit on the size of files does, too."""
    pack(bundle, tmp_path / "b.tar")
    done = run_cli(
        "edge-agent", "install", tmp_path / "b.tar", "--config", agent.config,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed_no_state_change: cannot unpack into " in done.stderr + done.stdout
    assert "File too large; check the store's file system" in done.stderr + done.stdout
    status = json.loads(run_cli("edge-agent", "status", "--config", agent.config, "--json").stdout)
    assert status["models"] == []


def test_a_damaged_bundle_is_told_from_a_good_one_before_it_is_installed(agent, tmp_path, bundle):
    (bundle.path / MODEL).write_bytes(b"")
    done = run_cli("edge-agent", "verify", bundle.path)
    one_line(done, "member model.onnx has 0 bytes", "it is damaged, copy it again")


@pytest.mark.parametrize(
    "command",
    [
        ["install", "{locked}/bundle.tar"],
        ["verify", "{locked}/bundle.tar"],
        ["run", "--store", "{locked}/store"],
        ["status", "--store", "{locked}/store"],
        ["rollback", "--store", "{locked}/store"],
    ],
    ids=" ".join,
)
def test_what_this_user_may_not_read_is_said_in_one_line(agent, tmp_path, command):
    locked = tmp_path / "locked"
    (locked / "store" / "models").mkdir(parents=True)
    (locked / "bundle.tar").touch()
    locked.chmod(0)
    arguments = [part.format(locked=locked) for part in command]
    # Root reads everything unless it gives that up.
    user = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run(
        [*user, str(BIN / "edge-agent"), *arguments, "--config", str(agent.config)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    locked.chmod(0o700)
    assert done.returncode == 1, done
    assert f"{locked}/" in done.stderr.splitlines()[-1]
    assert "Permission denied; " in done.stderr.splitlines()[-1], "and what to do"
    assert "Traceback" not in done.stderr
