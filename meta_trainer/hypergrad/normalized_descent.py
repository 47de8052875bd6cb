"""An inner step of a given length: what counts is where the training gradient points, and not how long it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import inner_product
from meta_trainer.hypergrad.inner_step import GradientDescent


@dataclass(frozen=True)
class NormalizedDescent(GradientDescent):
    r"""A step along the training gradient :math:`g_T`, of the length :math:`\eta` whatever the gradient's.

    .. math:: u = -\eta\,\frac{g_T}{\|g_T\|},\qquad
              D = \frac{\eta}{\|g_T\|}\Big(I - \frac{g_T g_T^\top}{\|g_T\|^2}\Big) .

    A plain step gains :math:`\eta \langle g_V, g_T \rangle` on the validation loss, the more the longer the training
    gradient is. So its hypergradient also rewards meta-parameters for making training harder, such as weights that
    rise with the loss, and over many steps that is no gain. The rates D take out of :math:`g_V` what lies along
    :math:`g_T`: lengthening the step has no reward, turning it has.

    Attributes:
        lr: Length :math:`\eta` of the step, in units of the parameters.

    Raises:
        ValueError: If `lr` is not positive and finite.
    """

    @property
    def is_uniform(self) -> bool:
        """The rate along the gradient is zero."""
        return False

    @property
    def reads_gradient(self) -> bool:
        """They are those at one training gradient."""
        return True

    def displacement(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Minus the gradients, made as long as the step."""
        rate = self._rate(gradients)
        return [gradient * -rate for gradient in gradients]

    def precondition(self, vector: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The part of the vector across the training gradients, times the rate; these are needed."""
        if gradients is None:
            raise ValueError("The rates of a step of given length need the training gradient, got none.")
        square = inner_product(gradients, gradients)
        along = inner_product(gradients, vector)
        share = torch.where(square > 0, along / square, torch.zeros_like(square))
        rate = self._rate(gradients)
        return [(part - share * gradient) * rate for part, gradient in zip(vector, gradients, strict=True)]

    def _rate(self, gradients: Sequence[Tensor]) -> Tensor:
        norm = inner_product(gradients, gradients).sqrt()
        return torch.where(norm > 0, self.lr / norm, torch.zeros_like(norm))
