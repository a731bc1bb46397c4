"""Rows for the model: read in a stream, checked to the last one, and kept as a sample of bounded size.

Invariants of ``Rows``: one array per model input, of the input's dtype, the same number of rows in each, of
the shape the model takes, no infinities, labels 0 or 1. Memory does not depend on the size of the file: one
with more than ``SAMPLE_BYTES`` of rows is represented by rows drawn evenly over its length, always the same
ones. A smaller file is kept whole.

The idea: every kind of file becomes named ``_Array``s that give their rows in blocks; one loop checks the
blocks and keeps what is drawn. Text is parsed once, into an unnamed temporary file.

Rows of different lengths (a folder of ``.npz``) are held as an object array of arrays: ``runtime.batches``
puts rows of one shape together.
"""

from __future__ import annotations

import csv
import itertools
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.lib import format as npy

from edge_agent.contract.digest import Digest
from quantize import runtime
from quantize.errors import BadData

MIN_ROWS: Final = 10  # as many as the drift baseline has bins
# Kept of a file: 32,000 rows of 512 features, or 110 images of 3 x 224 x 224. Ranges, quantiles and medians
# of so many rows do not change any more, and every candidate is judged on them.
SAMPLE_BYTES: Final = 64 << 20
_BLOCK_BYTES: Final = 4 << 20
_CSV_CELLS: Final = 1 << 17  # parsed at a time: text, pieces of it and numbers take some 10 MB
_DRAW_SEED: Final = 11
_LABELS: Final = ("y", "label")
_SHOWN: Final = 8  # names in a message
_SEPARATORS: Final = {";": "semicolons", "\t": "tabs", "|": "bars"}
_UNITLESS: Final = ("", "1", "-", "%")
_EMPTY_CELL: Final = re.compile(r"(^|,)[ \t]*(?=,|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the model. ``shape`` has -1 where a dimension varies; the first is the batch."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def tabular(self) -> bool:
        """A table of float features: (batch, features)."""
        return self.dtype == np.float32 and len(self.shape) == 2 and self.shape[1] > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows for the model: calibration or validation data."""

    source: str  # file name, for messages
    digest: Digest
    inputs: Mapping[str, np.ndarray]  # (n, ...) each; (n,) of objects where lengths differ
    labels: np.ndarray | None  # (n,) bool: True = bad
    features: tuple[str, ...] | None  # names of the columns of a tabular input
    units: tuple[str, ...] | None = None  # of the columns, where the file says them
    named: bool = False  # whether the names come from the file
    in_file: int = 0  # rows of the file, of which these are all or a sample

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, index: np.ndarray) -> Rows:
        """The rows at ``index`` (indices or a mask)."""
        return replace(
            self,
            inputs={name: values[index] for name, values in self.inputs.items()},
            labels=None if self.labels is None else self.labels[index],
        )


def load_data(
    calibration: Path, validation: Path | None, inputs: Sequence[Input]
) -> tuple[Rows, Rows | None]:
    """Read both files: the good rows to calibrate with, and the rows to validate with.

    The columns of a table are put into the order of the calibration file.

    Raises:
        BadData: one of them will not do, or their columns are not the same.
    """
    good = good_rows(load_rows(calibration, inputs))
    if validation is None:
        return good, None
    held_out = load_rows(validation, inputs)
    if held_out.digest == good.digest:
        raise BadData(
            f"--validation {validation} holds the rows of --calibration, expected rows of its own: "
            "leave it out, then a part of the calibration rows judges"
        )
    return good, both_classes(_same_columns(good, held_out))


def load_rows(path: Path, inputs: Sequence[Input], *, sample_bytes: int = SAMPLE_BYTES) -> Rows:
    """Read ``.npz``, ``.npy``, ``.csv`` or a folder of ``.npz``.

    ``.npz``: an array per model input by its name, or ``X`` for a model with one; ``y`` the labels (1 = bad;
    ``label`` where an input is called ``y``), ``feature_names`` and ``units`` if there. ``.csv``: a header of
    feature names, then perhaps a row of units; a column ``y`` or ``label`` is the labels; an empty cell is a
    missing value. A folder: its ``.npz`` files in the order of their names, whose rows may have different
    lengths where the model allows it.

    Args:
        path: the file or folder.
        inputs: what the model takes.
        sample_bytes: of a larger file so much is kept: rows drawn evenly over its length.

    Raises:
        BadData: missing, unreadable, of another width than the model takes, infinite, too few, labels
            that are not 0 and 1.
    """
    try:
        digest, arrays = _open(path)
        chosen = {entry.name: _match(path, arrays, entry, inputs) for entry in inputs}
        lengths = {name: array.rows for name, array in chosen.items()}
        if len(set(lengths.values())) > 1:
            raise BadData(f"data {path}: the arrays have different numbers of rows: {lengths}")
        count = next(iter(lengths.values()))
        if count < MIN_ROWS:
            raise BadData(f"data {path}: {count} rows, expected at least {MIN_ROWS}")
        kept = {entry.name: entry.dtype.itemsize for entry in inputs}
        size = sum(array.bytes // array.dtype.itemsize * kept[name] for name, array in chosen.items())
        drawn = _draw(count, size, sample_bytes)
        values = {entry.name: _collect(path, chosen[entry.name], entry, drawn) for entry in inputs}
        # An input may have the labels' name; its array is not labels then.
        known = any(array is arrays.get(_LABELS[0]) for array in chosen.values())
        labels = _labels(path, arrays.get(_LABELS[1 if known else 0]), count, drawn)
        features, units, named = None, None, False
        if len(inputs) == 1 and inputs[0].tabular:
            width = inputs[0].shape[1]
            named = "feature_names" in arrays
            features = _feature_names(path, arrays.get("feature_names"), width)
            units = _units(path, arrays.get("units"), width)
    except OSError as error:
        raise BadData(f"data {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadData(f"data {path} is not UTF-8 (byte {error.start + 1}): save it as UTF-8") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, csv.Error) as error:
        raise BadData(f"data {path} cannot be read: {runtime.one_line(error)}") from error
    return Rows(
        source=path.name,
        digest=digest,
        inputs=values,
        labels=labels,
        features=features,
        units=units,
        named=named,
        in_file=count,
    )


# -- files as arrays --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of a file. ``shape`` is that of one row, with -1 where rows differ."""

    name: str
    rows: int
    shape: tuple[int, ...]
    dtype: np.dtype
    bytes: int  # of all rows
    blocks: Callable[[], Iterator[np.ndarray]]

    def whole(self) -> np.ndarray:
        """All rows, for what is small: names and units."""
        pieces = list(self.blocks())
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape), self.dtype)


