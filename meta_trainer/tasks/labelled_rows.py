"""From the labels of a training set to its meta set, the rows to train on, and their wrong labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

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
            ``is_corrupted``.
    """

    positions: np.ndarray
    record: Dataset


def draw_rows(
    labels: Labels, classes: Sequence[str], arguments: LabelledDataArguments, seed: int
) -> tuple[DrawnRows, DrawnRows]:
    """Set the meta set apart, draw the rows to train on and corrupt their labels.

    Args:
        labels: Of the training set.
        classes: All classes, in the order of their ids.
        arguments: How many rows are drawn, and which noise is put on them.
        seed: Seed of the corruption where the settings have none.

    Returns:
        The rows to train on, and those of the meta set with trusted labels; no row is in both.

    Raises:
        ValueError: If a class has too few rows for the meta set, or no row is left to train on.
    """
    trusted, noisy = label_ids(labels.labels, classes), label_ids(labels.noisy_labels, classes)  # [N] each
    meta, train = split_off_meta(
        trusted, classes, arguments.num_meta_examples, arguments.max_train_examples, arguments.subset_seed
    )
    noisy[train] = corrupt_labels(
        noisy[train],
        len(classes),
        arguments.label_noise,
        arguments.label_noise_share,
        seed if arguments.noise_seed is None else arguments.noise_seed,
    )
    rows = np.array(labels.rows)
    return _drawn(train, rows, trusted, noisy), _drawn(meta, rows, trusted, trusted)


def read_source(arguments: LabelledDataArguments, source: str) -> tuple[Dataset, str]:
    """Read a file or a split, one of `arguments.sources`.

    Returns:
        Its rows, and what error messages call it.

    Raises:
        ValueError: If it cannot be loaded.
    """
    data, subset = arguments.data, arguments.subset
    if data is None:
        path = arguments.path(source)
        return read_table(path), str(path)
    folder = arguments.path(data)
    rows = load_split(str(folder) if folder.is_dir() else data, subset, source)
    return rows, f"{data}{f' ({subset})' if subset else ''}, split {source}"


def label_ids(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Ids ``[N]`` of labels by name."""
    ids = {name: number for number, name in enumerate(classes)}
    return np.array([ids[label] for label in labels])


def _drawn(chosen: np.ndarray, rows: np.ndarray, trusted: np.ndarray, labels: np.ndarray) -> DrawnRows:
    columns = {"row": rows, "label": labels, "trusted_label": trusted, "is_corrupted": labels != trusted}
    return DrawnRows(chosen, Dataset.from_dict({name: values[chosen] for name, values in columns.items()}))
