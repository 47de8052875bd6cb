"""Labelled images from the columns of a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from reprlib import repr as short

import numpy as np
from datasets import Dataset, concatenate_datasets

from meta_trainer.tasks.label_columns import Labels, is_number, read_labels, used_rows
from meta_trainer.tasks.pictures import stored_images

PIXELS = "pixel_values"
LABELS = "labels"


@dataclass(frozen=True)
class Images:
    """Images of one or more files, or of a split.

    Attributes:
        images: A column ``pixel_values`` of all images, as they are stored.
        labels: Labels of those that are used.
    """

    images: Dataset
    labels: Labels

    def select(self, positions: np.ndarray, labels: np.ndarray) -> Dataset:
        """Return rows of ``pixel_values``, still stored, and ``labels``.

        Args:
            positions: ``[N]``, among the images that are used.
            labels: ``[N]``, as integers.
        """
        rows = np.array(self.labels.rows)[positions]
        column = np.full(len(self.images), -1)
        column[rows] = labels
        # Before the selection: afterwards, every image would be copied.
        return self.images.add_column(LABELS, column).select(rows)


def read_images(
    dataset: Dataset,
    name: str,
    find: Callable[[str], Path],
    image_column: str,
    label_column: str,
    noisy_label_column: str | None = None,
    exclude_column: str | None = None,
) -> Images:
    """Read images and labels of a file or a split; images are decoded when they are needed.

    Args:
        dataset: Rows with an image and a label.
        name: What error messages call it.
        find: Where the file of an image is looked up.
        image_column: Column of the images: files, or their content.
        label_column: Column of the trusted labels.
        noisy_label_column: Column of the labels to train on; None: the trusted ones.
        exclude_column: Boolean column; rows where it is true are left out.

    Raises:
        ValueError: If a column is missing, there is no row, or a row has no image or no label; it names the row.
    """
    rows = used_rows(dataset, name, (image_column, label_column, noisy_label_column), exclude_column)
    labels = read_labels(dataset, name, rows, label_column, noisy_label_column)
    images = stored_images(dataset, name, image_column, rows, find)
    return Images(images if image_column == PIXELS else images.rename_column(image_column, PIXELS), labels)


def join_images(files: Sequence[Images]) -> Images:
    """Put files together, whose rows are numbered through.

    Args:
        files: In their order. The classes that they name are those of the first, then others of the next.

    Raises:
        ValueError: If labels of one are numbers, and those of another the names of classes.
    """
    if len(files) == 1:
        return files[0]
    parts = [images.labels for images in files]
    _check_alike(parts)
    starts = accumulate((len(images.images) for images in files), initial=0)
    labels = Labels(
        name=", ".join(part.name for part in parts),
        labels=[label for part in parts for label in part.labels],
        noisy_labels=[label for part in parts for label in part.noisy_labels],
        rows=[start + row for start, part in zip(starts, parts, strict=False) for row in part.rows],
        classes=tuple(dict.fromkeys(name for part in parts for name in part.classes)),
    )
    return Images(concatenate_datasets([images.images for images in files]), labels)


def _check_alike(parts: Sequence[Labels]) -> None:
    """Numbers here and names there would be twice as many classes."""
    found = {part.name: {*part.classes, *part.labels, *part.noisy_labels} for part in parts}
    numbers = [name for name, labels in found.items() if all(map(is_number, labels))]
    names = [name for name in found if name not in numbers]
    named = set().union(*(found[name] for name in names))
    for name in numbers:
        if names and named.isdisjoint(found[name]):
            shown = [short(", ".join(sorted(found[file]))) for file in (name, names[0])]
            raise ValueError(
                f"Labels of {name} are numbers ({shown[0]}), and those of {names[0]} are names ({shown[1]}): label "
                "columns of all files should name classes alike."
            )