def _open(path: Path) -> tuple[Digest, dict[str, _Array]]:
    if path.is_dir():
        return _open_folder(path)
    digest = Digest.of_file(path)
    if path.suffix == ".csv":
        return digest, _open_csv(path)
    if path.suffix == ".npz":
        return digest, _open_npz(path)
    if path.suffix == ".npy":
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        return digest, {"X": _in_memory("X", loaded)}
    raise BadData(f"data {path}: unknown kind {path.suffix!r}, expected .npz, .npy, .csv or a folder of .npz")


def _in_memory(name: str, values: np.ndarray) -> _Array:
    """An array, or a memory map of one."""
    if values.ndim == 0:
        raise BadData(f"array {name!r} is a single number, expected rows")
    per_block = max(1, _BLOCK_BYTES // max(1, values[:1].nbytes))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(values), per_block):
            yield np.asarray(values[start : start + per_block])

    return _Array(name, len(values), values.shape[1:], values.dtype, values.nbytes, blocks)


def _open_npz(path: Path) -> dict[str, _Array]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as file:
                shape, fortran, dtype = _npy_header(file)
            if shape == ():
                continue  # a number beside the arrays: ignored like any other array that nobody asks for
            if fortran and len(shape) > 1 and not dtype.hasobject:
                with np.load(path, allow_pickle=False) as loaded:  # column by column: no rows to stream
                    arrays[name] = _in_memory(name, loaded[name])
                continue
            row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            arrays[name] = _Array(
                name, shape[0], shape[1:], dtype, shape[0] * row, _member_blocks(path, member, shape, dtype)
            )
    return arrays


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _member_blocks(
    path: Path, member: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], Iterator[np.ndarray]]:
    def blocks() -> Iterator[np.ndarray]:
        if dtype.hasobject:
            raise BadData(f"data {path}: array {member.removesuffix('.npy')!r} holds Python objects (pickle)")
        row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        per_block = max(1, _BLOCK_BYTES // max(1, row))
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _npy_header(file)
            for start in range(0, shape[0], per_block):
                count = min(per_block, shape[0] - start)
                data = file.read(count * row)
                if len(data) < count * row:
                    raise EOFError(f"array {member!r} ends after {start} of {shape[0]} rows")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    return blocks


def _open_folder(path: Path) -> tuple[Digest, dict[str, _Array]]:
    files = sorted(path.glob("*.npz"))
    if not files:
        raise BadData(f"data {path}: a folder without .npz files")
    lines = [f"{file.name} {Digest.of_file(file)}" for file in files]
    opened = [_open_npz(file) for file in files]
    names = set.intersection(*(set(arrays) for arrays in opened))
    together = {}
    for name in sorted(names):
        parts = [arrays[name] for arrays in opened]
        shapes = {part.shape for part in parts}
        if len({len(shape) for shape in shapes}) > 1:
            raise BadData(f"data {path}: array {name!r} has different numbers of dimensions in its files")
        shape = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))
        if name in ("feature_names", "units"):
            together[name] = parts[0]
            continue
        together[name] = _Array(
            name,
            sum(part.rows for part in parts),
            shape,
            np.result_type(*(part.dtype for part in parts)),
            sum(part.bytes for part in parts),
            lambda parts=parts: itertools.chain.from_iterable(part.blocks() for part in parts),  # type: ignore[misc]
        )
    return Digest.of_bytes("\n".join(lines).encode()), together


