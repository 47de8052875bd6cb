"""From settings to labelled sets: where each comes from, which images are trusted, and which labels are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from meta_trainer.tasks.image_classification.arguments import ImageClassificationArguments
from meta_trainer.tasks.image_classification.images import PIXELS, Images, join_images, read_images
from meta_trainer.tasks.label_columns import class_names
from meta_trainer.tasks.labelled_rows import draw_rows, label_ids, read_meta_file, read_source
from meta_trainer.tasks.tables import first_filled


@dataclass(frozen=True)
class ImageData:
    """The sets of a run. Rows are ``pixel_values``, stored images, and ``labels``.

    Attributes:
        classes: Names of the classes in the order of their ids.
        train: Images to train on, with labels that may be wrong.
        train_record: Of each, ``row`` (number in the files, from 0), ``label``, and where they are known
            ``trusted_label`` and ``is_corrupted``.
        meta: The meta set, none of whose images is in ``train``; empty where none is set apart.
        meta_record: The same record of these.
        validation: Images with trusted labels, or None.
        test: The same, or None.
        first_image: The first image of the training files, as it is stored, whichever are drawn.
    """

    classes: list[str]
    train: Dataset
    train_record: Dataset
    meta: Dataset
    meta_record: Dataset
    validation: Dataset | None
    test: Dataset | None
    first_image: dict[str, Any]


def load_image_data(arguments: ImageClassificationArguments, seed: int) -> ImageData:
    """Load all sets, set the meta set apart, draw the training images and corrupt their labels.

    Args:
        arguments: The settings.
        seed: Seed of the corruption where the settings have none.

    Raises:
        ValueError: If a set cannot be loaded, or is too small for what is to be drawn from it.
    """
    train = _load(arguments, "train")
    others = {kind: _load(arguments, kind) for kind in ("validation", "test") if arguments.sources(kind)}
    checked = _load_meta(arguments)
    further = [] if checked is None else [checked]
    classes = class_names([images.labels for images in (train, *others.values(), *further)])
    drawn, meta = draw_rows(train.labels, None if checked is None else checked.labels, classes, arguments, seed)
    most = {"validation": None, "test": arguments.max_test_examples}
    scored = {kind: _scored(images, classes, most[kind], arguments.subset_seed) for kind, images in others.items()}
    return ImageData(
        classes,
        train=train.select(drawn.positions, np.array(drawn.record["label"])),
        train_record=drawn.record,
        meta=(checked or train).select(meta.positions, np.array(meta.record["label"])),
        meta_record=meta.record,
        validation=scored.get("validation"),
        test=scored.get("test"),
        first_image=train.images[train.labels.rows[0]][PIXELS],
    )


def _scored(images: Images, classes: list[str], most: int | None, seed: int) -> Dataset:
    labels = label_ids(images.labels.labels, classes)
    positions = np.arange(len(labels))
    if most is not None:
        # Files often list class after class.
        positions = np.random.default_rng(seed).permutation(positions)[:most]
    return images.select(positions, labels[positions])


def _load(arguments: ImageClassificationArguments, kind: str) -> Images:
    """Load one set; noisy labels and the column of rows to leave out are for the training set only."""
    parts = [read_source(arguments, source) for source in arguments.sources(kind)]
    if kind != "train":
        return join_images([_read(arguments, part, arguments.label_column) for part in parts])
    further = (arguments.train_label_column, arguments.exclude_column)
    columns = [first_filled(dataset, arguments.trusted_columns(arguments.label_column)) for dataset, _ in parts]
    files = [_read(arguments, part, column, *further) for part, column in zip(parts, columns, strict=True)]
    _check_filled_alike(files, columns, arguments.label_column)
    return join_images(files)


def _load_meta(arguments: ImageClassificationArguments) -> Images | None:
    found = read_meta_file(arguments)
    return None if found is None else _read(arguments, found, arguments.label_column)


def _read(
    arguments: ImageClassificationArguments, part: tuple[Dataset, str], label_column: str, *further: str | None
) -> Images:
    return read_images(*part, arguments.path, arguments.image_column, label_column, *further)


def _check_filled_alike(files: Sequence[Images], columns: Sequence[str], label_column: str) -> None:
    """Of some images, what is trained on would count as right, of others as noisy."""
    names = {column: images.labels.name for images, column in zip(files, columns, strict=True)}
    filled = names.pop(label_column, None)
    if filled and names:
        raise ValueError(
            f"label_column={label_column!r} holds labels in {filled}, but none in {', '.join(names.values())}: files "
            "to train on should have them in all rows, or, beside a meta_file, in none. Fill the column, or drop it."
        )
