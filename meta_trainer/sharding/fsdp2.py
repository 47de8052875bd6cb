"""The parameters of a model under FSDP2: DTensors, of which every process holds a chunk of the first dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meta_trainer.sharding.engine import total_over, zeros_if_missing


class Fsdp2:
    """FSDP2 as a meta step sees it.

    Args:
        model: To whose submodules and which itself `fully_shard` was applied.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # FSDP2 sets itself up in its first forward pass, and takes what is frozen then for frozen for good.
        self._model._get_fsdp_state()._lazy_init()
        self._groups = [group for unit in self._units for group in _groups(unit)]

    def refresh(self) -> None:
        """Reshard, also the outermost unit, which keeps its whole parameters after a forward pass."""
        for unit in self._units:
            unit.reshard()

    def recover(self) -> None:
        """Let no unit believe that it is still in its forward or backward pass."""
        # Older releases of PyTorch have no way to.
        if hasattr(self._model, "reset_iter_state"):
            self._model.reset_iter_state()

    def select(self, parameters: Sequence[nn.Parameter]) -> Fsdp2Parameters:
        """The shards of some of the parameters.

        Raises:
            ValueError: If gradients of earlier micro-batches wait to be averaged, which a backward pass would add to.
        """
        if any(_waits(p) for group in self._groups for p in group.fsdp_params):
            raise ValueError(
                "Under FSDP2 a meta step should come before the first micro-batch of an optimizer step, but gradients "
                "of earlier ones wait to be averaged. Call `meta_step` between optimizer steps."
            )
        return Fsdp2Parameters(self, parameters)

    @contextmanager
    def reducing_gradients(self) -> Iterator[None]:
        """Average gradients over the processes, also where the base step is to do so later."""
        found = [(group, group.reduce_grads, group.all_reduce_grads) for group in self._groups]
        self._model.set_requires_gradient_sync(True)
        try:
            yield
        finally:
            for group, reduce_grads, all_reduce_grads in found:
                group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads


class Fsdp2Parameters:
    """Some of the parameters under FSDP2.

    Args:
        engine: The engine.
        parameters: Those.
    """

    def __init__(self, engine: Fsdp2, parameters: Sequence[nn.Parameter]) -> None:
        self._engine, self.parameters = engine, list(parameters)
        self._group: dist.ProcessGroup = _as_sharded(self.parameters[0]).device_mesh.get_group()
        self.shards = [_as_sharded(p).to_local().detach() for p in self.parameters]

    @property
    def index(self) -> int:
        """Rank in the group that the parameters are spread over."""
        return dist.get_rank(self._group)

    def refresh(self) -> None:
        """Forget whole copies."""
        self._engine.refresh()

    def gradient(self, loss: Tensor, meta_params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """By the engine's own backward pass, which reduces and scatters; ``.grad`` fields are put aside for it."""
        leaves: list[Tensor] = [*self.parameters, *meta_params]
        aside = [leaf.grad for leaf in leaves]
        try:
            for leaf in leaves:
                leaf.grad = None
            with self._engine.reducing_gradients():
                loss.backward()
            found = [leaf.grad for leaf in leaves]
        finally:
            for leaf, grad in zip(leaves, aside, strict=True):
                leaf.grad = grad
        number = len(self.parameters)
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found[:number]]
        return zeros_if_missing(local, self.shards), zeros_if_missing(found[number:], meta_params)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes."""
        return total_over(self._group, tensor)


def _groups(unit: Any) -> list[Any]:
    """The parameter groups of a unit, of which older releases of PyTorch have one at most."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _waits(parameter: Any) -> bool:
    """Whether a gradient of the whole parameter was kept by a backward pass that averages none."""
    whole = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)


def _as_sharded(parameter: Tensor) -> DTensor:
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
        raise NotImplementedError(
            "Under FSDP2 every parameter that a meta step perturbs should be spread over one dimension of processes, "
            f"but one is a {type(parameter).__name__}. Replication, tensor parallelism and ignored parameters are not "
            "supported."
        )
    return parameter
