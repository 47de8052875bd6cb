"""Examples that are in a train batch and in its meta batch, found by fingerprints, without a look at the host."""

from __future__ import annotations

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import INTEGERS
from meta_trainer.modules import Batch

_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
"""A number of well-mixed bits: multiples of it look random."""


def overlap(train_batch: Batch, meta_batch: Batch, input_name: str) -> Tensor | None:
    """Share of the examples in `meta_batch` whose input is in `train_batch`, too.

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
    return (meta[:, None] == train).any(dim=1).float().mean()


def _fingerprints(batch: Batch, input_name: str) -> Tensor | None:
    """An integer for each example, ``[N]``, the same for equal inputs whatever their padding."""
    values = batch.get(input_name)
    if not isinstance(values, Tensor) or values.dim() == 0:
        return None
    bits = values.contiguous()
    if values.is_floating_point():
        bits = bits.view(INTEGERS[values.itemsize])
    bits = bits.long() + 1  # a token of number 0 counts as well
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == values.shape:
        bits = bits * mask.long()
    rows = bits.reshape(len(bits), -1)
    positions = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    # Integers wrap around. Without the shift, sums of products could be told from few numbers of the row.
    mixed = rows * _GOLDEN_RATIO + positions * (_GOLDEN_RATIO >> 7)
    mixed = (mixed ^ (mixed >> 29)) * (_GOLDEN_RATIO >> 3)
    return torch.where(rows != 0, mixed ^ (mixed >> 32), torch.zeros_like(rows)).sum(dim=1)