def _open_csv(path: Path) -> dict[str, _Array]:
    """Parse the text once, into an unnamed temporary file of float64, which is then read in blocks."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines: Iterator[str] = (line for line in file if line.strip())
        first = next(lines, None)
        if first is None:
            raise BadData(f"data {path} is empty, expected a header and rows")
        header = [name.strip() for name in next(csv.reader([first]))]
        _check_header(path, header)
        units = None
        second = next(lines, None)
        if second is not None:
            cells = [cell.strip() for cell in next(csv.reader([second]))]
            if _are_units(cells):
                units = cells
            else:
                lines = itertools.chain([second], lines)
        table = _spill(path, lines, header)
    labels = next((header.index(name) for name in _LABELS if name in header), None)
    columns = [index for index in range(len(header)) if index != labels]
    arrays = {"X": _columns("X", table, columns)}
    arrays["feature_names"] = _in_memory("feature_names", np.array([header[index] for index in columns]))
    if units is not None:
        padded = [*units, *[""] * len(header)]
        arrays["units"] = _in_memory("units", np.array([padded[index] for index in columns]))
    # A model with an input per feature finds its columns by their names.
    for index in columns:
        arrays.setdefault(header[index], _columns(header[index], table, [index]))
    if labels is not None:
        arrays["y"] = _columns("y", table, [labels])
    return arrays


def _check_header(path: Path, header: list[str]) -> None:
    """Refuse what reads as a header but is none: other separators, and the first row of numbers."""
    if len(header) == 1:
        found = next((name for mark, name in _SEPARATORS.items() if mark in header[0]), None)
        if found:
            raise BadData(
                f"data {path}: its columns are separated by {found}, expected commas (and points in numbers)"
            )
    counted = ([str(first + place) for place in range(len(header))] for first in (0, 1))
    if all(_is_number(name) for name in header) and header not in counted:
        raise BadData(
            f"data {path} begins with a row of numbers, expected a header of feature names: add one"
        )


def _spill(path: Path, lines: Iterator[str], header: list[str]) -> np.ndarray:
    """Lines of numbers as a memory map of (lines, columns): on disk, not in memory, and without a name."""
    count = 0
    with tempfile.TemporaryFile() as store:
        while piece := list(itertools.islice(lines, max(1, _CSV_CELLS // len(header)))):
            table = _parse(path, piece, header, count)
            store.write(table.tobytes())
            count += len(table)
        store.flush()
        if not count:
            return np.empty((0, len(header)))
        return np.memmap(store, np.float64, "r", shape=(count, len(header)))


def _are_units(cells: list[str]) -> bool:
    """A row of units has words, and no numbers but a 1 for what has no unit."""
    return any(not _is_number(cell) and cell not in _UNITLESS for cell in cells) and all(
        cell in _UNITLESS or not _is_number(cell) for cell in cells
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _columns(name: str, table: np.ndarray, columns: list[int]) -> _Array:
    per_block = max(1, _BLOCK_BYTES // max(1, table.shape[1] * 8))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(table), per_block):
            yield np.asarray(table[start : start + per_block])[:, columns]

    return _Array(name, len(table), (len(columns),), table.dtype, len(table) * len(columns) * 8, blocks)


def _parse(path: Path, lines: list[str], header: list[str], before: int) -> np.ndarray:
    """Lines of numbers -> (lines, columns). numpy's parser, and cell by cell where it finds fault."""
    text = _EMPTY_CELL.sub(r"\1nan", "".join(lines).replace("\r\n", "\n").rstrip("\n"))
    try:
        table = np.loadtxt(text.split("\n"), np.float64, delimiter=",", comments=None, quotechar='"', ndmin=2)
        if table.shape == (len(lines), len(header)):
            return table
    except ValueError:
        pass  # the loop below says which cell
    table = np.empty((len(lines), len(header)))
    for row, line in enumerate(csv.reader(lines)):
        place = before + row + 1
        if len(line) != len(header):
            raise BadData(f"data {path}: row {place} has {len(line)} cells, the header has {len(header)}")
        for column, cell in enumerate(line):
            try:
                table[row, column] = float(cell) if cell.strip() else np.nan
            except ValueError as error:
                raise BadData(
                    f"data {path}: row {place}, column {header[column]!r}: {cell[:40]!r} is not a number "
                    "(an empty cell is a missing value)"
                ) from error
    return table


