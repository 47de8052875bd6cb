"""From the labels of a training set to its meta set, the rows to train on, and their wrong labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from meta_trainer.modules.meta_module import IS_TRUSTED
from meta_trainer.tasks.class_labels import ClassLabelArguments
from meta_trainer.tasks.label_columns import Labels
from meta_trainer.tasks.label_noise import corrupt_labels
from meta_trainer.tasks.labelled_data import LabelledDataArguments
from meta_trainer.tasks.meta_split import split_off_meta
from meta_trainer.tasks.tables import load_split, read_table


@dataclass(frozen=True)
class DrawnRows:
    """Rows that were drawn from a training set.

    Attributes:
        positions: ``[N]``, their positions among the rows that are used.
        record: Their ``row`` (number in the file, from 0), ``label`` (to train on), ``trusted_label`` and
            ``is_corrupted``; without these two where only the rows of a file are trusted.
    """

    positions: np.ndarray
    record: Dataset


def draw_rows(
    labels: Labels, checked: Labels | None, classes: Sequence[str], arguments: ClassLabelArguments, seed: int
) -> tuple[DrawnRows, DrawnRows]:
    """Set the meta set apart, draw the rows to train on and corrupt their labels.

    Args:
        labels: Of the training set.
        checked: Of a file that is the meta set; None: the meta set is drawn from the training set.
        classes: All classes, in the order of their ids.
        arguments: How many rows are drawn, and which noise is put on them.
        seed: Seed of the corruption where the settings have none.

    Returns:
        The rows to train on, and those of the meta set with trusted labels, of `checked` where that is given; no row
        is in both.

    Raises:
        ValueError: If a class has too few rows for the meta set, or no row is left to train on.
    """
    trusted, noisy = label_ids(labels.labels, classes), label_ids(labels.noisy_labels, classes)  # [N] each
    num_meta = arguments.num_meta_examples if checked is None else 0
    meta, train = split_off_meta(
        trusted, classes, num_meta, arguments.max_train_examples, arguments.subset_seed, arguments.balance_meta_set
    )
    noisy[train] = corrupt_labels(
        noisy[train],
        len(classes),
        arguments.label_noise,
        arguments.label_noise_share,
        seed if arguments.noise_seed is None else arguments.noise_seed,
    )
    # Beside a file of trusted rows, the labels of others count as right only if they are not what is trained on.
    known = checked is None or bool((noisy != trusted).any())
    drawn = _drawn(train, labels, trusted, noisy, known)
    if checked is None:
        return drawn, _drawn(meta, labels, trusted, trusted, known)
    own = label_ids(checked.labels, classes)
    return drawn, _drawn(np.arange(len(own)), checked, own, own, known)


def label_record(rows: Dataset, classes: Sequence[str]) -> Dataset:
    """Labels by name, as a reader looks them up: see `Task.training_labels`.

    Args:
        rows: With the columns of `DrawnRows.record`, and others.
        classes: Names of the classes in the order of their ids.
    """
    columns = {column: rows[column] for column in rows.column_names}
    for column in {"label", "trusted_label"}.intersection(columns):
        columns[column] = [classes[label] for label in columns[column]]
    return Dataset.from_dict(columns)


def mark_trusted(rows: Dataset, num_trusted: int) -> Dataset:
    """The rows with a column that says of the last `num_trusted` of them that they are of the meta set."""
    return rows.add_column(IS_TRUSTED, [False] * (len(rows) - num_trusted) + [True] * num_trusted)


def read_meta_file(arguments: LabelledDataArguments) -> tuple[Dataset, str] | None:
    """Read the file of the meta set, if there is one.

    Returns:
        Its rows, and what error messages call it.

    Raises:
        ValueError: If it cannot be loaded.
    """
    return _read_file(arguments, arguments.meta_file) if arguments.meta_file else None


def read_source(arguments: LabelledDataArguments, source: str) -> tuple[Dataset, str]:
    """Read a file or a split, one of `arguments.sources`.

    Returns:
        Its rows, and what error messages call it.

    Raises:
        ValueError: If it cannot be loaded.
    """
    data, subset = arguments.data, arguments.subset
    if data is None:
        return _read_file(arguments, source)
    folder = arguments.path(data)
    rows = load_split(str(folder) if folder.is_dir() else data, subset, source)
    return rows, f"{data}{f' ({subset})' if subset else ''}, split {source}"


def label_ids(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Ids ``[N]`` of labels by name."""
    ids = {name: number for number, name in enumerate(classes)}
    return np.array([ids[label] for label in labels])


def _read_file(arguments: LabelledDataArguments, file: str) -> tuple[Dataset, str]:
    path = arguments.path(file)
    return read_table(path), str(path)


def _drawn(chosen: np.ndarray, source: Labels, trusted: np.ndarray, labels: np.ndarray, known: bool) -> DrawnRows:
    columns = {"row": np.array(source.rows), "label": labels}
    if known:
        columns |= {"trusted_label": trusted, "is_corrupted": labels != trusted}
    return DrawnRows(chosen, Dataset.from_dict({name: values[chosen] for name, values in columns.items()}))
