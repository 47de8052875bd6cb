"""Optimizers that train other parameters than they mean to be used: their averages.

A schedule-free optimizer takes gradients at its iterates and evaluates at an average of them. It keeps one of the two
in the parameters: the iterates in training mode, the averages otherwise.

References:
    Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


def set_training_mode(optimizer: Any, training: bool) -> None:
    """Put the iterates of a schedule-free optimizer into its parameters, or the averages; others stay as they are.

    Args:
        optimizer: Any optimizer, wrapped or not, or None.
        training: Whether it is going to train.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


def iterates(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the parameters of a schedule-free optimizer in training mode; none of another one."""
    groups = [group for group in optimizer.param_groups if group.get("train_mode")]
    return [parameter.detach().clone() for group in groups for parameter in group["params"]]


@torch.no_grad()
def restore_iterates(optimizer: torch.optim.Optimizer, values: Sequence[Tensor]) -> None:
    """Give the parameters the values that :func:`iterates` copied, bit for bit."""
    if values:
        set_training_mode(optimizer, True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@contextmanager
def averages(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The averages of a schedule-free optimizer in its parameters, for a while; the way back leaves no trace."""
    before = iterates(optimizer)
    if before:
        set_training_mode(optimizer, False)
    try:
        yield
    finally:
        restore_iterates(optimizer, before)


class UseAverages(TrainerCallback):
    """Leaves the averages of a schedule-free optimizer in its parameters at the end of training.

    Args:
        optimizer: Gives the optimizer of the present run.
    """

    def __init__(self, optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        self._optimizer = optimizer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        set_training_mode(self._optimizer(), False)
