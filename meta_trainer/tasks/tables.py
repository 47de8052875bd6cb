"""Rows of data: single files, and splits of a Hub data set or of a local folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, load_dataset

TABLE_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")


def read_table(path: Path) -> Dataset:
    """Read a parquet file, a CSV file with a header, a JSON list of rows, or JSON rows one a line.

    Read at once into memory: the sets are small, and no cache folder is written.

    Raises:
        ValueError: If the file cannot be read as what its name says.
    """
    try:
        if path.suffix == ".parquet":
            return Dataset(pyarrow.parquet.read_table(path))
        if path.suffix == ".csv":
            options = pyarrow.csv.ParseOptions(newlines_in_values=True)
            return Dataset(pyarrow.csv.read_csv(path, parse_options=options))
        return Dataset.from_list(_json_rows(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    whole = text.lstrip().startswith("[")
    chunks = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, chunk in chunks:
        try:
            value = json.loads(chunk)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number + error.lineno - 1}: not JSON: {error.msg}.") from error
        rows.extend(value if whole else [value])
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, or one object a line, each a row.")
    return rows


def load_split(path: str, subset: str | None, split: str) -> Dataset:
    """Load a split of a Hub data set or of a local folder laid out like one.

    Raises:
        ValueError: If there is no such data set, subset or split.
    """
    if Path(path).is_dir() and subset and (Path(path) / subset).is_dir():
        path, subset = str(Path(path) / subset), None
    try:
        return load_dataset(path, subset, split=split)
    # What the library raises for a wrong name, subset or split, and without a connection.
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Data set {path!r}, subset {subset!r}, split {split!r} cannot be loaded from a local folder or "
            f"from the Hub: {error}"
        ) from error


def check_columns(dataset: Dataset, name: str, columns: Iterable[str | None]) -> None:
    """Raise ValueError if the data set that messages call ``name`` lacks a column; None asks for none."""
    for column in columns:
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(dataset.column_names)}.")
