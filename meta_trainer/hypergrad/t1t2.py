"""T1-T2: the exact derivative through one gradient step, at the price of second derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_trainer.hypergrad.flat_blocks import inner_product
from meta_trainer.hypergrad.inner_step import GradientDescent, InnerStep
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox
from meta_trainer.hypergrad.term_sums import TermSum, added, scaled


def t1t2(problem: BilevelProblem, lr: float = 1e-3, *, inner_step: InnerStep | None = None) -> Hypergradient:
    r"""Hypergradient through one step of gradient descent, or of another inner step.

    With :math:`\theta' = \theta - \eta\,\partial\ell_T/\partial\theta` and :math:`g = \partial\ell_V/\partial\theta` at
    :math:`\theta'`,

    .. math:: \frac{d\ell_V(\theta')}{d\lambda} = \frac{\partial\ell_V}{\partial\lambda}
              - \eta\,\frac{\partial}{\partial\lambda}\Big\langle \frac{\partial\ell_T}{\partial\theta}, g \Big\rangle .

    With an `inner_step`, its exact rates at the training gradient stand for :math:`\eta`.

    The graph of the training gradient is kept over the validation pass: the exact baseline, not a cheap one. The
    training pass runs on the math kernel of scaled dot-product attention, as the fused ones have no second derivative.

    Args:
        problem: The bilevel problem. Under data parallelism both gradients by theta are averaged over the replicas.
        lr: Inner learning rate :math:`\eta`.
        inner_step: The inner step; None for gradient descent with `lr`.

    Returns:
        The hypergradient, with K = 1: `train_losses` holds the loss at :math:`\theta`, and `scores` the change of the
        validation loss that the inner step makes, to first order.

    Raises:
        ValueError: If `lr` is not positive and finite, a loss is not a scalar or theta is sharded.

    References:
        Luketina et al., `Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters
        <https://arxiv.org/abs/1511.06727>`_, ICML 2016.
    """
    if problem.turn != (0, 1):
        raise ValueError(f"t1t2 has no candidates to deal out, so `turn` should be (0, 1), got {problem.turn}.")
    if problem.sharding is not None:
        raise ValueError("t1t2 differentiates twice through whole parameters, but `sharding` spreads them.")
    step = GradientDescent(lr) if inner_step is None else inner_step
    with Sandbox(problem) as sandbox, sdpa_kernel(SDPBackend.MATH):
        sandbox.differentiate_theta(True)
        # The graph of one term is kept over the validation pass; those of several are recorded once more after it.
        recorded = [] if sandbox.has_terms else [next(_inner_gradients(sandbox, create_graph=True))]
        inner = TermSum()
        for parts, gradient in recorded or _inner_gradients(sandbox):
            inner.add(parts, [[part.detach() for part in gradient]])
        numerator, *rest = problem.mean(torch.stack(inner.values))  # [1], or [2] with a denominator
        denominator = rest[0] if rest else torch.ones_like(numerator)
        train_loss = numerator / denominator
        slopes = [problem.mean(part) / denominator.to(part) for part in inner.grads[0] if part is not None]
        displacement = step.displacement(slopes)

        sandbox.move_to(sandbox.blocks.flatten(displacement))
        validation = sandbox.validate()

        # The second derivative is taken where the graph was recorded.
        sandbox.move_back()
        theta_grad = [problem.mean(grad) for grad in validation.theta_grad]
        direction = step.precondition(theta_grad, slopes)
        slope = inner_product(slopes, direction)
        first, second = TermSum(), TermSum()
        for parts, gradient in recorded or _inner_gradients(sandbox, create_graph=True):
            if problem.with_train_grads:
                objective = _share(parts, train_loss, denominator)
                first.add([objective], [sandbox.gradient(objective, problem.meta_params, retain_graph=True)])
            along = _share([inner_product(gradient, direction), *parts[1:]], slope, denominator)
            second.add([along], [sandbox.gradient(along, problem.meta_params)])
        total = added(validation.direct, scaled(second.grads[0], -torch.ones_like(slope)))
        score = inner_product(theta_grad, displacement)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total if grad is not None),
        val_loss=problem.mean(validation.loss),
        train_losses=train_loss[None],
        weights=torch.ones_like(train_loss[None]),
        scores=score[None],
        val_loss_change=score,
        train_grads=tuple(grad for grad in first.grads[0] if grad is not None) if first.grads else (),
    )


def _inner_gradients(
    sandbox: Sandbox, create_graph: bool = False
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Each term of the training loss, and the gradient of its value or numerator by theta."""
    theta = sandbox.problem.theta
    for term in sandbox.train_terms():
        parts = sandbox.train_loss(term)
        for denominator in parts[1:]:
            _check_independent(denominator, theta)
        yield parts, sandbox.gradient(parts[0], theta, create_graph=create_graph)


def _check_independent(denominator: Tensor, theta: Sequence[Tensor]) -> None:
    if denominator.requires_grad:
        grads = torch.autograd.grad(denominator, theta, retain_graph=True, allow_unused=True)
        if any(grad is not None for grad in grads):
            raise ValueError("The denominator of `train_loss` should not depend on theta. Detach what it reads of it.")


def _share(parts: Sequence[Tensor], quotient: Tensor, denominator: Tensor) -> Tensor:
    """What has a quotient's derivative, as the sum over its terms: numerator and denominator of one, if it has one."""
    if len(parts) == 1:
        return parts[0]
    return (parts[0] - quotient * parts[1]) / denominator
