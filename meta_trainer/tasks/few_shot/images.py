"""The images of a domain, decoded once and kept in memory."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from datasets import Dataset

from meta_trainer.tasks.few_shot.arguments import FewShotArguments
from meta_trainer.tasks.label_columns import read_labels, used_rows
from meta_trainer.tasks.locations import locate
from meta_trainer.tasks.pictures import read_picture, stored_images
from meta_trainer.tasks.tables import TABLE_SUFFIXES, load_split, read_table


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
    columns = (arguments.image_column, arguments.label_column)
    used = used_rows(dataset, place, columns, None)
    # For its checks: classes keep the order of the values, which names would not.
    read_labels(dataset, place, used, arguments.label_column)
    _, classes = np.unique(np.asarray(dataset[arguments.label_column][:]), return_inverse=True)
    kept = [np.flatnonzero(classes == number)[: arguments.max_images_per_class] for number in np.unique(classes)]
    images = _decode(dataset, place, np.concatenate(kept).tolist(), arguments)
    limits = np.cumsum([0, *map(len, kept)])
    return Domain(name, images, [np.arange(start, end) for start, end in pairwise(limits)])


def _read(arguments: FewShotArguments, place: str) -> Dataset:
    path = locate(place, arguments.data_dir)
    if place.endswith(TABLE_SUFFIXES):
        return read_table(path)
    return load_split(str(path) if path.is_dir() else place, None, arguments.domain_split)


def _decode(dataset: Dataset, place: str, rows: list[int], arguments: FewShotArguments) -> np.ndarray:
    column, size = arguments.image_column, arguments.image_size
    stored = stored_images(dataset, place, column, rows, partial(locate, data_dir=arguments.data_dir))
    images = np.empty((len(rows), 3, size, size), dtype=np.uint8)
    for number, row in enumerate(rows):
        image = read_picture(stored[row][column], "RGB", f"{place}, row {row + 1}")
        image = image if image.size == (size, size) else image.resize((size, size))
        images[number] = np.asarray(image).transpose(2, 0, 1)
    return images
