"""A displacement that can be taken back bit for bit, without a copy of what was displaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import Block, FlatBlocks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Displacement:
    r"""Moves tensors from :math:`\theta` to :math:`\theta + \delta`, and back.

    Subtracting :math:`\delta` again misses :math:`\theta` by rounding errors, mostly of a few units in the last place.
    They are kept, one byte an element, instead of :math:`\theta`.

    Args:
        blocks: Of the tensors.
        tensors: Displaced in place.
        steps: Gives the flat blocks of :math:`\delta`, the same at every call.
    """

    def __init__(self, blocks: FlatBlocks, tensors: Sequence[Tensor], steps: Callable[[], Iterable[Tensor]]) -> None:
        self._blocks, self._tensors, self._steps = blocks, tensors, steps
        self._errors: list[_RoundingErrors] = []
        for block, step in zip(blocks, steps(), strict=True):
            original = block.flatten(tensors).clone()
            torch._foreach_add_(block.views(tensors), block.split(step))
            self._errors.append(_RoundingErrors(original, _subtract(block, tensors, step)))

    def undo(self) -> None:
        """Give the tensors their original values back."""
        for block, step, errors in zip(self._blocks, self._steps(), self._errors, strict=True):
            original = errors.correct(_subtract(block, self._tensors, step))
            torch._foreach_copy_(block.views(self._tensors), block.split(original))


class _RoundingErrors:
    """What makes `found` into `expected`: a byte for each element, and those that are further off."""

    def __init__(self, expected: Tensor, found: Tensor) -> None:
        integers = _INTEGERS[expected.itemsize]
        # Neighbouring floating-point numbers of one sign are neighbouring integers.
        errors = expected.view(integers) - found.view(integers)
        self._errors = errors.to(torch.int8)
        self._outliers = (self._errors != errors).nonzero().flatten()
        self._values = expected[self._outliers]

    def correct(self, found: Tensor) -> Tensor:
        corrected = (found.view(_INTEGERS[found.itemsize]) + self._errors).view(found.dtype)
        corrected[self._outliers] = self._values
        return corrected


def _subtract(block: Block, tensors: Sequence[Tensor], step: Tensor) -> Tensor:
    displaced = block.flatten(tensors)
    return (displaced - step).to(displaced.dtype)