# -- from arrays to rows ----------------------------------------------------------------------------------


def _match(path: Path, arrays: Mapping[str, _Array], entry: Input, inputs: Sequence[Input]) -> _Array:
    """The array for one input, of a shape that it takes."""
    single = len(inputs) == 1
    # The name of the input first; but a table with a column of that name is still a table.
    named = arrays.get(entry.name)
    if named is not None and single and "X" in arrays and not _fits(named.shape, entry):
        named = None
    array = named if named is not None else arrays.get("X") if single else None
    if array is None:
        columns = arrays.get("feature_names")
        listed = [str(name) for name in columns.whole()] if columns is not None else sorted(arrays)
        wanted = f"{entry.name!r} or 'X'" if single else ", ".join(repr(each.name) for each in inputs)
        raise BadData(f"data {path} has {_list(listed)}, the model's inputs are {wanted}: an array for each")
    if array.dtype.hasobject:
        raise BadData(f"data {path}: array {array.name!r} holds Python objects (pickle), expected numbers")
    if array.dtype.kind not in "fiub":
        raise BadData(f"data {path}: array {array.name!r} is {array.dtype}, expected numbers")
    if _fits(array.shape, entry):
        return array
    shape = entry.shape[1:]
    if len(shape) == 1 and len(array.shape) == 1:
        columns = arrays.get("feature_names") if array.name == "X" else None
        names = f" ({_list([str(name) for name in columns.whole()])})" if columns is not None else ""
        raise BadData(
            f"data {path}: array {array.name!r} has {array.shape[0]} columns{names}, "
            f"the model's input {entry.name!r} takes {shape[0]}"
        )
    got = ", ".join("various" if size < 0 else str(size) for size in (array.rows, *array.shape))
    raise BadData(
        f"data {path}: array {array.name!r} has shape [{got}], the model's input "
        f"{entry.name!r} takes [{', '.join(['rows', *('any' if size < 0 else str(size) for size in shape)])}]"
    )


