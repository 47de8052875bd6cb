"""A central difference along the validation gradient: T1-T2 without second derivatives."""

from __future__ import annotations

import torch

from meta_trainer.hypergrad.flat_blocks import inner_product
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox


def finite_difference(problem: BilevelProblem, lr: float = 1e-3, step_size: float = 0.01) -> Hypergradient:
    r"""Hypergradient from the training loss on either side of :math:`\theta`, along the validation gradient.

    With :math:`g = \partial\ell_V/\partial\theta` at :math:`\theta` and :math:`r = step\_size / \|g\|`,

    .. math:: \frac{d\ell_V}{d\lambda} \approx \frac{\partial\ell_V}{\partial\lambda} - \eta\,
              \frac{\partial_\lambda\ell_T(\theta + r g) - \partial_\lambda\ell_T(\theta - r g)}{2 r} .

    Differs from :func:`t1t2` by :math:`O(r^2)`, and by :math:`O(\eta)` since :math:`g` is taken before the inner step,
    which saves the pass that would find it.

    Args:
        problem: The bilevel problem.
        lr: Inner learning rate :math:`\eta`.
        step_size: Norm of the displacement of :math:`\theta`; DARTS takes 0.01.

    Returns:
        The hypergradient, with K = 2: the candidates :math:`\theta \pm r g`, equally weighted.

    Raises:
        ValueError: If a setting is not positive and finite or a loss is not a scalar.

    References:
        Liu et al., `DARTS: Differentiable Architecture Search <https://arxiv.org/abs/1806.09055>`_, ICLR 2019, eq. 8.
    """
    for name, value in (("lr", lr), ("step_size", step_size)):
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` should be a positive, finite number, got {value}.")
    with Sandbox(problem) as sandbox:
        sandbox.differentiate_theta(True)
        val_loss = sandbox.val_loss()
        grads = sandbox.gradient(val_loss, (*problem.theta, *problem.meta_params))
        # Every replica has to move along the same direction, or their differences could not be averaged.
        val_grad, direct = [problem.mean(g) for g in grads[: len(problem.theta)]], grads[len(problem.theta) :]
        blocks = sandbox.blocks
        norm = inner_product(blocks.flatten(val_grad), blocks.flatten(val_grad)).sqrt()
        # A vanishing gradient has no direction: the difference is then zero over any radius.
        radius = torch.where(norm > 0, step_size / norm, torch.ones_like(norm))

        sandbox.differentiate_theta(False)
        losses, meta_grads = [], []
        for side in (radius, -radius):
            sandbox.move_to(block * side for block in blocks.flatten(val_grad))
            loss = sandbox.train_loss()
            meta_grads.append(sandbox.meta_gradient(loss))
            losses.append(loss.detach())
            del loss  # and its graph, before the next one
        sides = torch.stack([radius, -radius])  # [2]
        total = sandbox.hypergradient(direct, -lr / (2 * sides), meta_grads)
        scores = sides * norm.square()  # [2]
    train_losses = problem.mean(torch.stack(losses))  # [2]
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        val_loss=problem.mean(val_loss.detach()),
        train_losses=train_losses,
        weights=torch.full_like(train_losses, 0.5),
        scores=scores,
    )
