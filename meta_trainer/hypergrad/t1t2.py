"""T1-T2: the exact derivative through one gradient step, at the price of second derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_trainer.hypergrad.flat_blocks import inner_product
from meta_trainer.hypergrad.inner_step import GradientDescent, InnerStep
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox


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
        ValueError: If `lr` is not positive and finite or a loss is not a scalar.

    References:
        Luketina et al., `Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters
        <https://arxiv.org/abs/1511.06727>`_, ICML 2016.
    """
    if problem.turn != (0, 1):
        raise ValueError(f"t1t2 has no candidates to deal out, so `turn` should be (0, 1), got {problem.turn}.")
    step = GradientDescent(lr) if inner_step is None else inner_step
    with Sandbox(problem) as sandbox, sdpa_kernel(SDPBackend.MATH):
        sandbox.differentiate_theta(True)
        # The graph of one term is kept over the validation pass; those of several are recorded once more after it.
        recorded = [] if sandbox.has_terms else [next(_inner_gradients(sandbox, create_graph=True))]
        train_loss, local_slopes = _added_up(recorded or _inner_gradients(sandbox))
        slopes = [problem.mean(slope) for slope in local_slopes]
        displacement = step.displacement(slopes)

        sandbox.move_to(sandbox.blocks.flatten(displacement))
        validation = sandbox.validate()

        # The second derivative is taken where the graph was recorded.
        sandbox.move_back()
        theta_grad = [problem.mean(grad) for grad in validation.theta_grad]
        direction = step.precondition(theta_grad, slopes)
        total, train_grads = validation.direct, tuple(torch.zeros_like(t) for t in problem.meta_params)
        for loss, gradient in recorded or _inner_gradients(sandbox, create_graph=True):
            if problem.with_train_grads:
                first = sandbox.gradient(loss, problem.meta_params, retain_graph=True)
                train_grads = tuple(torch._foreach_add(train_grads, first))
            mixed = sandbox.gradient(inner_product(gradient, direction), problem.meta_params)
            total = torch._foreach_sub(total, mixed)
        score = inner_product(theta_grad, displacement)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        val_loss=problem.mean(validation.loss),
        train_losses=problem.mean(train_loss[None]),
        weights=torch.ones_like(train_loss[None]),
        scores=score[None],
        val_loss_change=score,
        train_grads=train_grads if problem.with_train_grads else (),
    )


def _inner_gradients(sandbox: Sandbox, create_graph: bool = False) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Each term of the training loss, and its gradient by theta."""
    for term in sandbox.train_terms():
        loss = sandbox.train_loss(term)
        yield loss, sandbox.gradient(loss, sandbox.problem.theta, create_graph=create_graph)


def _added_up(terms: Iterable[tuple[Tensor, tuple[Tensor, ...]]]) -> tuple[Tensor, list[Tensor]]:
    """Sums of losses and of gradients, without their graphs."""
    total = torch.zeros(())
    slopes: list[Tensor] = []
    for loss, gradient in terms:
        total = loss.detach() + total.to(loss)
        parts = [part.detach() for part in gradient]
        slopes = [so_far + part for so_far, part in zip(slopes, parts, strict=True)] if slopes else parts
    return total, slopes
