"""T1-T2: the exact derivative through one gradient step, at the price of second derivatives."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_trainer.hypergrad.flat_blocks import inner_product
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox


def t1t2(problem: BilevelProblem, lr: float = 1e-3) -> Hypergradient:
    r"""Hypergradient through one step of gradient descent.

    With :math:`\theta' = \theta - \eta\,\partial\ell_T/\partial\theta` and :math:`g = \partial\ell_V/\partial\theta` at
    :math:`\theta'`,

    .. math:: \frac{d\ell_V(\theta')}{d\lambda} = \frac{\partial\ell_V}{\partial\lambda}
              - \eta\,\frac{\partial}{\partial\lambda}\Big\langle \frac{\partial\ell_T}{\partial\theta}, g \Big\rangle .

    The graph of the training gradient is kept over the validation pass: the exact baseline, not a cheap one. The
    training pass runs on the math kernel of scaled dot-product attention, as the fused ones have no second derivative.

    Args:
        problem: The bilevel problem. Under data parallelism the inner gradient is that of each replica's own batch.
        lr: Inner learning rate :math:`\eta`.

    Returns:
        The hypergradient, with K = 1: `train_losses` holds the loss at :math:`\theta`, and `scores` the change of the
        validation loss that the inner step makes, to first order.

    Raises:
        ValueError: If `lr` is not positive and finite or a loss is not a scalar.

    References:
        Luketina et al., `Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters
        <https://arxiv.org/abs/1511.06727>`_, ICML 2016.
    """
    if not 0 < lr < float("inf"):
        raise ValueError(f"`lr` should be a positive, finite number, got {lr}.")
    with Sandbox(problem) as sandbox, sdpa_kernel(SDPBackend.MATH):
        sandbox.differentiate_theta(True)
        train_loss = sandbox.train_loss()
        train_grad = sandbox.gradient(train_loss, problem.theta, create_graph=True)
        step = torch._foreach_mul([grad.detach() for grad in train_grad], -lr)

        sandbox.move_to(sandbox.blocks.flatten(step))
        val_loss = sandbox.val_loss()
        grads = sandbox.gradient(val_loss, (*problem.theta, *problem.meta_params))
        val_grad, direct = grads[: len(problem.theta)], grads[len(problem.theta) :]

        # The second derivative is taken where the graph was recorded.
        sandbox.move_back()
        mixed = sandbox.gradient(inner_product(train_grad, val_grad), problem.meta_params)
        score = inner_product(val_grad, step)
        total = torch._foreach_add(direct, mixed, alpha=-lr)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        val_loss=problem.mean(val_loss.detach()),
        train_losses=problem.mean(train_loss.detach()[None]),
        weights=torch.ones_like(train_loss.detach()[None]),
        scores=problem.mean(score[None]),
    )
