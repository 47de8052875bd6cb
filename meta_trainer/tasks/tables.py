"""Rows of data: single files, and splits of a Hub data set or of a local folder."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

JSON_SUFFIXES = (".json", ".jsonl")
TABLE_SUFFIXES = (".parquet", *JSON_SUFFIXES, ".csv")


def read_table(path: Path) -> Dataset:
    """Read a parquet file, a CSV file with a header, a JSON list of rows, or JSON rows one a line.

    Read at once into memory: the sets are small, and no cache folder is written. Empty cells of a CSV file and keys
    that a JSON row lacks are None.

    Raises:
        ValueError: If the file cannot be read as what its name says, or has a column twice.
    """
    rows = _json_rows(path) if path.suffix in JSON_SUFFIXES else None
    try:
        if rows is not None:
            columns = dict.fromkeys(name for row in rows for name in row)
            return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
        table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else _csv_table(path)
        names = table.column_names
        if len(set(names)) == len(names):
            return Dataset(table)
    # What the libraries raise for a file of another kind, and for a column of values that go in no column together.
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        # Some of them quote a whole value.
        raise ValueError(f"{path} cannot be read as a table: {str(error)[:300]}") from error
    repeated = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f"{path} should have each column once, got {', '.join(map(repr, repeated))} more than once.")


def _csv_table(path: Path) -> pyarrow.Table:
    # A class may be called NA or null: only empty cells are missing values.
    missing = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
    table = pyarrow.csv.read_csv(
        path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True), convert_options=missing
    )
    if binary := [field.name for field in table.schema if pyarrow.types.is_binary(field.type)]:
        raise ValueError(f"it should be UTF-8 text, which column {binary[0]!r} is not")
    return table


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} should be UTF-8 text: {error}") from error
    whole = text.lstrip().startswith("[")
    chunks = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, chunk in chunks:
        try:
            value = json.loads(chunk, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number + error.lineno - 1}: not JSON: {error.msg}.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: cannot be read: {error}") from error
        rows.extend(value if whole else [value])
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, or one object a line, each a row.")
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the library would take the last of several values of one name."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"an object should have each name once, got {', '.join(names)}")
    return dict(pairs)


def load_split(path: str, subset: str | None, split: str) -> Dataset:
    """Load a split of a Hub data set or of a local folder laid out like one.

    Raises:
        ValueError: If there is no such data set, subset or split.
    """
    if Path(path).is_dir() and subset and (Path(path) / subset).is_dir():
        path, subset = str(Path(path) / subset), None
    try:
        return load_dataset(path, subset, split=split)
    # What the library raises for a wrong name, subset or split, without a connection, and for files it cannot read.
    except (OSError, ValueError, RuntimeError, DatasetsError, yaml.YAMLError) as error:
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(
            f"Data set {path!r}, subset {subset!r}, split {split!r} cannot be loaded from a local folder or "
            f"from the Hub: {reason}"
        ) from error


def first_filled(dataset: Dataset, columns: Sequence[str]) -> str:
    """The first of `columns` in which some row holds a value; where none does, the first of them."""
    found = [column for column in columns if column in dataset.column_names]
    table = dataset.select_columns(found).with_format("arrow")[:]
    filled = (column for column in found if table.column(column).null_count < len(dataset))
    return next(filled, columns[0])


def check_columns(dataset: Dataset, name: str, columns: Iterable[str | None]) -> None:
    """Raise ValueError if the data set that messages call ``name`` lacks a column; None asks for none."""
    for column in columns:
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(dataset.column_names)}.")
