"""A learned rotation of the training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_trainer.hypergrad.checks import is_number
from meta_trainer.modules.meta_module import Batch, MetaModule

PIXELS = "pixel_values"
"""Batch column, floats ``[B, C, H, W]``: the images, as the models of transformers call them."""

PADDINGS = ("border", "zeros", "reflection")


class InputRotation(MetaModule):
    r"""Rotate every training image by one learned angle :math:`\lambda`, counter-clockwise where it is positive.

    The model trains on rotated images and is applied to images as they are: the angle that makes it good at a
    target domain is the one by which that domain is rotated against the training images.

    Args:
        initial_degrees: Angle to start from.
        padding: What lies beyond the image: its nearest pixel (``"border"``), ``"zeros"``, or its mirror image
            (``"reflection"``). With the border, which in pictures of a single object is background, it does not matter
            whether images are normalised before or after; zeros are background only where they have that value.

    Raises:
        ValueError: If `initial_degrees` is no finite number or `padding` none of the three.

    References:
        Bohdal et al., `EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization
        <https://arxiv.org/abs/2106.10575>`_, NeurIPS 2021, section 4.2.
    """

    def __init__(self, initial_degrees: float = 0.0, padding: str = "border") -> None:
        super().__init__()
        if not is_number(initial_degrees) or not math.isfinite(initial_degrees):
            raise ValueError(f"`initial_degrees` should be a finite number, got {initial_degrees!r}.")
        if padding not in PADDINGS:
            raise ValueError(f"`padding` should be one of {', '.join(PADDINGS)}, got {padding!r}.")
        self.padding = padding
        self.angle = nn.Parameter(torch.tensor(math.radians(initial_degrees)))  # in radians

    def transform_batch(self, batch: Batch) -> Batch:
        """The batch with its images rotated."""
        images = batch.get(PIXELS)
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            found = f"{images.dtype} of shape {list(images.shape)}" if isinstance(images, Tensor) else repr(images)
            raise ValueError(
                f"InputRotation expects a column `{PIXELS}` of floats of shape [B, C, H, W] in every training batch, "
                f"got {found}, and the columns {sorted(batch)}."
            )
        return {**batch, PIXELS: rotate(images, self.angle, self.padding)}

    def summary(self) -> dict[str, Tensor]:
        """The angle in degrees."""
        return {"angle": torch.rad2deg(self.angle)}


def rotate(images: Tensor, angle: Tensor, padding: str = "border") -> Tensor:
    """Rotate images about their centre, with bilinear interpolation; differentiable in the angle.

    Args:
        images: ``[B, C, H, W]``, floats.
        angle: Scalar, in radians, counter-clockwise as `torch.rot90`.
        padding: What lies beyond an image: ``border``, ``zeros`` or ``reflection``.

    Returns:
        ``[B, C, H, W]``, of the type of `images`.
    """
    height, width = images.shape[-2:]
    # The angle's precision where it is the higher one: coordinates in half precision are off by pixels.
    precision = torch.promote_types(angle.dtype, images.dtype)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # From a pixel of the result to the one it comes from, in coordinates from -1 to 1 with y pointing down.
    rows = (torch.stack([cosine, -sine * height / width]), torch.stack([sine * width / height, cosine]))
    matrix = F.pad(torch.stack(rows), (0, 1)).to(precision)  # [2, 3], no translation
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)  # [B, H, W, 2]
    rotated = F.grid_sample(
        images.to(precision), grid, mode="bilinear", padding_mode=padding, align_corners=False
    )  # [B, C, H, W]
    return rotated.to(images.dtype)
