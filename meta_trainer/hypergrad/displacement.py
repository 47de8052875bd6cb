"""A displacement that can be taken back bit for bit, without a copy of what was displaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import INTEGERS, Block, FlatBlocks


class Displacement:
    r"""Moves tensors from :math:`\theta` to :math:`\theta + \delta`, and back.

    Subtracting :math:`\delta` again misses :math:`\theta` by rounding errors, mostly of a few units in the last place.
    They are kept, one byte an element, instead of :math:`\theta`.

    Args:
        blocks: Of the tensors.
        tensors: Set to :math:`\theta + \delta`.
        origin: Aligned with `tensors`, :math:`\theta`; not kept.
        steps: Flat blocks of :math:`\delta`; they are overwritten.
    """

    def __init__(
        self,
        blocks: FlatBlocks,
        tensors: Sequence[Tensor],
        origin: Sequence[Tensor],
        steps: Iterable[Tensor],
    ) -> None:
        self._blocks, self._tensors = blocks, tensors
        self._num_undone = 0
        self._errors: list[_RoundingErrors] = []
        for block, step in zip(blocks, steps, strict=True):
            add(block, tensors, origin, step)
            self._errors.append(_RoundingErrors(block.flatten(origin), _subtract(block, tensors, step)))

    def undo(self, steps: Iterable[Tensor]) -> None:
        """Give the tensors their values back by the steps that displaced them; may go on after it was broken off."""
        for number, (block, step) in enumerate(zip(self._blocks, steps, strict=True)):
            if number >= self._num_undone:
                original = self._errors[number].correct(_subtract(block, self._tensors, step))
                torch._foreach_copy_(block.views(self._tensors), block.split(original))
                self._num_undone += 1


class _RoundingErrors:
    """What makes `found`, which is overwritten, into `expected`: a byte an element, and those that are further off."""

    def __init__(self, expected: Tensor, found: Tensor) -> None:
        integers = INTEGERS[expected.itemsize]
        # Neighbouring floating-point numbers of one sign are neighbouring integers.
        errors = found.view(integers)
        torch.sub(expected.view(integers), errors, out=errors)
        self._errors = errors.to(torch.int8)
        # Zero for the 256 numbers that fit a byte.
        excess = errors.add_(128).bitwise_right_shift_(8)
        self._outliers = _nonzero(excess.abs_())
        self._values = expected[self._outliers]

    def correct(self, found: Tensor) -> Tensor:
        """Change `found`, the tensor of the constructor or its equal, into `expected`."""
        found.view(INTEGERS[found.itemsize]).add_(self._errors)
        found[self._outliers] = self._values
        return found


def add(block: Block, tensors: Sequence[Tensor], origin: Sequence[Tensor], step: Tensor) -> None:
    """Set what of `tensors` lies in a block to `origin` plus a flat step."""
    for view, start, part in zip(block.views(tensors), block.views(origin), block.split(step), strict=True):
        torch.add(start, part, out=view)


def _nonzero(values: Tensor, rows: int = 64) -> Tensor:
    """Positions of the few entries of ``[N]`` that are positive; no other is negative."""
    width = len(values) // rows
    table, rest = values[: rows * width].view(rows, width), values[rows * width :]
    columns = table.amax(dim=0).nonzero().flatten()
    row, column = table[:, columns].nonzero().unbind(dim=1)
    return torch.cat([row * width + columns[column], rest.nonzero().flatten() + rows * width])


def _subtract(block: Block, tensors: Sequence[Tensor], step: Tensor) -> Tensor:
    displaced = block.flatten(tensors)
    return torch.sub(displaced, step, out=step).to(displaced.dtype)
