"""Labelled images from the columns of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, Image, concatenate_datasets
from PIL import Image as PillowImage

from meta_trainer.tasks.label_columns import Labels, read_labels, used_rows

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
    parts: Sequence[tuple[Dataset, str]],
    image_column: str,
    label_column: str,
    noisy_label_column: str | None = None,
    exclude_column: str | None = None,
) -> Images:
    """Read images and labels; images are decoded when they are needed.

    Args:
        parts: Rows with an image and a label, and what error messages call them; numbered through.
        image_column: Column of the images: files, or their content.
        label_column: Column of the trusted labels.
        noisy_label_column: Column of the labels to train on; None: the trusted ones.
        exclude_column: Boolean column; rows where it is true are left out.

    Raises:
        ValueError: If a column is missing, there is no row, or a row has no image or no label; it names the row.
    """
    columns = (image_column, label_column, noisy_label_column)
    for dataset, name in parts:
        used_rows(dataset, name, columns, exclude_column)
    name = ", ".join(name for _, name in parts)
    dataset = _joined([dataset for dataset, _ in parts], name)
    rows = used_rows(dataset, name, columns, exclude_column)
    images = _stored_images(dataset, name, image_column)
    stored = images.data.column(PIXELS)
    missing = pyarrow.compute.and_(
        *(pyarrow.compute.is_null(pyarrow.compute.struct_field(stored, part)) for part in ("bytes", "path"))
    )
    if empty := sorted(set(np.flatnonzero(missing.to_numpy()).tolist()).intersection(rows)):
        raise ValueError(f"{name}, row {empty[0] + 1}: expected an image in {image_column!r}, got None.")
    return Images(images, read_labels(dataset, name, rows, label_column, noisy_label_column))


def decode(stored: dict[str, Any]) -> PillowImage.Image:
    """Decode an image.

    Args:
        stored: Its ``bytes``, or the ``path`` of its file.

    Raises:
        ValueError: If it is no image.
    """
    try:
        image: PillowImage.Image = Image().decode_example(stored)
    # What Pillow raises for a missing, truncated or damaged file, and for one that is a bomb.
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"An image of the data cannot be read: {str(error)[:300]}") from error
    return image


def _joined(datasets: list[Dataset], name: str) -> Dataset:
    try:
        return concatenate_datasets(datasets)
    except (ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{name} should have the same columns to be read as one set: {str(error)[:300]}") from error


def _stored_images(dataset: Dataset, name: str, column: str) -> Dataset:
    """The images alone, each as a path or as the content of its file."""
    found = dataset.features[column]
    images = dataset.select_columns([column]).rename_column(column, PIXELS)
    try:
        return images.cast_column(PIXELS, Image(decode=False))
    except (ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{name}: expected images in {image_kinds(column)}, got {str(found)[:100]}. Name their column with "
            "image_column."
        ) from error


def image_kinds(column: str) -> str:
    """Say what a column of images may hold."""
    return f"{column!r} (the Image feature, files, or their content)"
