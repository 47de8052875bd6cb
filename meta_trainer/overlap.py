"""Examples that are in a train batch and in its meta batch, found by fingerprints, without a look at the host."""

from __future__ import annotations

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import INTEGERS
from meta_trainer.modules import Batch
from meta_trainer.modules.meta_module import IS_TRUSTED

_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
"""A number of well-mixed bits: multiples of it look random."""

_BLOCK = 2**18
"""Numbers that are mixed at a time: images have millions, and each takes several integers of 8 bytes."""


def overlap(train_batch: Batch, meta_batch: Batch, input_name: str) -> Tensor | None:
    """Share of the examples in `meta_batch` whose input is in `train_batch`, too, and not on purpose.

    Examples that the train batch marks as trusted are there on purpose.

    Args:
        train_batch: Columns of tensors ``[N, ...]``.
        meta_batch: Likewise, ``[M, ...]``.
        input_name: The column to compare. Labels are left out, as they may be noisy in one of the batches; padding is
            where ``attention_mask`` is zero.

    Returns:
        A scalar, or None where a batch has no such column of tensors.
    """
    train, meta = (_fingerprints(batch, input_name) for batch in (train_batch, meta_batch))
    if train is None or meta is None:
        return None
    same = meta[:, None] == train  # [M, N]
    if IS_TRUSTED in train_batch:
        same &= ~train_batch[IS_TRUSTED].bool()
    return same.any(dim=1).float().mean()


def _fingerprints(batch: Batch, input_name: str) -> Tensor | None:
    """An integer for each example, ``[N]``, the same for equal inputs whatever their padding."""
    values = batch.get(input_name)
    if not isinstance(values, Tensor) or values.dim() == 0:
        return None
    bits = values.contiguous()
    if values.is_floating_point():
        bits = bits.view(INTEGERS[values.itemsize])
    rows = bits.reshape(len(bits), -1)  # [N, L]
    mask = batch.get("attention_mask")
    kept = mask.reshape(rows.shape) if isinstance(mask, Tensor) and mask.shape == values.shape else None
    total = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    width = max(1, _BLOCK // max(1, len(rows)))
    for start in range(0, rows.shape[1], width):
        part = rows[:, start : start + width].long() + 1  # a token of number 0 counts as well
        total += _mixed(part if kept is None else part * kept[:, start : start + width].long(), start)
    return total


def _mixed(rows: Tensor, start: int) -> Tensor:
    """Sum over positions of what a number and its position, from `start` on, mix to; nothing for zero. ``[N]``."""
    positions = torch.arange(start + 1, start + rows.shape[1] + 1, device=rows.device)
    # Integers wrap around. Without the shift, sums of products could be told from few numbers of the row.
    mixed = rows * _GOLDEN_RATIO + positions * (_GOLDEN_RATIO >> 7)
    mixed = (mixed ^ (mixed >> 29)) * (_GOLDEN_RATIO >> 3)
    return torch.where(rows != 0, mixed ^ (mixed >> 32), torch.zeros_like(rows)).sum(dim=1)