def _fits(shape: tuple[int, ...], entry: Input) -> bool:
    wanted = entry.shape[1:]
    if len(shape) + 1 == len(wanted) and wanted[-1] == 1 and entry.dtype.kind != "b":
        shape = (*shape, 1)
    if len(shape) == 1 and not wanted:
        return shape == (1,)
    return len(shape) == len(wanted) and all(
        size in (-1, got) for size, got in zip(wanted, shape, strict=True)
    )


def _draw(count: int, size: int, sample_bytes: int) -> np.ndarray | None:
    """Which rows of ``count`` are kept: one of each of so many equal stretches as fit. None: all."""
    keep = max(MIN_ROWS, int(sample_bytes * count / max(1, size)))
    if keep >= count:
        return None
    place = np.random.default_rng(_DRAW_SEED).random(keep)
    return np.minimum(((np.arange(keep) + place) * count / keep).astype(np.int64), count - 1)


def _collect(path: Path, array: _Array, entry: Input, drawn: np.ndarray | None) -> np.ndarray:
    """Check every row, keep the drawn ones."""
    kept: list[np.ndarray] = []
    start = 0
    for block in array.blocks():
        cast = _cast(path, array.name, block, entry, start)
        if drawn is not None:
            first, last = np.searchsorted(drawn, (start, start + len(block)))
            cast = cast[drawn[first:last] - start]
        kept.append(cast)
        start += len(block)
    if len({piece.shape[1:] for piece in kept if len(piece)}) <= 1:
        return np.ascontiguousarray(np.concatenate([piece for piece in kept if len(piece)]))
    together = np.empty(sum(len(piece) for piece in kept), object)
    for index, row in enumerate(itertools.chain.from_iterable(kept)):
        together[index] = row
    return together


def _cast(path: Path, name: str, block: np.ndarray, entry: Input, start: int) -> np.ndarray:
    """A block in the input's dtype and shape; what that would change is refused."""
    if len(entry.shape) != block.ndim:
        block = block.reshape(len(block), *block.shape[1:], 1) if len(entry.shape) > 1 else block.reshape(-1)
    with np.errstate(all="ignore"):
        cast = np.ascontiguousarray(block, entry.dtype)
        changed = None
        if cast.dtype.kind == "f":
            changed = np.isinf(cast)
        elif block.dtype != cast.dtype:
            changed = cast.astype(np.float64) != block.astype(np.float64)
    if changed is not None and changed.any():
        where = np.argwhere(changed)[0]
        if cast.dtype.kind == "f":
            raise BadData(
                f"data {path}: array {name!r} is infinite (in float32) in row {start + int(where[0]) + 1}: "
                "remove the row"
            )
        raise BadData(
            f"data {path}: array {name!r} holds {block[tuple(where)]} in row {start + int(where[0]) + 1}, "
            f"the model's input {entry.name!r} takes {entry.dtype}"
        )
    return cast


