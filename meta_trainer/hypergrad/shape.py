"""The shape of the noise: how large it is for each parameter, and along which known direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.inner_step import InnerStep
from meta_trainer.hypergrad.noise import Guide, Noise
from meta_trainer.hypergrad.sandbox import Sandbox


class Shape:
    r"""Covariance of the noise over :math:`\sigma^2`, a diagonal matrix D.

    Args:
        sandbox: Of theta, at its unperturbed values.
        noise: Kind of noise.
        relative_sigma: D holds the squared root mean square of every tensor.
        inner_step: D holds its rates, relative to a typical one, for ``"optimizer"`` and ``"guided"`` noise.

    Attributes:
        rate: Learning rate of the inner step that :math:`D` is multiplied by; None where :math:`\sigma^2/\tau` is.
        drift: What the inner step does whatever the gradient; None for nothing.
    """

    def __init__(self, sandbox: Sandbox, noise: Noise, relative_sigma: bool, inner_step: InnerStep | None) -> None:
        self._sandbox, self._inner_step = sandbox, inner_step
        self._mean_variance = torch.ones(())
        self._variances: Sequence[Tensor] | None = None
        self.rate: float | Tensor | None = None
        if inner_step is not None and noise != "guided":
            self.rate = inner_step.typical_rate()
        self.drift = None if inner_step is None else inner_step.drift()
        if relative_sigma:
            self._variances, self._mean_variance = _mean_squares(sandbox)
            if self.rate is not None:
                self.rate = _ratio(torch.full_like(self._mean_variance, float(self.rate)), self._mean_variance)
        elif noise == "optimizer" and inner_step is not None and not inner_step.is_uniform:
            self._variances = inner_step.noise_variances()

    def scale(self) -> Callable[[], Iterator[Tensor]] | None:
        """What to multiply blind noise by, as flat blocks at each call; None for 1."""
        variances, blocks = self._variances, self._sandbox.blocks
        return None if variances is None else lambda: (block.sqrt() for block in blocks.spread(variances))

    def offset(self) -> Callable[[], Iterator[Tensor]] | None:
        """The drift, as flat blocks at each call."""
        drift, blocks = self.drift, self._sandbox.blocks
        return None if drift is None else lambda: blocks.flatten(drift)

    def guide(self, gradient: Sequence[Tensor], share: float, train_gradient: Sequence[Tensor] | None) -> Guide:
        r"""The direction :math:`D g / \sqrt{g^T D g}`.

        Args:
            gradient: g, the validation gradient.
            share: Of the variance along it.
            train_gradient: For an inner step that reads it.
        """
        inner_product, blocks = self._sandbox.inner_product, self._sandbox.blocks
        direction: Sequence[Tensor] = gradient
        if self._inner_step is not None and self._inner_step.is_uniform:
            dtype = torch.promote_types(gradient[0].dtype, torch.float32)
            rate = torch.as_tensor(self._inner_step.typical_rate(), dtype=dtype, device=gradient[0].device)
            self.rate = _ratio(rate, self._mean_variance.to(rate))
        elif self._inner_step is not None:
            direction = self._inner_step.precondition(gradient, train_gradient)
            squares = inner_product(gradient, gradient)
            rate = _ratio(inner_product(gradient, direction), squares)
            direction = [_ratio(part, rate) for part in direction]
            self.rate = _ratio(rate, self._mean_variance.to(rate))
        if self._variances is not None:
            direction = [v * part for v, part in zip(self._variances, direction, strict=True)]
        slope = inner_product(gradient, direction)
        factor = _ratio(torch.ones_like(slope), slope.sqrt())
        return Guide(lambda: blocks.flatten(direction), factor, slope.sqrt(), share)


def _mean_squares(sandbox: Sandbox) -> tuple[list[Tensor], Tensor]:
    """Of every tensor, that of all theta for a tensor of zeros; and of all theta."""
    theta = sandbox.problem.theta
    sums = torch.stack([t.detach().to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in theta])
    numbers = torch.tensor([t.numel() for t in theta], device=sums.device)
    sums, numbers = sandbox.over_shards(sums), sandbox.over_shards(numbers)
    overall = sums.sum() / numbers.sum()
    return [torch.where(mean > 0, mean, overall) for mean in sums / numbers], overall


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero over zero is zero: without a gradient there is nowhere to go."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
