"""T1-T2: the exact derivative through one gradient step, at the price of second derivatives."""

from __future__ import annotations

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
        problem: The bilevel problem. Under data parallelism the inner gradient is that of each replica's own batch.
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
    step = GradientDescent(lr) if inner_step is None else inner_step
    with Sandbox(problem) as sandbox, sdpa_kernel(SDPBackend.MATH):
        sandbox.differentiate_theta(True)
        train_loss = sandbox.train_loss()
        train_grad = sandbox.gradient(train_loss, problem.theta, create_graph=True)
        slopes = [grad.detach() for grad in train_grad]
        displacement = step.displacement(slopes)

        sandbox.move_to(sandbox.blocks.flatten(displacement))
        validation = sandbox.validate()

        # The second derivative is taken where the graph was recorded.
        sandbox.move_back()
        train_grads: tuple[Tensor, ...] = ()
        if problem.with_train_grads:
            train_grads = sandbox.gradient(train_loss, problem.meta_params, retain_graph=True)
        direction = step.precondition(validation.theta_grad, slopes)
        mixed = sandbox.gradient(inner_product(train_grad, direction), problem.meta_params)
        score = inner_product(validation.theta_grad, displacement)
        total = torch._foreach_sub(validation.direct, mixed)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        val_loss=problem.mean(validation.loss),
        train_losses=problem.mean(train_loss.detach()[None]),
        weights=torch.ones_like(train_loss.detach()[None]),
        scores=problem.mean(score[None]),
        val_loss_change=problem.mean(score),
        train_grads=train_grads,
    )
