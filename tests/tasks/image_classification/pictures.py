"""Small pictures of two classes, and the content of their files."""

import io

import numpy as np
from PIL import Image as PillowImage


def png(pixels: np.ndarray) -> bytes:
    """The content of a file."""
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def picture(number: int, size: int = 16, channels: int = 1) -> np.ndarray:
    """A bright half whose side is the class, 0 or 1, over noise that the number decides."""
    pixels = np.random.default_rng(number).integers(0, 60, size=(size, size, channels), dtype=np.uint8)
    half = slice(0, size // 2) if number % 2 == 0 else slice(size // 2, size)
    pixels[:, half] += 150
    return pixels[..., 0] if channels == 1 else pixels
