"""The parameters of a model under DeepSpeed ZeRO-3: flat, and cut into pieces of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from meta_trainer.sharding.engine import total_over, zeros_if_missing


class Zero3:
    """ZeRO-3 as a meta step sees it.

    Args:
        engine: DeepSpeed's engine.
    """

    def __init__(self, engine: Any) -> None:
        self._offload = engine.optimizer.parameter_offload

    def refresh(self) -> None:
        """Release what was gathered, also small parameters, which the engine keeps whole."""
        self._offload.release_backward_leftovers()
        self._offload.partition_all_parameters()

    def recover(self) -> None:
        """The engine is ready once everything is released."""
        self.refresh()

    def select(self, parameters: Sequence[nn.Parameter]) -> Zero3Parameters:
        """The shards of some of the parameters."""
        return Zero3Parameters(self, parameters)


class Zero3Parameters:
    """Some of the parameters under ZeRO-3.

    Args:
        engine: The engine.
        parameters: Those, partitioned.
    """

    def __init__(self, engine: Zero3, parameters: Sequence[nn.Parameter]) -> None:
        self._engine, self.parameters = engine, list(parameters)
        self._pieces = [_Piece(parameter) for parameter in self.parameters]
        self.shards = [piece.data for piece in self._pieces]

    @property
    def index(self) -> int:
        """Rank in the group that the parameters are spread over."""
        return self._pieces[0].rank

    def refresh(self) -> None:
        """Forget whole copies."""
        self._engine.refresh()

    def gradient(self, loss: Tensor, meta_params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Reduces and scatters each gradient as soon as it is known, apart from the engine's own buffers."""
        found: list[Tensor | None] = [None] * len(self.parameters)

        def keep(position: int, piece: _Piece) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                found[position] = piece.mean_of(grad)
                # What autograd would keep to the end needs no memory.
                return grad.new_zeros(()).expand(grad.shape)

            return hook

        needed = [(i, p) for i, p in enumerate(self.parameters) if p.requires_grad]
        handles = [p.register_hook(keep(i, self._pieces[i])) for i, p in needed]
        try:
            _, by_meta = _split(loss, [p for _, p in needed], meta_params)
        finally:
            for handle in handles:
                handle.remove()
        return zeros_if_missing(found, self.shards), zeros_if_missing(by_meta, meta_params)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes."""
        return total_over(self._pieces[0].group, tensor)


class _Piece:
    """This process's part of a parameter, without the padding of the last one."""

    def __init__(self, parameter: Any) -> None:
        self.group: dist.ProcessGroup = parameter.ds_process_group
        self.rank, self._number = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._length, self._numel = int(parameter.ds_tensor.ds_numel), int(parameter.ds_numel)
        self._own = max(0, min(self._length, self._numel - self.rank * self._length))
        self.data: Tensor = parameter.ds_tensor.data[: self._own]

    def mean_of(self, whole: Tensor) -> Tensor:
        """This process's part of the average over the processes."""
        padded = whole.new_zeros(self._number * self._length)
        padded[: self._numel] = whole.reshape(-1)
        part = whole.new_empty(self._length)
        dist.reduce_scatter_tensor(part, padded, group=self.group)
        return part[: self._own] / self._number


def _split(
    loss: Tensor, parameters: Sequence[Tensor], meta_params: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    grads = torch.autograd.grad(loss, [*parameters, *meta_params], allow_unused=True)
    return grads[: len(parameters)], grads[len(parameters) :]
