"""Bad input: one line that says what to do, exit code 1, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from quantize.data import Input, load_rows
from tests.quantize import models
from tests.quantize.models import quantize


@pytest.fixture
def refused(tmp_path, capsys):
    """Quantize, expect exit code 1, one line and an untouched output folder; returns the line."""

    def check(model: Path, data: Path, *options: str) -> str:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")
        assert quantize(model, data, out, "--quiet", *options) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
        assert printed.err.startswith("quantize-model: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return check


def test_a_file_that_is_not_onnx(refused, calibration, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"PK\x03\x04 certainly not" * 50)
    assert "is not a valid ONNX file" in refused(tmp_path / "model.onnx", calibration)


def test_an_empty_file(refused, calibration, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "ONNX" in refused(tmp_path / "model.onnx", calibration)


def test_a_model_that_is_missing(refused, calibration, tmp_path):
    assert "No such file" in refused(tmp_path / "absent.onnx", calibration)


def test_a_model_that_is_already_quantized(refused, autoencoder, calibration, tmp_path, capsys):
    quantize(autoencoder, calibration, tmp_path / "first", "--quiet")
    capsys.readouterr()
    line = refused(tmp_path / "first" / "unit-1.2.3" / "model.onnx", calibration)
    assert "already quantized" in line
    assert "QuantizeLinear" in line


def test_calibration_data_of_the_wrong_width_names_both(refused, autoencoder, tmp_path):
    data = models.write_rows(tmp_path / "narrow.npz", models.rows(50)[:, :11])
    line = refused(autoencoder, data)
    assert "11 columns" in line
    assert "takes 12" in line


def test_arrays_of_other_names_are_listed_with_the_expected_one(refused, autoencoder, tmp_path):
    np.savez(tmp_path / "other.npz", measurements=models.rows(50))
    line = refused(autoencoder, tmp_path / "other.npz")
    assert "measurements" in line
    assert "'x'" in line


def test_a_feature_that_is_always_missing_is_named(refused, autoencoder, tmp_path):
    rows = models.rows(50)
    rows[:, 3] = np.nan
    data = models.write_rows(tmp_path / "nan.npz", rows, feature_names=np.array(models.NAMES))
    assert "sensor_3" in refused(autoencoder, data)


def test_nothing_but_missing_values(refused, autoencoder, tmp_path):
    data = models.write_rows(tmp_path / "nan.npz", np.full((50, models.WIDTH), np.nan))
    assert "every value" in refused(autoencoder, data)


def test_missing_values_without_imputation(refused, autoencoder, tmp_path):
    rows = models.rows(50)
    rows[4, 3] = np.nan
    data = models.write_rows(tmp_path / "nan.npz", rows)
    assert "impute" in refused(autoencoder, data, "--impute", "none")


def test_infinite_values(refused, autoencoder, tmp_path):
    rows = models.rows(50).astype(np.float64)
    rows[4, 3] = 1e300
    assert "row 5" in refused(autoencoder, models.write_rows(tmp_path / "inf.npz", rows))


def test_data_that_is_missing(refused, autoencoder, tmp_path):
    assert "No such file" in refused(autoencoder, tmp_path / "absent.npz")


@pytest.mark.parametrize("name", ["rows.npz", "rows.npy", "rows.csv", "rows.xlsx"])
def test_data_that_is_something_else(refused, autoencoder, tmp_path, name):
    (tmp_path / name).write_bytes(os.urandom(100))
    assert name in refused(autoencoder, tmp_path / name)


def test_pickled_objects_are_never_loaded(refused, autoencoder, tmp_path):
    np.savez(tmp_path / "pickle.npz", X=np.array([{"a": 1}] * 20, dtype=object))
    assert "pickle.npz" in refused(autoencoder, tmp_path / "pickle.npz")


def test_too_few_rows(refused, autoencoder, tmp_path):
    assert "4 rows" in refused(autoencoder, models.write_rows(tmp_path / "few.npz", models.rows(4)))


def test_a_cell_that_is_no_number_is_named(refused, autoencoder, tmp_path):
    line = ",".join(["1"] * 12)
    (tmp_path / "rows.csv").write_text("\n".join([",".join(models.NAMES), line, line.replace("1", "x", 1)]))
    message = refused(autoencoder, tmp_path / "rows.csv")
    assert "row 2" in message
    assert "sensor_0" in message


def table(separator: str = ",", decimal: str = ".") -> str:
    """Forty rows as people save them."""
    lines = [separator.join(f"{value:.5g}".replace(".", decimal) for value in row) for row in models.rows(40)]
    return "\n".join([separator.join(models.NAMES), *lines])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (table(";"), "separated by semicolons, expected commas"),
        (table(";", ","), "separated by semicolons, expected commas"),
        (table("\t"), "separated by tabs, expected commas"),
        (table().partition("\n")[2], "expected a header of feature names"),
        (table().replace("\n", ",\n").replace(",\n", "\n", 1), "row 1 has 13 cells, the header has 12"),
        (table().replace("sensor_1,", "sensor_0,", 1), "'sensor_0' is empty or appears twice"),
        (table().partition("\n")[0], "0 rows, expected at least 10"),
        (table() + "\n1,2,3", "row 41 has 3 cells, the header has 12"),
        ("", "is empty, expected a header and rows"),
    ],
    ids=[
        "semicolons", "decimal commas", "tabs", "no header", "trailing commas", "names", "header only",
        "short", "empty",
    ],
)  # fmt: skip
def test_tables_as_people_save_them(refused, autoencoder, tmp_path, text, said):
    (tmp_path / "rows.csv").write_text(text)
    assert said in refused(autoencoder, tmp_path / "rows.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_text_that_is_not_utf8(refused, autoencoder, tmp_path, encoding):
    (tmp_path / "rows.csv").write_bytes(table().replace("sensor_0", "Küvette").encode(encoding))
    assert "is not UTF-8" in refused(autoencoder, tmp_path / "rows.csv")


def test_columns_that_are_numbered_are_a_header(tmp_path):
    numbered = ",".join(map(str, range(models.WIDTH))) + "\n" + table().partition("\n")[2]
    (tmp_path / "rows.csv").write_text(numbered)
    rows = load_rows(tmp_path / "rows.csv", [Input("x", np.dtype(np.float32), (-1, models.WIDTH))])
    assert rows.features is not None
    assert rows.features[:2] == ("0", "1")


def test_validation_rows_that_are_the_calibration_rows(refused, autoencoder, calibration, tmp_path):
    (tmp_path / "same.npz").write_bytes(calibration.read_bytes())
    line = refused(autoencoder, calibration, "--validation", str(tmp_path / "same.npz"))
    assert "expected rows of its own" in line


@pytest.mark.parametrize("label", [0, 1])
def test_validation_labels_of_one_class(refused, autoencoder, calibration, tmp_path, label):
    held_out = models.write_rows(tmp_path / "held.npz", models.rows(40, 7), y=np.full(40, label))
    line = refused(autoencoder, calibration, "--validation", str(held_out))
    assert "every label is" in line


def test_labels_that_are_not_zero_and_one(refused, autoencoder, calibration, tmp_path):
    held_out = models.write_rows(tmp_path / "held.npz", models.rows(40, 7), y=np.arange(40))
    assert "expected 0 (good) and 1 (bad)" in refused(autoencoder, calibration, "--validation", str(held_out))


def test_a_reconstruction_error_of_a_model_that_reconstructs_nothing(refused, calibration, tmp_path):
    line = refused(models.scorer(tmp_path / "scorer.onnx"), calibration, "--score", "mse")
    assert "risk" in line
    assert "--score none" in line


def test_an_output_folder_that_is_a_file(autoencoder, calibration, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert quantize(autoencoder, calibration, tmp_path / "file" / "out", "--quiet") == 1
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_that_is_a_bundle(autoencoder, calibration, tmp_path, capsys):
    assert quantize(autoencoder, calibration, tmp_path / "out", "--quiet", "--fast") == 0
    bundle = tmp_path / "out" / "unit-1.2.3"
    before = sorted(bundle.iterdir())
    assert quantize(autoencoder, calibration, bundle, "--quiet", "--fast") == 1
    assert "is a bundle" in capsys.readouterr().err
    assert sorted(bundle.iterdir()) == before


def test_an_output_folder_made_for_a_failed_run_is_gone_again(calibration, tmp_path):
    model = models.scorer(tmp_path / "scorer.onnx")
    assert quantize(model, calibration, tmp_path / "a" / "b", "--score", "mse", "--quiet") == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--name", "Not A Name"],
        ["--version", "1.0"],
        ["--threshold", "quantile:2"],
        ["--threshold", "high"],
        ["--scale", "log"],
        ["--target", "arm"],
        ["--max-drop", "-1"],
        ["--max-drop", "nan"],
        ["--min-sqnr", "nan"],
        ["--emulate", "/nonexistent/python"],
        ["--inspect", "--verify", "there"],
        ["--out", os.fsdecode(b"\xff")],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_expected(
    autoencoder, calibration, tmp_path, capsys, options
):
    with pytest.raises(SystemExit) as ended:
        quantize(autoencoder, calibration, tmp_path / "out", *options)
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err
