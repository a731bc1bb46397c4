"""Data as people have it: files, columns, labels, lengths, and memory that does not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_agent.contract import bundle
from quantize import runtime
from quantize.data import Input, load_data, load_rows
from quantize.errors import BadData
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize

TABLE = (Input("x", np.dtype(np.float32), (-1, models.WIDTH)),)


def csv(path: Path, rows: np.ndarray, header=models.NAMES, units=None) -> Path:
    lines = [",".join(header)]
    if units:
        lines.append(",".join(units))
    lines += [",".join("" if np.isnan(cell) else repr(float(cell)) for cell in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


# -- kinds of files ---------------------------------------------------------------------------------------


def test_units_of_a_csv_reach_the_manifest(tmp_path, autoencoder):
    units = ["mm", "°C", "kPa", "1", "", "%", "m/s", "V", "A", "Hz", "rpm", "s"]
    path = csv(tmp_path / "rows.csv", models.rows(60), units=units)
    assert quantize(autoencoder, path, tmp_path / "out", "--scale", "standard") == 0
    spec = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3").manifest.inputs[0]
    assert spec.features == models.NAMES
    assert spec.units == tuple(units)
    assert len(load_rows(path, TABLE)) == 60


def test_a_row_of_numbers_is_not_a_row_of_units(tmp_path):
    rows = load_rows(csv(tmp_path / "rows.csv", models.rows(20)), TABLE)
    assert len(rows) == 20
    assert rows.units is None


def test_empty_cells_quotes_spaces_and_windows_line_ends(tmp_path):
    values = models.rows(20).astype(np.float64)
    lines = [",".join(f'"{name}"' for name in models.NAMES)]
    lines += [", ".join(repr(float(cell)) for cell in row) for row in values]
    cells = lines[3].split(", ")
    cells[0], cells[4], cells[-1] = "", " ", ""
    lines[3] = ",".join(cells)
    path = tmp_path / "rows.csv"
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    rows = load_rows(path, TABLE)
    assert rows.features == models.NAMES
    assert np.flatnonzero(np.isnan(rows.inputs["x"]).any(axis=0)).tolist() == [0, 4, 11]
    kept = ~np.isnan(rows.inputs["x"])
    assert np.array_equal(rows.inputs["x"][kept], values.astype(np.float32)[kept])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_found_by_name_and_others_ignored(tmp_path, save):
    x = models.rows(30)
    save(tmp_path / "data.npz", x=x, X=x[:5], other=np.arange(3), version=np.array(7), y=np.zeros(30))
    rows = load_rows(tmp_path / "data.npz", TABLE)
    assert np.array_equal(rows.inputs["x"], x)
    assert not rows.labels.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16, np.uint8, ">f4"])
def test_numbers_of_any_type_and_order_are_read(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 100, (30, models.WIDTH)).astype(dtype)
    np.save(tmp_path / "rows.npy", np.asfortranarray(values))
    np.savez(tmp_path / "rows.npz", X=np.asfortranarray(values))
    for name in ("rows.npy", "rows.npz"):
        rows = load_rows(tmp_path / name, TABLE)
        assert rows.inputs["x"].dtype == np.float32
        assert np.array_equal(rows.inputs["x"], values.astype(np.float32))


def test_a_folder_of_npz_is_one_file_in_the_order_of_names(tmp_path):
    x = models.rows(30)
    folder = tmp_path / "days"
    folder.mkdir()
    for index, name in enumerate(("b", "a", "c")):
        np.savez(folder / f"{name}.npz", X=x[index * 10 : index * 10 + 10], y=np.full(10, index % 2))
    rows = load_rows(folder, TABLE)
    assert np.array_equal(rows.inputs["x"], np.concatenate([x[10:20], x[:10], x[20:]]))
    assert rows.labels.sum() == 10
    before = rows.digest
    np.savez(folder / "c.npz", X=x[:10], y=np.zeros(10))
    assert load_rows(folder, TABLE).digest != before


def test_a_column_per_input_of_a_model_that_has_one_each(tmp_path):
    inputs = (Input("a", np.dtype(np.float32), (-1, 1)), Input("b", np.dtype(np.int64), (-1,)))
    (tmp_path / "rows.csv").write_text("b,c,a\n" + "\n".join(f"{i},9,{i / 2}" for i in range(12)))
    rows = load_rows(tmp_path / "rows.csv", inputs)
    assert rows.inputs["a"].shape == (12, 1)
    assert rows.inputs["a"][3, 0] == 1.5
    assert rows.inputs["b"].tolist() == list(range(12))


def test_sequences_of_different_lengths_make_a_bundle(tmp_path):
    """One .npz a recording; the model takes any length, and ORT's own calibrators crash on that."""
    random = np.random.default_rng(1)
    weights = {
        "K0": (random.standard_normal((16, 4, 5)) * 0.3).astype(np.float32),
        "K1": (random.standard_normal((32, 16, 5)) * 0.1).astype(np.float32),
        **models.dense([32, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "K0"], ["c0"]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "K1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["frames"]),
        helper.make_node("ReduceMean", ["frames"], ["m"], axes=[2], keepdims=0),
        helper.make_node("Gemm", ["m", "W0", "b0"], ["classes"]),
    ]
    path = models.save(
        tmp_path / "audio.onnx", nodes, weights, [("x", TensorProto.FLOAT, ["N", 4, "T"])],
        [("classes", ["N", 3]), ("frames", ["N", 32, "T2"])],
    )  # fmt: skip
    folder = tmp_path / "recordings"
    folder.mkdir()
    for index in range(24):
        length = int(random.integers(20, 60))
        np.savez(folder / f"{index:02}.npz", x=random.standard_normal((1, 4, length)).astype(np.float32))
    inputs = (Input("x", np.dtype(np.float32), (-1, 4, -1)),)
    rows = load_rows(folder, inputs)
    assert len(rows) == 24
    assert rows.inputs["x"].dtype == object
    assert sum(len(feeds["x"]) for feeds in runtime.batches(rows.inputs)) == 24
    session = runtime.open_session(path)
    together = runtime.run_all(session, rows.inputs)
    assert together["classes"].shape == (24, 3)
    alone = session.run(["classes"], {"x": rows.inputs["x"][7][None]})[0]
    assert np.allclose(together["classes"][7], alone[0], atol=1e-6)
    assert quantize(path, folder, tmp_path / "out") == 0
    made = bundle.open_bundle(tmp_path / "out" / "unit-1.2.3")
    assert [(t.name, t.shape) for t in made.manifest.inputs] == [("x", (-1, 4, -1))]
    assert {t.name: t.shape for t in made.manifest.outputs}["frames"] == (-1, 32, -1)


# -- what does not fit ------------------------------------------------------------------------------------


def test_columns_in_another_order_are_put_in_order_by_their_names(tmp_path):
    x = models.rows(30)
    order = np.random.default_rng(0).permutation(models.WIDTH)
    first = csv(tmp_path / "a.csv", x)
    second = csv(tmp_path / "b.csv", x[:, order], header=[models.NAMES[i] for i in order])
    calibration, validation = load_data(first, second, TABLE)
    assert np.array_equal(calibration.inputs["x"], validation.inputs["x"])
    assert validation.features == models.NAMES


def test_columns_that_only_one_file_has_are_both_listed(tmp_path):
    first = csv(tmp_path / "a.csv", models.rows(30))
    second = csv(tmp_path / "b.csv", models.rows(30), header=[*models.NAMES[:-2], "humidity", "noise"])
    with pytest.raises(BadData) as error:
        load_data(first, second, TABLE)
    message = str(error.value)
    assert "lacks sensor_10, sensor_11" in message
    assert "has humidity, noise instead" in message


def test_too_many_columns_names_those_of_the_file_and_what_the_model_takes(tmp_path):
    rows = np.concatenate([models.rows(30), models.rows(30)[:, :1]], axis=1)
    with pytest.raises(BadData) as error:
        load_rows(csv(tmp_path / "wide.csv", rows, header=[*models.NAMES, "time"]), TABLE)
    assert "13 columns (sensor_0, " in str(error.value)
    assert "takes 12" in str(error.value)


def test_inputs_that_the_file_lacks_are_listed_with_what_it_has(tmp_path):
    inputs = (Input("signal", np.dtype(np.float32), (-1, 4)), Input("mask", np.dtype(np.float32), (-1, 4)))
    np.savez(tmp_path / "data.npz", signal=np.zeros((20, 4)), maks=np.zeros((20, 4)))
    with pytest.raises(BadData) as error:
        load_rows(tmp_path / "data.npz", inputs)
    assert "has maks, signal" in str(error.value)
    assert "'signal', 'mask'" in str(error.value)


@pytest.mark.parametrize("value", [0.5, np.nan, -1.0, 300.0])
def test_numbers_that_an_integer_input_cannot_hold_are_refused(tmp_path, value):
    inputs = (Input("bytes", np.dtype(np.uint8), (-1, 3)),)
    values = np.ones((20, 3))
    values[4, 1] = value
    np.savez(tmp_path / "data.npz", bytes=values)
    with pytest.raises(BadData, match="row 5, the model's input 'bytes' takes uint8"):
        load_rows(tmp_path / "data.npz", inputs)


def test_a_file_that_ends_in_the_middle_of_an_array(tmp_path):
    np.savez(tmp_path / "whole.npz", X=models.rows(100))
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        content = archive.read("X.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("X.npy", content[:-50])
    with pytest.raises(BadData, match="cannot be read"):
        load_rows(tmp_path / "cut.npz", TABLE)


def test_an_empty_folder(tmp_path):
    with pytest.raises(BadData, match=r"without \.npz files"):
        load_rows(tmp_path, TABLE)


def test_a_constant_feature_is_no_obstacle(tmp_path, autoencoder):
    rows = models.rows(100)
    rows[:, 5] = 7.25
    path = models.write_rows(tmp_path / "constant.npz", rows)
    for index, scale in enumerate(("standard", "minmax", "robust")):
        out = tmp_path / str(index)
        assert quantize(autoencoder, path, out, "--scale", scale) == 0
        made = bundle.open_bundle(out / "unit-1.2.3")
        session = onnxruntime.InferenceSession(made.member("model.onnx"), providers=["CPUExecutionProvider"])
        assert np.isfinite(session.run(None, {"x": rows})[0]).all()


# -- memory -----------------------------------------------------------------------------------------------


def test_a_large_file_is_represented_by_rows_drawn_over_all_of_it(tmp_path):
    sample = 200 * models.WIDTH * 4
    x = np.tile(np.arange(5000, dtype=np.float32)[:, None], (1, models.WIDTH))
    np.savez_compressed(tmp_path / "many.npz", X=x, y=np.arange(5000) % 2)
    rows = load_rows(tmp_path / "many.npz", TABLE, sample_bytes=sample)
    assert rows.in_file == 5000
    assert len(rows) == 200
    drawn = rows.inputs["x"][:, 0]
    assert (np.diff(drawn) > 0).all()
    assert np.diff(drawn).max() <= 50
    assert np.array_equal(rows.labels, drawn.astype(int) % 2 == 1)
    again = load_rows(tmp_path / "many.npz", TABLE, sample_bytes=sample)
    assert np.array_equal(rows.inputs["x"], again.inputs["x"])


def test_a_bad_row_is_found_even_where_it_is_not_drawn(tmp_path):
    x = np.zeros((5000, models.WIDTH), np.float32)
    x[4321, 2] = np.inf
    np.savez(tmp_path / "many.npz", X=x)
    with pytest.raises(BadData, match="row 4322"):
        load_rows(tmp_path / "many.npz", TABLE, sample_bytes=20 * models.WIDTH * 4)


@pytest.mark.parametrize("kind", ["npy", "npz", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """Rows of 512 features, many times more than are kept, are read in little more than what is kept."""
    width, count, sample = 512, 60_000 if kind != "csv" else 6000, 2 << 20
    path = tmp_path / f"large.{kind}"
    block = np.random.default_rng(0).standard_normal((2000, width)).astype(np.float32)
    if kind == "csv":
        lines = [",".join(f"{cell:.6g}" for cell in row) for row in block[:500]]
        with path.open("w") as file:
            file.write(",".join(f"f{index}" for index in range(width)) + "\n")
            for _ in range(count // 500):
                file.write("\n".join(lines) + "\n")
    else:
        array = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float32, (count, width))
        for start in range(0, count, 2000):
            array[start : start + 2000] = block
        array.flush()
        del array
        if kind == "npz":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(tmp_path / "large.npy", "X.npy")
    program = (
        "import json, sys, threading\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from quantize import data\n"
        "def private():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1]) * 1024\n"
        "over, peaks = threading.Event(), [private()]\n"
        "def watch():\n"
        "    while not over.wait(0.002):\n"
        "        peaks.append(private())\n"
        "watcher = threading.Thread(target=watch)\n"
        "watcher.start()\n"
        f"inputs = (data.Input('x', np.dtype(np.float32), (-1, {width})),)\n"
        f"rows = data.load_rows(Path(sys.argv[1]), inputs, sample_bytes={sample})\n"
        "over.set()\n"
        "watcher.join()\n"
        "print(json.dumps([len(rows), rows.in_file, max(peaks) - peaks[0]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    kept, in_file, grown = json.loads(done.stdout)
    assert in_file == count
    assert kept == sample // (4 * width)
    assert grown < 32 << 20  # the sample, a few blocks of 4 MiB and what the interpreter takes for itself
    assert grown < count * width * 4 / 3 or kind == "csv"


def test_batches_that_run_side_by_side_come_back_in_order(tmp_path):
    session = runtime.open_session(models.autoencoder(tmp_path / "ae.onnx"))
    rows = {"x": models.rows(203)}
    one_by_one = [runtime.run(session, feeds)["y"] for feeds in runtime.batches(rows, 7)]
    found = [outputs["y"] for outputs in runtime.stream(session, rows, 7)]
    assert [len(piece) for piece in found] == [len(piece) for piece in one_by_one]
    assert np.concatenate(found).tobytes() == np.concatenate(one_by_one).tobytes()
