"""The images of a domain, decoded once and kept in memory."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Image

from meta_trainer.tasks.few_shot.arguments import PARQUET, FewShotArguments
from meta_trainer.tasks.locations import locate
from meta_trainer.tasks.tables import check_columns, load_split, read_table


@dataclass(frozen=True)
class Domain:
    """An image set.

    Attributes:
        name: Of the set.
        images: ``[N, 3, S, S]`` of type uint8.
        rows: Indices of the images of each class, in the order of the classes' names.
    """

    name: str
    images: np.ndarray
    rows: list[np.ndarray]


def load_domain(arguments: FewShotArguments, name: str) -> Domain:
    """Read a domain and scale its images to one size, with three channels.

    Args:
        arguments: The settings.
        name: Of the domain.

    Raises:
        ValueError: If the data cannot be read, have no such columns, or hold something else than images.
    """
    place = arguments.places[name]
    dataset = _read(arguments, place)
    check_columns(dataset, place, (arguments.image_column, arguments.label_column))
    labels = dataset[arguments.label_column][:]
    if any(label is None for label in labels):
        raise ValueError(f"{place}: every image needs a {arguments.label_column}, got none in some rows.")
    _, classes = np.unique(np.asarray(labels), return_inverse=True)
    kept = [np.flatnonzero(classes == number)[: arguments.max_images_per_class] for number in np.unique(classes)]
    chosen = np.concatenate(kept)
    images = _decode(dataset.select(chosen), place, arguments.image_column, arguments.image_size)
    limits = np.cumsum([0, *map(len, kept)])
    return Domain(name, images, [np.arange(start, end) for start, end in pairwise(limits)])


def _read(arguments: FewShotArguments, place: str) -> Dataset:
    path = locate(place, arguments.data_dir)
    if place.endswith(PARQUET):
        return read_table(Path(path))
    return load_split(str(path) if path.is_dir() else place, None, arguments.domain_split)


def _decode(dataset: Dataset, place: str, column: str, size: int) -> np.ndarray:
    images = np.empty((len(dataset), 3, size, size), dtype=np.uint8)
    try:
        rows: Any = dataset.select_columns([column]).cast_column(column, Image(mode="RGB"))
        for number, row in enumerate(rows):
            image = row[column]  # of the Python Imaging Library
            image = image if image.size == (size, size) else image.resize((size, size))
            images[number] = np.asarray(image).transpose(2, 0, 1)
    # What the libraries raise for columns of another kind, rows without an image and files that are none.
    except (OSError, ValueError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{place}: the column {column!r} should hold images: {str(error)[:300]}") from error
    return images
