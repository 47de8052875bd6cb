"""A list of tensors as one long vector, visited block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_BLOCK_SIZE = 2**19
"""Elements of a block on the CPU: a few blocks fit the cache, where consecutive operations find them again."""

DEVICE_BLOCK_SIZE = 2**22
"""Elements of a block on an accelerator: few enough for a small buffer, enough to hide the launch of a kernel."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type of as many bytes, for the bits of floating-point numbers."""


@dataclass(frozen=True)
class _Piece:
    """Part of one tensor, from element `start` to `stop` of its flat view; all of it where it has none."""

    index: int
    start: int
    stop: int
    shape: torch.Size | None = None

    def view(self, tensor: Tensor) -> Tensor:
        return tensor if self.shape is not None else tensor.view(-1)[self.start : self.stop]

    def flatten(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[self.start : self.stop]


@dataclass(frozen=True)
class Block:
    """A stretch of the vector.

    Attributes:
        numel: Its length.
        dtype: Of arithmetic with it: that of its tensors, at least float32.
        device: Where it lives.
    """

    numel: int
    dtype: torch.dtype
    device: torch.device
    _pieces: tuple[_Piece, ...]

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of what of `tensors` lies in this block, to write into."""
        return [piece.view(tensors[piece.index]) for piece in self._pieces]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """What of `tensors` lies in this block, as a flat tensor ``[numel]`` to read."""
        parts = [piece.flatten(tensors[piece.index]) for piece in self._pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """As :meth:`flatten`, where a scalar stands for all elements of its tensor."""
        parts = [
            values[p.index].expand(p.stop - p.start) if values[p.index].dim() == 0 else p.flatten(values[p.index])
            for p in self._pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Parts of a flat tensor ``[numel]``, aligned with :meth:`views`."""
        parts = flat.split([piece.stop - piece.start for piece in self._pieces])
        return [
            part if piece.shape is None else part.view(piece.shape)
            for part, piece in zip(parts, self._pieces, strict=True)
        ]


class FlatBlocks(Sequence[Block]):
    """The blocks of a list of tensors.

    Arithmetic on all parameters of a model, done block by block, needs no temporary of the model's size. Small tensors
    share a block, large ones are cut.

    Args:
        tensors: They decide the partition. Aligned lists of tensors of the same shapes go through the same blocks.
        block_size: Most elements of a block; by default what suits the device.
    """

    def __init__(self, tensors: Sequence[Tensor], block_size: int | None = None) -> None:
        self._blocks: list[Block] = []
        self._dtype, self._device = torch.promote_types(tensors[0].dtype, torch.float32), tensors[0].device
        pieces: list[_Piece] = []
        for index, tensor in enumerate(tensors):
            size = block_size or (CPU_BLOCK_SIZE if tensor.device.type == "cpu" else DEVICE_BLOCK_SIZE)
            previous = tensors[index - 1]
            if (tensor.device, tensor.dtype) != (previous.device, previous.dtype):
                pieces = self._close(pieces, previous)
            for piece in _pieces_of(index, tensor, size):
                if pieces and sum(p.stop - p.start for p in pieces) + piece.stop - piece.start > size:
                    pieces = self._close(pieces, tensor)
                pieces.append(piece)
        self._close(pieces, tensors[-1])

    def _close(self, pieces: list[_Piece], tensor: Tensor) -> list[_Piece]:
        if pieces:
            numel = sum(piece.stop - piece.start for piece in pieces)
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            self._blocks.append(Block(numel, dtype, tensor.device, tuple(pieces)))
        return []

    def __len__(self) -> int:
        """Their number."""
        return len(self._blocks)

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        """The blocks in order."""
        return self._blocks[index]

    def flatten(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each block of an aligned list of tensors, as a flat tensor to calculate with."""
        # Autograd chooses the strides of a gradient freely.
        contiguous = [tensor.contiguous() for tensor in tensors]
        return (block.flatten(contiguous).to(block.dtype) for block in self)

    def spread(self, values: Sequence[Tensor]) -> Iterator[Tensor]:
        """As :meth:`flatten`, where a scalar stands for all elements of its tensor."""
        return (block.spread(values).to(block.dtype) for block in self)

    def sum_of(self, parts: Sequence[Tensor], *shape: int) -> Tensor:
        """Sum of one tensor of a given shape for each block; of no block at all, where all tensors are empty, zeros."""
        return (
            torch.stack(list(parts)).sum(dim=0) if parts else torch.zeros(shape, dtype=self._dtype, device=self._device)
        )


def _pieces_of(index: int, tensor: Tensor, size: int) -> Iterator[_Piece]:
    if not tensor.is_contiguous():
        # It has no flat view to write into, so it stays whole.
        yield _Piece(index, 0, tensor.numel(), tensor.shape)
        return
    for number in range(math.ceil(tensor.numel() / size)):
        yield _Piece(index, number * size, min((number + 1) * size, tensor.numel()))


def inner_product(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    """Sum over all entries of the product of two vectors, each given by its blocks or as a list of tensors."""
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]).sum()
