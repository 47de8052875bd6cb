"""From stored images to the pixels that a model reads, with what is changed in them on the way."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor

from meta_trainer.modules.input_rotation import rotate
from meta_trainer.tasks.image_classification.images import PIXELS
from meta_trainer.tasks.pictures import read_picture

ReadPixels = Callable[[list[dict[str, Any]]], Tensor]
"""From stored images to normalised pixels ``[B, C, H, W]``."""

KEPT_SIZE, NUM_KEPT = 32, 100_000
"""Images of at most this size are decoded once and kept: up to 400 MB of colour images."""


@dataclass(frozen=True)
class ResizedPixels:
    """Resize where needed, scale to 0..1 and normalise.

    Attributes:
        image_size: Height and width H of the result.
        num_channels: 1 for shades of grey, 3 for colours.
        mean: Of each channel, or of all alike.
        std: Standard deviation, in the same way.
    """

    image_size: int
    num_channels: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, stored: list[dict[str, Any]]) -> Tensor:
        """Pixels ``[B, C, H, H]``."""
        read = _kept if self.image_size <= KEPT_SIZE else _resized
        arrays = [read(image["bytes"], image["path"], self.image_size, self.num_channels) for image in stored]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255  # [B, C, H, H]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


def _resized(content: bytes | None, path: str | None, size: int, num_channels: int) -> np.ndarray:
    """An image as bytes ``[H, H, C]``."""
    image = read_picture({"bytes": content, "path": path}, "L" if num_channels == 1 else "RGB")
    image = image if image.size == (size, size) else image.resize((size, size), Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, num_channels)


_kept = lru_cache(maxsize=NUM_KEPT)(_resized)


@dataclass(frozen=True)
class ProcessedPixels:
    """Do what the image processor of a pretrained model does.

    Attributes:
        processor: The image processor.
    """

    processor: BaseImageProcessor

    def __call__(self, stored: list[dict[str, Any]]) -> Tensor:
        """Pixels ``[B, C, H, W]``."""
        images = [read_picture(image, "RGB") for image in stored]
        pixels: Tensor = self.processor(images, return_tensors="pt")[PIXELS]
        return pixels


@dataclass(frozen=True)
class ImageTransform:
    """What a set's images go through when they are read.

    Attributes:
        read: Makes pixels of stored images.
        degrees: Angle by which they are turned, counter-clockwise.
        crop_padding: Most pixels by which they are shifted at random; 0 for none.
        flip: Whether every other one is turned left to right.
    """

    read: ReadPixels
    degrees: float = 0.0
    crop_padding: int = 0
    flip: bool = False

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """The rows with tensors ``[C, H, W]`` for their images."""
        if PIXELS not in rows:
            return rows
        pixels = self.read(rows[PIXELS])
        if self.degrees:
            pixels = rotate(pixels, torch.tensor(math.radians(self.degrees)))
        if self.crop_padding or self.flip:
            pixels = augment(pixels, self.crop_padding, self.flip)
        return {**rows, PIXELS: pixels}


def augment(pixels: Tensor, crop_padding: int, flip: bool) -> Tensor:
    """Shift images at random, mirroring them at the edges, and turn every other one left to right.

    What is drawn depends on the images of the batch and their order alone. The order is another in every epoch, and the
    same where training is resumed, however many batches were read ahead.

    Args:
        pixels: ``[B, C, H, W]``.
        crop_padding: Most pixels by which an image is shifted in each direction.
        flip: Whether images are turned left to right.

    Returns:
        ``[B, C, H, W]``.
    """
    number, _, height, width = pixels.shape
    generator = torch.Generator().manual_seed(zlib.crc32(pixels.numpy().tobytes()))
    if crop_padding:
        padded = F.pad(pixels, (crop_padding,) * 4, mode="reflect")
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2P + 1, 2P + 1, H, W], a view
        top, left = torch.randint(2 * crop_padding + 1, (2, number), generator=generator)
        pixels = windows[torch.arange(number), :, top, left]
    if flip:
        flipped = torch.rand(number, generator=generator) < 0.5
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
    return pixels
