"""Images as tables hold them, files or their content: found, checked and decoded alike for all tasks."""

from collections.abc import Callable, Sequence
from io import BytesIO
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, Image
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

# What Pillow raises for a missing, truncated or damaged file, and for one that is a bomb.
UNREADABLE = (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError)
MOST_OF_8_BITS, MOST_OF_16_BITS = 255, 65535


def stored_images(
    dataset: Dataset, name: str, column: str, rows: Sequence[int], find: Callable[[str], Path]
) -> Dataset:
    """Read the column of images alone, each as the ``path`` of a file or as its content in ``bytes``.

    Args:
        dataset: A table.
        name: What error messages call it.
        column: Column of the images: the Image feature, files, or their content.
        rows: Numbers of the rows that are used. Their files are opened as far as the header, but not decoded.
        find: Where a file is looked up; addresses on the network stay as they are.

    Raises:
        ValueError: If the column holds something else, or a row no image, a file that is not there, or one that is no
            image; it names the row.
    """
    images = _as_files(dataset, name, column)
    stored = images.with_format("arrow")[:].column(column)
    content, named = (pyarrow.compute.struct_field(stored, part) for part in ("bytes", "path"))
    before = named.to_pylist()
    is_file = pyarrow.compute.and_(pyarrow.compute.is_null(content), pyarrow.compute.is_valid(named)).to_pylist()
    paths = [_found(path, find) if needed else path for path, needed in zip(before, is_file, strict=True)]
    for row in rows:
        _check(content[row], paths[row], f"{name}, row {row + 1}", column)
    # Made anew only where paths have changed: content may lie on a disk, and a table in memory is copied to workers.
    if paths == before:
        return images
    joined = pyarrow.StructArray.from_arrays([content.combine_chunks(), pyarrow.array(paths)], ["bytes", "path"])
    return Dataset(pyarrow.table({column: joined}), info=images.info)


def decode(stored: dict[str, Any], where: str) -> PillowImage.Image:
    """Decode an image.

    Args:
        stored: Its ``bytes``, or the ``path`` of its file.
        where: What an error message calls it.

    Raises:
        ValueError: If it is no image.
    """
    try:
        image: PillowImage.Image = Image().decode_example(stored)
    except UNREADABLE as error:
        raise ValueError(f"{where}: an image cannot be read: {_reason(error)}") from error
    return image


def read_picture(stored: dict[str, Any], mode: str, where: str | None = None) -> PillowImage.Image:
    """Decode an image and bring it to 8 bits of one kind.

    What is transparent becomes white. Shades of 16 bits are scaled to 8; those of an image of 32 bits are
    as well, if one is above 255.

    Args:
        stored: Its ``bytes``, or the ``path`` of its file.
        mode: ``"L"`` for shades of grey, ``"RGB"`` for colours.
        where: What an error message calls it; None: by the path.

    Raises:
        ValueError: If it is no image, or one of numbers whose range is not known.
    """
    where = where or stored["path"] or "The data"
    image = decode(stored, where)
    if image.mode == mode and not image.has_transparency_data:
        return image
    _check_mode(image, where)
    if image.mode.startswith("I"):
        image = _with_8_bits(image, where)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        # A dark drawing on transparent ground would be dark on dark: what lies below is often black.
        image = PillowImage.alpha_composite(PillowImage.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _as_files(dataset: Dataset, name: str, column: str) -> Dataset:
    found = dataset.features[column]
    try:
        return dataset.select_columns([column]).cast_column(column, Image(decode=False))
    except (ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{name}: expected images in {column!r} (the Image feature, files, or their content), got "
            f"{str(found)[:100]}. Name their column with image_column."
        ) from error


def _found(path: str, find: Callable[[str], Path]) -> str:
    return path if _is_address(path) else str(find(path))


def _is_address(path: str) -> bool:
    return "://" in path and not path.startswith("file:")


def _check(content: pyarrow.BinaryScalar, path: str | None, where: str, column: str) -> None:
    """Raise ValueError unless there is an image, by its first bytes."""
    if content.is_valid:
        _check_header(BytesIO(content.as_py()), where)
    elif path is None:
        raise ValueError(f"{where}: expected an image in {column!r}, got None.")
    elif not _is_address(path):
        if not isfile(path):
            raise ValueError(f"{where}: there is no file {path[:300]}; relative paths start from data_dir.")
        _check_header(path, f"{where} ({path})")


def _check_header(file: str | BytesIO, where: str) -> None:
    try:
        with PillowImage.open(file) as image:
            pass
    except UNREADABLE as error:
        raise ValueError(f"{where}: an image cannot be read: {_reason(error)}") from error
    _check_mode(image, where)


def _check_mode(image: PillowImage.Image, where: str) -> None:
    if image.mode == "F":
        raise ValueError(
            f"{where}: expected an image of 8 or 16 bits, got floating-point numbers, which do not say what is white. "
            "Store it with 8 bits."
        )


def _with_8_bits(image: PillowImage.Image, where: str) -> PillowImage.Image:
    shades = np.asarray(image).astype(np.int64)  # [H, W]
    darkest, brightest = shades.min(), shades.max()
    if darkest < 0 or brightest > MOST_OF_16_BITS:
        raise ValueError(
            f"{where}: expected shades of grey from 0 to {MOST_OF_16_BITS}, got some from {darkest} to {brightest}. "
            "Store it with 8 bits."
        )
    # Arrays of plain integers have 32 bits whatever they hold: up to 255, that is what was meant.
    if image.mode != "I" or brightest > MOST_OF_8_BITS:
        scale = MOST_OF_16_BITS // MOST_OF_8_BITS
        shades = (shades + scale // 2) // scale
    return PillowImage.fromarray(shades.astype(np.uint8))


def _reason(error: BaseException) -> str:
    # Of content, Pillow names the address in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    return "it is nothing that Pillow knows." if unknown else str(error)[:300]
