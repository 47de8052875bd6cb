"""From settings to labelled sets: where each comes from, which rows are trusted, and which labels are wrong."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from meta_trainer.tasks.tables import load_split, read_table
from meta_trainer.tasks.text_classification.arguments import GENERATED, TextClassificationArguments
from meta_trainer.tasks.text_classification.corpus import generate_corpus
from meta_trainer.tasks.text_classification.noise import corrupt_labels
from meta_trainer.tasks.text_classification.split import split_off_meta
from meta_trainer.tasks.text_classification.texts import Texts, class_names, read_texts


@dataclass(frozen=True)
class TextData:
    """The sets of a run.

    Attributes:
        classes: Names of the classes in the order of their ids.
        train: Rows of ``row`` (number in the file, from 0), ``text``, ``label`` (to train on), ``trusted_label`` and
            ``is_corrupted``.
        meta: The same of the meta set, none of whose rows is in ``train``; empty where none is set apart.
        knows_errors: Whether the trusted labels of ``train`` are known. If not, the labels stand in for them.
        validation: Rows of ``text`` and ``label``, or None.
        test: The same, or None.
    """

    classes: list[str]
    train: Dataset
    meta: Dataset
    knows_errors: bool
    validation: Dataset | None
    test: Dataset | None


def load_text_data(arguments: TextClassificationArguments, seed: int) -> TextData:
    """Load all sets, set the meta set apart, draw the training rows and corrupt their labels.

    Args:
        arguments: The settings.
        seed: Seed of the corruption where the settings have none.

    Raises:
        ValueError: If a set cannot be loaded, or is too small for what is to be drawn from it.
    """
    train = _load(arguments, "train")
    others = {kind: _load(arguments, kind) for kind in ("validation", "test") if arguments.source(kind)}
    checked = _load_meta(arguments)
    classes = class_names([train, *others.values(), *([] if checked is None else [checked])])
    ids = {name: number for number, name in enumerate(classes)}
    trusted = np.array([ids[label] for label in train.labels])  # [N]
    meta_rows, train_rows = split_off_meta(
        trusted,
        classes,
        arguments.num_meta_examples if checked is None else 0,
        arguments.max_train_examples,
        arguments.subset_seed,
    )
    noisy = np.array([ids[label] for label in train.noisy_labels])  # [N]
    noisy[train_rows] = corrupt_labels(
        noisy[train_rows],
        len(classes),
        arguments.label_noise,
        arguments.label_noise_share,
        seed if arguments.noise_seed is None else arguments.noise_seed,
    )
    scored = {
        kind: Dataset.from_dict({"text": texts.texts, "label": [ids[label] for label in texts.labels]})
        for kind, texts in others.items()
    }
    return TextData(
        classes,
        train=_training_rows(train, train_rows, trusted, noisy),
        meta=_training_rows(train, meta_rows, trusted, trusted) if checked is None else _all_rows(checked, ids),
        knows_errors=checked is None or arguments.label_noise != "none" or arguments.train_label_column is not None,
        validation=scored.get("validation"),
        test=scored.get("test"),
    )


def _all_rows(texts: Texts, ids: dict[str, int]) -> Dataset:
    labels = np.array([ids[label] for label in texts.labels])
    return _training_rows(texts, np.arange(len(labels)), labels, labels)


def _training_rows(texts: Texts, chosen: np.ndarray, trusted: np.ndarray, labels: np.ndarray) -> Dataset:
    return Dataset.from_dict(
        {
            "row": [texts.rows[i] for i in chosen],
            "text": [texts.texts[i] for i in chosen],
            "label": labels[chosen],
            "trusted_label": trusted[chosen],
            "is_corrupted": (labels != trusted)[chosen],
        }
    )


def _load(arguments: TextClassificationArguments, kind: str) -> Texts:
    """Load one set; noisy labels and the column of rows to leave out are for the training set only."""
    source = str(arguments.source(kind))
    dataset, name = _read(arguments, source)
    columns = (arguments.train_label_column, arguments.exclude_column) if kind == "train" else (None, None)
    return read_texts(dataset, name, arguments.text_column, arguments.label_column, *columns)


def _load_meta(arguments: TextClassificationArguments) -> Texts | None:
    if arguments.meta_file is None:
        return None
    path = arguments.path(arguments.meta_file)
    return read_texts(read_table(path), str(path), arguments.text_column, arguments.label_column)


def _read(arguments: TextClassificationArguments, source: str) -> tuple[Dataset, str]:
    data, subset = arguments.data, arguments.subset
    if data is None:
        path = arguments.path(source)
        return read_table(path), str(path)
    name = f"{data}{f' ({subset})' if subset else ''}, split {source}"
    if data == GENERATED:
        return generate_corpus(source), name
    folder = arguments.path(data)
    return load_split(str(folder) if folder.is_dir() else data, subset, source), name
