"""Labels from the columns of a data set, and the classes that they name."""

from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from datasets import ClassLabel, Dataset

from meta_trainer.tasks.tables import check_columns


@dataclass(frozen=True)
class Labels:
    """The labels of one file or split, by name.

    Attributes:
        name: The file, or the data set and its split.
        labels: Trusted label of each row that is used.
        noisy_labels: Label to train on of each of them; the trusted one where the data have no other.
        rows: Their numbers, from 0.
        classes: Names of the label column's classes, in their order; empty for a column that names none.
    """

    name: str
    labels: list[str]
    noisy_labels: list[str]
    rows: list[int]
    classes: tuple[str, ...]


def used_rows(dataset: Dataset, name: str, columns: Iterable[str | None], exclude_column: str | None) -> list[int]:
    """Numbers of the rows that are not left out.

    Args:
        dataset: A table.
        name: What error messages call it.
        columns: Columns that it should have; None asks for none.
        exclude_column: Boolean column; rows where it is true are left out.

    Raises:
        ValueError: If a column is missing, `exclude_column` holds anything but booleans, or no row is left.
    """
    check_columns(dataset, name, (*columns, exclude_column))
    rows = not_excluded(dataset, name, exclude_column)
    if not rows:
        raise ValueError(f"{name} holds no row to use.")
    return rows


def not_excluded(dataset: Dataset, name: str, exclude_column: str | None) -> list[int]:
    """Numbers of the rows that a boolean column does not leave out; None leaves out none.

    Raises:
        ValueError: If the column holds anything but booleans.
    """
    excluded = dataset[exclude_column][:] if exclude_column else [False] * len(dataset)
    if other := [value for value in excluded if value not in (True, False)]:
        raise ValueError(f"{name}: exclude_column={exclude_column!r} should hold booleans, got {short(other[0])}.")
    return [i for i, left_out in enumerate(excluded) if not left_out]


def read_labels(
    dataset: Dataset, name: str, rows: list[int], label_column: str, noisy_label_column: str | None = None
) -> Labels:
    """Read labels; an integer becomes the name of its class, or its digits where classes have no name.

    Args:
        dataset: Rows with a label.
        name: What error messages call the data set.
        rows: From :func:`used_rows`.
        label_column: Column of the trusted labels.
        noisy_label_column: Column of the labels to train on; None: the trusted ones. Its integers are classes of
            ``label_column`` where it does not name its own.

    Raises:
        ValueError: If a row has no label; it names the row.
    """
    classes = _class_names(dataset, label_column)
    labels = _names(dataset, name, label_column, rows, classes, "label")
    noisy = labels
    if noisy_label_column is not None:
        own = _class_names(dataset, noisy_label_column) or classes
        noisy = _names(dataset, name, noisy_label_column, rows, own, "label")
    return Labels(name, labels, noisy, rows, tuple(classes))


def read_names(dataset: Dataset, name: str, rows: list[int], column: str) -> list[str]:
    """Read what a column calls each row; integers as in :func:`read_labels`.

    Args:
        dataset: A table.
        name: What error messages call it.
        rows: From :func:`used_rows`.
        column: Column of names.

    Raises:
        ValueError: If a row has none; it names the row.
    """
    return _names(dataset, name, column, rows, _class_names(dataset, column), "name")


def class_names(sets: Iterable[Labels]) -> list[str]:
    """All classes of the sets: those that the first one's label column names, then others in order.

    Labels that are integers are ordered as numbers.

    Raises:
        ValueError: If there are fewer than two, or a set has none of those that are trained on.
    """
    loaded = list(sets)
    _check_overlap(loaded)
    named = list(loaded[0].classes)
    found = {label for labels in loaded for label in (*labels.labels, *labels.noisy_labels)}
    others = found.difference(named)
    classes = named + sorted(others, key=int if all(map(is_number, others)) else None)
    if len(classes) < 2:
        raise ValueError(f"{loaded[0].name}: a classifier needs at least two classes, got {', '.join(classes)}.")
    return classes


def _check_overlap(sets: list[Labels]) -> None:
    """Numbers here and names there would be twice as many classes, half of which nothing is learned about."""
    trained = set(sets[0].noisy_labels)
    for labels in sets:
        if trained.isdisjoint(labels.labels):
            found = [short(", ".join(sorted(names))) for names in (trained, set(labels.labels))]
            raise ValueError(
                f"No label of {sets[0].name} to train on ({found[0]}) is one of {labels.name} ({found[1]}): label "
                "columns should name classes alike."
            )


def is_number(label: str) -> bool:
    """Whether a label is the digits of an integer."""
    return label.removeprefix("-").isdecimal()


def _names(dataset: Dataset, name: str, column: str, rows: list[int], classes: list[str], kind: str) -> list[str]:
    values = dataset[column][:]
    return [_name(values[i], classes, f"{name}, row {i + 1}, column {column!r}", kind) for i in rows]


def _class_names(dataset: Dataset, column: str) -> list[str]:
    feature = dataset.features[column]
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def _name(value: Any, classes: list[str], where: str, kind: str) -> str:
    if isinstance(value, str):
        return value
    # Integers beside a missing one are often stored as floating-point numbers.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    missing = ""
    if value in (None, -1):
        scored_set = "; a scored set without labels, by setting it to none" if kind == "label" else ""
        missing = f" A row without one has to be left out{scored_set}."
    if not isinstance(value, int):
        raise ValueError(f"{where}: expected a {kind} as text or integer, got {short(value)}.{missing}")
    if classes and not 0 <= value < len(classes):
        known = ", ".join(classes)
        raise ValueError(f"{where}: {kind} {value} is outside the {len(classes)} classes {known}.{missing}")
    return classes[value] if classes else str(value)
