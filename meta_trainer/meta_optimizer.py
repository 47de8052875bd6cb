"""The update of the meta module: its optimizer, schedule, clipping and loss scale, apart from the base model's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from meta_trainer.arguments import MetaTrainingArguments


def create_meta_optimizer(args: MetaTrainingArguments, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Optimizer `args.meta_optim` over the meta-parameters, built as Trainer builds its own."""
    meta_args = copy.copy(args)
    meta_args.optim, meta_args.learning_rate = args.meta_optim, args.meta_learning_rate
    meta_args.optim_args, meta_args.adam_epsilon = None, args.meta_adam_epsilon
    # Read by schedule-free optimizers; the meta schedule has a warm-up of its own.
    meta_args.warmup_steps = 0
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(meta_args)
    optimizer: torch.optim.Optimizer = kind(
        [{"params": list(parameters), "weight_decay": args.meta_weight_decay}], **kwargs
    )
    return optimizer


def first_meta_step(args: MetaTrainingArguments, num_training_steps: int) -> int:
    """The optimizer step, counted from 0, before which the first meta step is taken."""
    return _num_steps(args.meta_delay_steps, num_training_steps)


def create_meta_scheduler(
    args: MetaTrainingArguments, optimizer: torch.optim.Optimizer, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Schedule of the meta learning rate over the meta steps of a run of `num_training_steps` optimizer steps.

    Raises:
        ValueError: If there are none, as the first would come after the end of the run.
    """
    delay = first_meta_step(args, num_training_steps)
    if num_training_steps <= delay:
        raise ValueError(
            f"`meta_delay_steps` should be less than the {num_training_steps} optimizer steps of the run, got "
            f"{args.meta_delay_steps!r}: no meta step would be taken."
        )
    num_meta_steps = math.ceil((num_training_steps - delay) / args.meta_every)
    return get_scheduler(
        args.meta_lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=_num_steps(args.meta_warmup_steps, num_meta_steps),
        num_training_steps=num_meta_steps,
    )


def _num_steps(setting: float, total: int) -> int:
    """Steps that a setting stands for, which is a share of `total` below 1 and a number of them otherwise."""
    return math.ceil(setting * total) if setting < 1 else int(setting)


def apply_hypergradient(
    parameters: Sequence[nn.Parameter],
    grads: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
) -> tuple[Tensor, bool]:
    """Step `optimizer` along a hypergradient, unless it holds a NaN or an infinity.

    Args:
        parameters: The meta-parameters.
        grads: Aligned with `parameters`, equal on all replicas, free of any loss scale.
        optimizer: Of the meta-parameters.
        scaler: Of the meta losses, apart from the base model's; adapts its scale when it is enabled.
        max_grad_norm: Norm to clip to; 0 for no clipping.

    Returns:
        The norm before clipping, and whether the step was taken.
    """
    for parameter, grad in zip(parameters, grads, strict=True):
        # A copy, as clipping works in place.
        parameter.grad = scaler.scale(grad.to(parameter.dtype, copy=True))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    finite = bool(torch.isfinite(norm))
    if finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm.detach(), finite


def all_finite(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters and the state of their optimizer hold no NaN and no infinity."""
    tensors = [*parameters, *_floating(list(optimizer.state.values()))]
    # One number that is not finite makes the sum such a number; a sum may also overflow by itself.
    return _all_true(torch.isfinite(t.detach().sum()) for t in tensors) or _all_true(
        torch.isfinite(t).all() for t in tensors
    )


def _all_true(flags: Iterable[Tensor]) -> bool:
    # Adam counts its steps on the CPU; each other device is waited for once.
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(parts).all()) for parts in by_device.values())


class StepBack:
    """Parameters and the state of their optimizer, to be given back after a step that led to no finite numbers.

    Args:
        parameters: The meta-parameters.
        optimizer: Of the meta-parameters.

    Attributes:
        values: Of the parameters, aligned with them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self.values = [p.detach().clone() for p in parameters]
        self._state = {key: copy.deepcopy(entry) for key, entry in optimizer.state.items()}
        self._groups = [_settings(group) for group in optimizer.param_groups]

    @torch.no_grad()
    def take(self) -> None:
        """Give everything back."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            parameter.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(settings, params=parameters)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _floating(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in nested containers, numbers as tensors among them."""
    if isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _floating(part)
