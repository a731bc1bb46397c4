"""Golden vectors on this machine, through the real engine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_agent.config import EngineConfig
from edge_agent.contract import golden as goldens
from edge_agent.contract.bundle import MODEL, Bundle, write_bundle
from edge_agent.contract.errors import BadBundle, BadMember
from edge_agent.contract.golden import Agreement, Array, Golden
from edge_agent.errors import EngineError
from edge_agent.update.selftest import run_self_test
from tests.support.bundles import tiny_bundle

ENGINE = EngineConfig()


def altered(folder: Path, **files: bytes | None) -> Bundle:
    """A tiny bundle with other members, honestly listed in its manifest."""
    plain = tiny_bundle(folder / "plain")
    contents: dict[str, bytes | None] = {name: plain.read(name) for name in plain.manifest.members}
    contents |= {{"golden": goldens.FILE_NAME, "model": MODEL}[name]: data for name, data in files.items()}
    (folder / "altered").mkdir()
    kept = {name: data for name, data in contents.items() if data is not None}
    return write_bundle(folder / "altered", plain.manifest, kept)


def golden_of(folder: Path, **changes: object) -> bytes:
    golden = goldens.parse(tiny_bundle(folder / "original").read(goldens.FILE_NAME))
    return goldens.encode(msgspec.structs.replace(golden, **changes))


def test_vectors_that_agree_pass_and_are_reported(tmp_path: Path) -> None:
    report = run_self_test(tiny_bundle(tmp_path / "b"), ENGINE)
    assert report.passed
    assert (report.reason, report.vectors) == ("ok", 8)
    assert report.worst <= 1e-5
    assert report.median_seconds > 0
    assert report.as_dict()["message"].startswith("8 vectors agree")


def test_a_model_that_takes_four_rows_at_a_time_is_given_four_at_a_time(tmp_path: Path) -> None:
    report = run_self_test(tiny_bundle(tmp_path / "fours", fixed_batch=4), ENGINE)
    assert (report.passed, report.vectors) == (True, 8), report.message
    report = run_self_test(tiny_bundle(tmp_path / "threes", fixed_batch=3), ENGINE)
    assert (report.passed, report.vectors) == (True, 6), "two vectors are no whole batch"
    report = run_self_test(tiny_bundle(tmp_path / "nines", fixed_batch=9), ENGINE)
    assert (report.reason, report.message) == (
        "no_golden",
        "golden.msgpack holds 8 vectors, the model takes 9 at a time",
    )
    report = run_self_test(tiny_bundle(tmp_path / "bad", fixed_batch=4, bad=True), ENGINE)
    assert report.reason == "selftest"


def test_vectors_that_differ_fail_and_say_by_how_much(tmp_path: Path) -> None:
    report = run_self_test(tiny_bundle(tmp_path / "b", bad=True), ENGINE)
    assert not report.passed
    assert report.reason == "selftest"
    assert report.worst == pytest.approx(10, rel=1e-3)
    assert "golden vector 0 of 8: output 'score' differs by up to 10" in report.message


@pytest.mark.parametrize(("off", "passed"), [(0.009, True), (0.011, False)])
def test_the_tolerance_is_numpys_allclose(tmp_path: Path, off: float, passed: bool) -> None:
    import numpy as np

    golden = goldens.parse(tiny_bundle(tmp_path / "o").read(goldens.FILE_NAME))
    (array,) = golden.outputs
    values = np.frombuffer(array.data, np.float32) + np.float32(off)
    shifted = msgspec.structs.replace(
        golden,
        outputs=(msgspec.structs.replace(array, data=values.tobytes()),),
        absolute=0.01,
        relative=0.0,
    )
    assert run_self_test(altered(tmp_path, golden=goldens.encode(shifted)), ENGINE).passed is passed


def test_exact_means_the_same_bits(tmp_path: Path) -> None:
    exact = golden_of(tmp_path, agreement=Agreement.EXACT, absolute=1.0)
    golden = goldens.parse(exact)
    (array,) = golden.outputs
    report = run_self_test(altered(tmp_path, golden=exact), ENGINE)
    flipped = bytes([array.data[0] ^ 1]) + array.data[1:]
    off = msgspec.structs.replace(golden, outputs=(msgspec.structs.replace(array, data=flipped),))
    (tmp_path / "x").mkdir()
    again = run_self_test(altered(tmp_path / "x", golden=goldens.encode(off)), ENGINE)
    assert not again.passed or not report.passed
    assert "none is allowed" in (again.message if not again.passed else report.message)


def test_a_model_that_answers_nan_does_not_agree(tmp_path: Path) -> None:
    report = run_self_test(tiny_bundle(tmp_path / "b", non_finite_above=0.0), ENGINE)
    assert (report.passed, report.reason, report.worst) == (False, "selftest", float("inf"))


def test_a_model_slower_than_its_budget_fails(tmp_path: Path) -> None:
    report = run_self_test(altered(tmp_path, golden=golden_of(tmp_path, latency_budget=1e-9)), ENGINE)
    assert (report.passed, report.reason) == (False, "too_slow")
    assert "the budget is" in report.message
    assert report.vectors == 8


@pytest.mark.parametrize("golden", [None, goldens.encode(Golden(inputs=(), outputs=()))])
def test_a_bundle_that_cannot_be_tested_fails(tmp_path: Path, golden: bytes | None) -> None:
    report = run_self_test(altered(tmp_path, golden=golden), ENGINE)
    assert (report.passed, report.reason) == (False, "no_golden")


def test_what_is_not_a_model_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot load it"):
        run_self_test(altered(tmp_path, model=b"not onnx"), ENGINE)


def test_vectors_for_another_model_are_an_engine_error(tmp_path: Path) -> None:
    golden = goldens.parse(golden_of(tmp_path))
    other = msgspec.structs.replace(golden.inputs[0], name="unheard_of")
    data = goldens.encode(msgspec.structs.replace(golden, inputs=(other,)))
    with pytest.raises(EngineError):
        run_self_test(altered(tmp_path, golden=data), ENGINE)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x80"])
def test_unreadable_vectors_are_a_bad_member(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadMember):
        run_self_test(altered(tmp_path, golden=data), ENGINE)


def test_vectors_that_do_not_fill_their_shape_are_a_bad_member(tmp_path: Path) -> None:
    golden = goldens.parse(golden_of(tmp_path))
    (array,) = golden.inputs
    short = Array(array.name, array.datatype, array.shape, array.data[:-1])
    data = goldens.encode(msgspec.structs.replace(golden, inputs=(short,)))
    with pytest.raises(BadMember, match="do not fill"):
        run_self_test(altered(tmp_path, golden=data), ENGINE)


def test_an_altered_golden_member_is_noticed(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b")
    path = bundle.path / goldens.FILE_NAME
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BadBundle):
        run_self_test(bundle, ENGINE)
