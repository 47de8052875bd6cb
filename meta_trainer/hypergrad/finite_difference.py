"""A central difference along the validation gradient: T1-T2 without second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.checks import is_positive
from meta_trainer.hypergrad.inner_step import GradientDescent, InnerStep
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox


def finite_difference(
    problem: BilevelProblem, lr: float = 1e-3, step_size: float | None = None, *, inner_step: InnerStep | None = None
) -> Hypergradient:
    r"""Hypergradient from the training loss on either side of :math:`\theta`, along the validation gradient.

    With :math:`d = \eta\,\partial\ell_V/\partial\theta` at :math:`\theta` and :math:`r = step\_size / \|d\|`,

    .. math:: \frac{d\ell_V}{d\lambda} \approx \frac{\partial\ell_V}{\partial\lambda} -
              \frac{\partial_\lambda\ell_T(\theta + r d) - \partial_\lambda\ell_T(\theta - r d)}{2 r} .

    Differs from :func:`t1t2` by :math:`O(r^2)`, and by :math:`O(\eta)` since the validation gradient is taken before
    the inner step, which saves the pass that would find it. With an `inner_step`, its expected rates stand for
    :math:`\eta`, and the validation gradient is taken where that step's momentum leads.

    Args:
        problem: The bilevel problem.
        lr: Inner learning rate :math:`\eta`.
        step_size: Norm of the displacement of :math:`\theta`; by default as long as changes the validation loss by a
            thousandth, to first order, and at most 0.01, which is what DARTS takes.
        inner_step: The inner step; None for gradient descent with `lr`.

    Returns:
        The hypergradient, with K = 2: the candidates :math:`\theta \pm r d`, equally weighted; `val_loss` is that
        where the validation gradient was taken.

    Raises:
        ValueError: If a setting is not positive and finite or a loss is not a scalar.

    References:
        Liu et al., `DARTS: Differentiable Architecture Search <https://arxiv.org/abs/1806.09055>`_, ICLR 2019, eq. 8.
    """
    if step_size is not None and not is_positive(step_size):
        raise ValueError(f"`step_size` should be a positive, finite number, got {step_size!r}.")
    step = GradientDescent(lr) if inner_step is None else inner_step
    with Sandbox(problem) as sandbox:
        drift = step.drift()
        validation = sandbox.look_ahead(drift)
        gradients = sandbox.train_gradient() if step.reads_gradient else None
        direction = step.precondition(validation.theta_grad, gradients)
        blocks = sandbox.blocks
        norm = sandbox.inner_product(direction, direction).sqrt()
        slope = sandbox.inner_product(validation.theta_grad, direction)
        length = validation.short_step(slope / norm) if step_size is None else step_size
        # A vanishing gradient has no direction: the difference is then zero over any radius.
        radius = torch.where(norm > 0, length / norm, torch.ones_like(norm))

        sides = _Sides(lambda side: (block * side for block in blocks.flatten(direction)), (radius, -radius))
        losses, meta_grads = sandbox.evaluate_candidates(sides)  # [2]
        coefficients = -0.5 / torch.stack([radius, -radius])  # [2]
        total = sandbox.hypergradient(validation.direct, coefficients, meta_grads)
        train_grads = sandbox.train_grads(meta_grads)
        drift_change = sandbox.slope(validation.theta_grad, drift)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        val_loss=validation.loss,
        train_losses=losses,
        weights=torch.full_like(losses, 0.5),
        scores=torch.stack([radius, -radius]) * slope,
        val_loss_change=coefficients.to(losses) @ losses + drift_change.to(losses),
        train_grads=train_grads,
    )


class _Sides(Sequence[Iterator[Tensor]]):
    """Displacements of several lengths along a direction, computed anew at every access."""

    def __init__(self, along: Callable[[Tensor], Iterator[Tensor]], lengths: Sequence[Tensor]) -> None:
        self._along, self._lengths = along, lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, k: int) -> Iterator[Tensor]:  # type: ignore[override]
        return self._along(self._lengths[k])
