"""Labelled texts from the columns of a data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from datasets import ClassLabel, Dataset

from meta_trainer.tasks.tables import check_columns


@dataclass(frozen=True)
class Texts:
    """Texts of one file or split, labels by name.

    Attributes:
        name: The file, or the data set and its split.
        texts: The texts.
        labels: Trusted label of each text.
        noisy_labels: Label to train on of each text; the trusted one where the data have no other.
        rows: Number of each text's row, from 0.
        classes: Names of the label column's classes, in their order; empty for a column that names none.
        domains: Name of each text's source; empty without a column of them.
    """

    name: str
    texts: list[str]
    labels: list[str]
    noisy_labels: list[str]
    rows: list[int]
    classes: tuple[str, ...]
    domains: list[str]


def read_texts(
    dataset: Dataset,
    name: str,
    text_column: str,
    label_column: str,
    noisy_label_column: str | None = None,
    exclude_column: str | None = None,
    domain_column: str | None = None,
) -> Texts:
    """Read texts and labels; an integer becomes the name of its class, or its digits where classes have no name.

    Args:
        dataset: Rows with a text and a label.
        name: What error messages call the data set.
        text_column: Column of the texts.
        label_column: Column of the trusted labels.
        noisy_label_column: Column of the labels to train on; None: the trusted ones.
        exclude_column: Boolean column; rows where it is true are left out.
        domain_column: Column of the sources' names, text or integers, named or not.

    Raises:
        ValueError: If a column is missing, there is no row, or a row has no text or no label; it names the row.
    """
    check_columns(dataset, name, (text_column, label_column, noisy_label_column, exclude_column, domain_column))
    excluded = dataset[exclude_column] if exclude_column else [False] * len(dataset)
    rows = [i for i, left_out in enumerate(excluded) if not left_out]
    if not rows:
        raise ValueError(f"{name} holds no row to use.")
    texts = list(dataset[text_column])
    for i in rows:
        if not isinstance(texts[i], str):
            raise ValueError(f"{name}, row {i + 1}: expected a text in {text_column!r}, got {short(texts[i])}.")
    labels = _labels(dataset, name, label_column, rows)
    return Texts(
        name=name,
        texts=[texts[i] for i in rows],
        labels=labels,
        noisy_labels=labels if noisy_label_column is None else _labels(dataset, name, noisy_label_column, rows),
        rows=rows,
        classes=tuple(_class_names(dataset, label_column)),
        domains=[] if domain_column is None else _labels(dataset, name, domain_column, rows),
    )


def class_names(sets: Iterable[Texts]) -> list[str]:
    """All classes of the sets: those that the first one's label column names, then others in order.

    Labels that are integers are ordered as numbers.

    Raises:
        ValueError: If there are fewer than two.
    """
    loaded = list(sets)
    named = list(loaded[0].classes)
    found = {label for texts in loaded for label in (*texts.labels, *texts.noisy_labels)}
    others = found.difference(named)
    are_numbers = all(label.removeprefix("-").isdecimal() for label in others)
    classes = named + sorted(others, key=int if are_numbers else None)
    if len(classes) < 2:
        raise ValueError(f"{loaded[0].name}: a classifier needs at least two classes, got {', '.join(classes)}.")
    return classes


def _labels(dataset: Dataset, name: str, column: str, rows: list[int]) -> list[str]:
    names = _class_names(dataset, column)
    values = list(dataset[column])
    return [_label_text(values[i], names, f"{name}, row {i + 1}, column {column!r}") for i in rows]


def _class_names(dataset: Dataset, column: str) -> list[str]:
    feature = dataset.features[column]
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def _label_text(value: Any, names: list[str], where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, int):
        raise ValueError(f"{where}: expected a label as text or integer, got {short(value)}.")
    if names and not 0 <= value < len(names):
        raise ValueError(
            f"{where}: label {value} is outside the {len(names)} classes {', '.join(names)}. A split without labels "
            "is left out by setting it to none."
        )
    return names[value] if names else str(value)