def _labels(path: Path, array: _Array | None, rows: int, drawn: np.ndarray | None) -> np.ndarray | None:
    if array is None:
        return None
    if array.rows != rows or array.shape not in ((), (1,)) or array.dtype.kind not in "fiub":
        shape = [array.rows, *array.shape]
        raise BadData(
            f"data {path}: {array.name} has shape {shape} for {rows} rows, expected one label a row"
        )
    flat = array.whole().ravel()
    if not np.isin(flat, (0, 1)).all():
        held = np.unique(flat)[:5].tolist()
        raise BadData(f"data {path}: {array.name} holds {held}, expected 0 (good) and 1 (bad)")
    labels: np.ndarray = flat.astype(bool)
    return labels if drawn is None else labels[drawn]


def _feature_names(path: Path, array: _Array | None, width: int) -> tuple[str, ...]:
    if array is None:
        return tuple(f"f{index}" for index in range(width))
    found = tuple(str(name) for name in array.whole().ravel())
    if len(found) != width:
        raise BadData(f"data {path}: {len(found)} feature_names for {width} columns")
    if len(set(found)) != width or not all(found):
        twice = next((name for name in found if not name or found.count(name) > 1), "")
        raise BadData(f"data {path}: feature name {twice!r} is empty or appears twice")
    return found


def _units(path: Path, array: _Array | None, width: int) -> tuple[str, ...] | None:
    if array is None:
        return None
    found = tuple(str(unit) for unit in array.whole().ravel())
    if len(found) != width:
        raise BadData(f"data {path}: {len(found)} units for {width} columns")
    return found


def _same_columns(calibration: Rows, validation: Rows) -> Rows:
    """``validation`` with its columns as in ``calibration``; names that only one of them has are refused."""
    if not (calibration.named and validation.named):
        return replace(validation, features=calibration.features)
    assert calibration.features is not None
    assert validation.features is not None
    wanted, got = calibration.features, validation.features
    if set(wanted) != set(got):
        missing = [name for name in wanted if name not in set(got)]
        unknown = [name for name in got if name not in set(wanted)]
        raise BadData(
            f"data {validation.source} has other columns than {calibration.source}: "
            f"it lacks {_list(missing)} and has {_list(unknown)} instead"
        )
    if wanted == got:
        return validation
    place = {name: index for index, name in enumerate(got)}
    order = [place[name] for name in wanted]
    name, values = next(iter(validation.inputs.items()))
    return replace(
        validation, inputs={name: np.ascontiguousarray(values[:, order])}, features=wanted, units=None
    )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") if names else "none"


def good_rows(rows: Rows) -> Rows:
    """The rows to calibrate with: those not labelled bad, without labels.

    Raises:
        BadData: too few good rows, nothing but NaN, or a feature that is always missing (named).
    """
    if rows.labels is not None:
        rows = replace(rows.take(~rows.labels), labels=None)
        if len(rows) < MIN_ROWS:
            raise BadData(f"data {rows.source}: {len(rows)} good rows, expected at least {MIN_ROWS}")
    for name, values in rows.inputs.items():
        if values.dtype.kind != "f":
            continue
        missing = np.isnan(values)
        if missing.all():
            raise BadData(f"data {rows.source}: every value of {name!r} is missing (NaN)")
        if rows.features is not None and missing.all(axis=0).any():
            always = [
                feature for feature, gone in zip(rows.features, missing.all(axis=0), strict=True) if gone
            ]
            raise BadData(
                f"data {rows.source}: always missing (NaN): {_list(always)}: remove it from model and data"
            )
    return rows


def both_classes(rows: Rows) -> Rows:
    """Rows whose labels, where there are any, hold good and bad rows.

    Raises:
        BadData: labels of one class.
    """
    if rows.labels is None or (rows.labels.any() and not rows.labels.all()):
        return rows
    only = "bad (1)" if rows.labels.all() else "good (0)"
    raise BadData(f"data {rows.source}: every label is {only}: an AUC needs both, or leave y out")
