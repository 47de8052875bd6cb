"""What the meta step asks of an engine that spreads the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from meta_trainer.hypergrad import Sharding


class ShardedParameters(Sharding, Protocol):
    """The perturbed parameters of a model that an engine spreads."""

    @property
    def shards(self) -> list[Tensor]:
        """This process's part of each, to be written into; aligned with `parameters`."""


class ShardingEngine(Protocol):
    """An engine that spreads the parameters of a model over the processes."""

    def refresh(self) -> None:
        """Forget whole copies of the parameters; ``model.parameters()`` are the spread ones from then on."""

    def recover(self) -> None:
        """Get ready for the next pass after one that an exception broke off."""

    def select(self, parameters: Sequence[nn.Parameter]) -> ShardedParameters:
        """The shards of some of the parameters."""


@contextmanager
def recovering(engine: ShardingEngine | None) -> Iterator[None]:
    """Leave the engine ready for the next pass, also after an exception."""
    try:
        yield
    except BaseException:
        if engine is not None:
            engine.recover()
        raise


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, to be written into."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_over(group: dist.ProcessGroup | None, tensor: Tensor) -> Tensor:
    """Sum of a tensor over the processes of a group."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def zeros_if_missing(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, zero for what a loss does not depend on."""
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(like, grads, strict=True)]
