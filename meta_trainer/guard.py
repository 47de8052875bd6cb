"""Against the greed of a single inner step: limits to what an update does to the training objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import inner_product


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
