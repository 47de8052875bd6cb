"""What the meta step asks of an engine that spreads the parameters, and which engine it is that a model runs under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
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


def find_engine(model: nn.Module, wrapped: Any) -> ShardingEngine | None:
    """The engine that spreads the parameters of a model; None where every process has all of them.

    Args:
        model: The base model, unwrapped.
        wrapped: What the base step runs.

    Raises:
        ValueError: If the model is partitioned already, and the engine that knows about it is not there yet.
    """
    # Imported here, as either engine may be missing.
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        from meta_trainer.sharding.fsdp2 import Fsdp2

        return Fsdp2(model)
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        from meta_trainer.sharding.zero3 import Zero3

        if not hasattr(wrapped, "optimizer"):
            raise ValueError("Under DeepSpeed ZeRO-3 a meta step needs the engine that `train` makes. Call that first.")
        return Zero3(wrapped)
    return None


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
