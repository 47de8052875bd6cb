"""Which engine it is that a model runs under."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from meta_trainer.sharding.engine import ShardingEngine
from meta_trainer.sharding.fsdp2 import Fsdp2
from meta_trainer.sharding.zero3 import Zero3


def find_engine(model: nn.Module, wrapped: Any) -> ShardingEngine | None:
    """The engine that spreads the parameters of a model; None where every process has all of them.

    Args:
        model: The base model, unwrapped.
        wrapped: What the base step runs.

    Raises:
        ValueError: If the model is partitioned already, and the engine that knows about it is not there yet.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return Fsdp2(model)
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        if not hasattr(wrapped, "optimizer"):
            raise ValueError("Under DeepSpeed ZeRO-3 a meta step needs the engine that `train` makes. Call that first.")
        return Zero3(wrapped)
    return None
