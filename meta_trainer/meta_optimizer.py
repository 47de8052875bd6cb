"""The update of the meta module: its optimizer, schedule, clipping and loss scale, apart from the base model's."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.hypergrad.flat_blocks import inner_product


def create_meta_optimizer(args: MetaTrainingArguments, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Optimizer `args.meta_optim` over the meta-parameters, built as Trainer builds its own."""
    meta_args = copy.copy(args)
    meta_args.optim, meta_args.learning_rate = args.meta_optim, args.meta_learning_rate
    meta_args.optim_args, meta_args.adam_epsilon = None, args.meta_adam_epsilon
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(meta_args)
    optimizer: torch.optim.Optimizer = kind(
        [{"params": list(parameters), "weight_decay": args.meta_weight_decay}], **kwargs
    )
    return optimizer


def create_meta_scheduler(
    args: MetaTrainingArguments, optimizer: torch.optim.Optimizer, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Schedule of the meta learning rate over the meta steps of a run of `num_training_steps` optimizer steps."""
    num_meta_steps = math.ceil(num_training_steps / args.meta_every)
    warmup = args.meta_warmup_steps
    return get_scheduler(
        args.meta_lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=math.ceil(warmup * num_meta_steps) if warmup < 1 else int(warmup),
        num_training_steps=num_meta_steps,
    )


def guarded(grads: Sequence[Tensor], train_grads: Sequence[Tensor], ascent_only: bool) -> tuple[Tensor, ...]:
    r"""Take out of a hypergradient what would change the training objective.

    One inner step gains :math:`\eta \langle \partial\ell_V/\partial\theta, \partial\ell_T/\partial\theta \rangle` on
    the validation loss, the more the larger the training gradient is. So a hypergradient also rewards meta-parameters
    that make training harder, or that make it easy where it can be. Over many steps neither is a gain. Its component
    along :math:`u = \partial\ell_T/\partial\lambda` says how much of that there is.

    Args:
        grads: The hypergradient h.
        train_grads: u, aligned with `grads`.
        ascent_only: Keep the component where the step along :math:`-h` lowers the training objective.
    """
    product, square = inner_product(grads, train_grads), inner_product(train_grads, train_grads)
    share = torch.where(square > 0, product / square, torch.zeros_like(square))
    if ascent_only:
        share = share.clamp(max=0)
    return tuple(grad - share * u for grad, u in zip(grads, train_grads, strict=True))


@torch.no_grad()
def shorten_step(
    parameters: Sequence[Tensor], before: Sequence[Tensor], train_grads: Sequence[Tensor], radius: Tensor
) -> Tensor:
    """Take part of a step back, if all of it would change the training objective too much, to first order.

    Args:
        parameters: The meta-parameters after the step.
        before: Their values before it.
        train_grads: Derivatives of the training objective by them.
        radius: Largest change of the objective.

    Returns:
        The share of the step that is left, at most 1.
    """
    step = [after - start for after, start in zip(parameters, before, strict=True)]
    share = (radius.abs() / inner_product(train_grads, step).abs()).clamp(max=1.0)
    for parameter, start, part in zip(parameters, before, step, strict=True):
        parameter.copy_(torch.where(share < 1, start + share * part, parameter))
    return share


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
