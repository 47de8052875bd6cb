"""From the training arguments to a hypergradient: which estimator, with which settings, for which inner step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.hypergrad import (
    BilevelProblem,
    GradientDescent,
    Hypergradient,
    InnerStep,
    NormalizedDescent,
    OptimizerStep,
    evograd,
    finite_difference,
    t1t2,
)

logger = logging.get_logger(__name__)

MIXED_PRECISION_LENGTH = 1e-2
"""Of a directed perturbation where the passes are of half precision, which does not resolve a shorter one: DARTS'."""


def estimate(
    problem: BilevelProblem, args: MetaTrainingArguments, optimizer: torch.optim.Optimizer | None, seed: int
) -> Hypergradient:
    """Hypergradient of `problem` by the estimator that `args` name.

    Args:
        problem: The bilevel problem.
        args: The settings.
        optimizer: Of the base model, or None before there is one.
        seed: Of the perturbations.
    """
    inner_step = _inner_step(args, optimizer, problem.theta)
    if args.hypergradient == "t1t2":
        return t1t2(problem, inner_step=inner_step)
    length = MIXED_PRECISION_LENGTH if args.bf16 or args.fp16 else None
    if args.hypergradient == "finite_difference":
        return finite_difference(problem, step_size=length, inner_step=inner_step)
    return evograd(
        problem,
        args.num_candidates,
        args.sigma or length,
        args.temperature,
        args.noise,
        seed,
        antithetic=args.antithetic,
        orthogonal=args.orthogonal,
        include_unperturbed=args.include_unperturbed,
        relative_sigma=args.relative_sigma,
        guidance=args.guidance,
        inner_step=inner_step,
    )


def check_base_optimizer(args: MetaTrainingArguments, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError if the inner step should be the base optimizer's, and that is of a kind it is not known for.

    Args:
        args: The settings, which name an optimizer.
        optimizer: The optimizer itself, where it is already there.
    """
    if args.follows_optimizer:
        kind = type(_unwrapped(optimizer)) if optimizer is not None else Trainer.get_optimizer_cls_and_kwargs(args)[0]
        OptimizerStep.check_kind(kind)


def check_precision(args: MetaTrainingArguments, theta: Sequence[Tensor]) -> None:
    """Warn where the parameters themselves are too coarse for a perturbation along a direction."""
    coarse = {str(t.dtype) for t in theta if t.dtype in (torch.bfloat16, torch.float16)}
    if coarse and not args.is_blind and args.hypergradient != "t1t2":
        logger.warning(
            f"Parameters of {', '.join(sorted(coarse))} round most of a short perturbation away: hypergradients "
            "along a direction are then noise. Keep the parameters in float32, with bf16=True for the passes, or "
            "choose noise='sign'."
        )


def _inner_step(
    args: MetaTrainingArguments, optimizer: torch.optim.Optimizer | None, theta: Sequence[Tensor]
) -> InnerStep | None:
    if args.follows_optimizer and optimizer is not None:
        optimizer = _unwrapped(optimizer)
        # Adam's first step is the sign of the gradient, which has no derivative.
        if any(optimizer.state.get(t) for t in theta):
            # Trainer does not clip to a norm of zero or less.
            return OptimizerStep(optimizer, theta, max(args.max_grad_norm or 0.0, 0.0))
    if args.inner_step == "normalized":
        return NormalizedDescent(args.learning_rate)
    return GradientDescent(args.learning_rate) if args.scales_hypergradient else None


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
