r"""The inner step whose hypergradient is estimated: plain gradient descent, or the base optimizer's own next step.

An inner step moves the parameters by what the training gradient says, :math:`\theta' = \theta +
u(\partial\ell_T/\partial\theta)`. Its hypergradient is :math:`-\partial_\lambda \langle \partial\ell_T/\partial\theta,
D\,\partial\ell_V/\partial\theta \rangle` with the *rates* :math:`D = -\partial u`. Here they are diagonal: the learning
rate for gradient descent, adapted ones for Adam. A step of given length is in `normalized_descent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from meta_trainer.hypergrad.checks import is_positive
from meta_trainer.hypergrad.flat_blocks import inner_product


class InnerStep(Protocol):
    """What an estimator asks of an inner step; lists of tensors are aligned with theta."""

    @property
    def is_uniform(self) -> bool:
        """Whether all rates are equal and known."""

    @property
    def reads_gradient(self) -> bool:
        """Whether :meth:`precondition` needs the training gradient, which takes a pass of its own."""

    def displacement(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The update u for `gradients` of the training loss."""

    def drift(self) -> list[Tensor] | None:
        """The update for a gradient of zero, known beforehand: momentum and weight decay; None for no update."""

    def precondition(self, vector: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Multiply a vector by the rates.

        Args:
            vector: The vector.
            gradients: Of the training loss, where the rates are taken; None while they are not known: they are then
                expected to be as large as in the past, and no smaller than those in `vector`.
        """

    def noise_variances(self) -> list[Tensor]:
        """Expected rates, relative to :meth:`typical_rate`; not asked for where they are uniform."""

    def typical_rate(self) -> float | Tensor:
        """Mean of the expected rates, weighted by the expected squared gradients."""


@dataclass(frozen=True)
class GradientDescent:
    r"""A step of gradient descent, :math:`u = -\eta\,\partial\ell_T/\partial\theta`.

    Attributes:
        lr: Learning rate :math:`\eta`.

    Raises:
        ValueError: If `lr` is not positive and finite.
    """

    lr: float

    def __post_init__(self) -> None:
        """Check the learning rate."""
        if not is_positive(self.lr):
            raise ValueError(f"`lr` should be a positive, finite number, got {self.lr!r}.")

    @property
    def is_uniform(self) -> bool:
        """They are."""
        return True

    @property
    def reads_gradient(self) -> bool:
        """They are known beforehand."""
        return False

    def displacement(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Minus the gradients, times the learning rate."""
        return [gradient * -self.lr for gradient in gradients]

    def drift(self) -> None:
        """There is none."""

    def precondition(self, vector: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The vector, times the learning rate."""
        return [part * self.lr for part in vector]

    def noise_variances(self) -> list[Tensor]:
        """All rates are equal: there is nothing to give."""
        return []

    def typical_rate(self) -> float:
        """The learning rate."""
        return self.lr


class OptimizerStep:
    r"""The next step of an optimizer, from its live state: what the real base step is going to do.

    Supported are SGD, Adam and AdamW of `torch.optim`. For Adam with moments m and v,

    .. math:: u = -\eta\,\frac{m'/b_1}{\sqrt{v'/b_2} + \epsilon},\quad m' = \beta_1 m + (1 - \beta_1) g,\quad
              v' = \beta_2 v + (1 - \beta_2) g^2,\quad b_i = 1 - \beta_i^t ,

    and the rates are the exact derivatives of u by g. While g is not known, the expected ones leave out the derivative
    through v', whose sign is open; they are zero for parameters that have never had a gradient.

    Args:
        optimizer: The optimizer of the base model.
        theta: The tensors that the inner step moves.
        max_grad_norm: Norm to which gradients are clipped before the step, as a factor that is held constant; 0 for no
            clipping.

    Raises:
        ValueError: If the optimizer is of another kind, or does not hold a tensor of `theta`.

    References:
        Choe et al., `Making Scalable Meta Learning Practical <https://arxiv.org/abs/2310.05674>`_, NeurIPS 2023, call
        this the algorithmic adaptation.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, theta: Sequence[Tensor], max_grad_norm: float = 0.0) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(t) not in groups for t in theta)
        if missing:
            raise ValueError(
                f"The optimizer should hold every tensor of theta, but {missing} of {len(theta)} are not among its "
                "parameters. Narrow the scope to what is trained."
            )
        if not max_grad_norm >= 0:
            raise ValueError(f"`max_grad_norm` should be zero or a positive number, got {max_grad_norm}.")
        rule = _rule_of(type(optimizer))
        self._theta = [t.detach() for t in theta]
        self._rules = [rule(t, groups[id(t)], optimizer.state.get(t, {})) for t in theta]
        self._max_grad_norm = max_grad_norm

    @property
    def is_uniform(self) -> bool:
        """They may differ."""
        return False

    @property
    def reads_gradient(self) -> bool:
        """Expected rates do without."""
        return False

    @staticmethod
    def check_kind(kind: type[torch.optim.Optimizer]) -> None:
        """Raise ValueError if optimizers of this kind are not supported."""
        _rule_of(kind)

    def displacement(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The update for these gradients, weight decay included."""
        clipped, _ = self._clip(gradients)
        return [rule.displacement(g) for rule, g in zip(self._rules, clipped, strict=True)]

    def drift(self) -> list[Tensor]:
        """The update for a gradient of zero."""
        return [rule.displacement(torch.zeros_like(t)) for rule, t in zip(self._rules, self._theta, strict=True)]

    def precondition(self, vector: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The vector, times the rates."""
        clipped, factor = self._clip(vector if gradients is None else gradients)
        triples = zip(self._rules, vector, clipped, strict=True)
        if gradients is None:
            return [part * rule.expected_rate(g) * factor for rule, part, g in triples]
        return [part * rule.rate(g) * factor for rule, part, g in triples]

    def noise_variances(self) -> list[Tensor]:
        """Expected rates over the typical one: noise of such variances changes the loss as much as plain noise."""
        typical = self.typical_rate()
        rates = [rule.expected_rate() for rule in self._rules]
        # At the end of a schedule the learning rate is zero.
        return [torch.where(typical > 0, rate / typical, torch.ones_like(rate)) for rate in rates]

    def typical_rate(self) -> Tensor:
        """Mean of the expected rates, weighted by the expected squared gradients."""
        squares = [rule.expected_square() for rule in self._rules]
        total = torch.stack([square.sum() for square in squares]).sum()
        rates = inner_product([rule.expected_rate() for rule in self._rules], squares)
        return torch.where(total > 0, rates / total, torch.zeros_like(total))

    def _clip(self, gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], float | Tensor]:
        if not self._max_grad_norm:
            return gradients, 1.0
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return [g * factor for g in gradients], factor


class _Rule(Protocol):
    """The update of one tensor."""

    def __init__(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None: ...

    def displacement(self, gradient: Tensor) -> Tensor: ...

    def rate(self, gradient: Tensor) -> Tensor: ...

    def expected_rate(self, magnitude: Tensor | None = None) -> Tensor: ...

    def expected_square(self) -> Tensor: ...


class _SGDRule:
    def __init__(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        _refuse(group, "maximize")
        self._parameter, self._decay, self._lr = parameter, group["weight_decay"], group["lr"]
        momentum, buffer = group["momentum"], state.get("momentum_buffer")
        # The first step puts the whole gradient into the buffer.
        fresh = 1.0 if buffer is None else 1.0 - group["dampening"]
        old = torch.zeros_like(parameter) if buffer is None else momentum * buffer
        # Nesterov's rule goes along the gradient and, once more, along the new buffer.
        self._share = (1.0 + momentum * fresh) if group["nesterov"] else (fresh if momentum else 1.0)
        self._drift = momentum * old if group["nesterov"] else old

    def displacement(self, gradient: Tensor) -> Tensor:
        gradient = gradient + self._decay * self._parameter.detach()
        return -self._lr * (self._share * gradient + self._drift)

    def rate(self, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, self._lr * self._share)

    def expected_rate(self, magnitude: Tensor | None = None) -> Tensor:
        return self.rate(self._parameter.detach())

    def expected_square(self) -> Tensor:
        return torch.ones_like(self._parameter)


class _AdamRule:
    def __init__(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        _refuse(group, "maximize", "amsgrad")
        self._parameter, self._lr, self._eps = parameter, group["lr"], group["eps"]
        self._beta1, self._beta2 = group["betas"]
        decay, decoupled = float(group["weight_decay"]), bool(group.get("decoupled_weight_decay"))
        self._decay, self._coupled_decay = decay * decoupled, decay * (not decoupled)
        zeros = torch.zeros_like(parameter)
        self._mean, self._square = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
        # In single precision, 1 - 0.999^t would lose its digits.
        past = torch.as_tensor(state.get("step", 0.0), dtype=torch.float64, device=parameter.device)
        corrections = [1 - self._beta1 ** (past + 1), 1 - self._beta2 ** (past + 1), 1 - self._beta2**past]
        # A scalar of another type would turn the scalars among the parameters into that type.
        self._correction1, self._correction2, last = (c.to(parameter.dtype) for c in corrections)
        self._last_correction2 = torch.where(last > 0, last, torch.ones_like(last))

    def displacement(self, gradient: Tensor) -> Tensor:
        mean, root, _ = self._moments(gradient)
        return -self._lr * (mean / (root + self._eps) + self._decay * self._parameter.detach())

    def rate(self, gradient: Tensor) -> Tensor:
        mean, root, gradient = self._moments(gradient)
        direct = (1 - self._beta1) / self._correction1 / (root + self._eps)
        # Where the root vanishes, so does the gradient.
        slope = (1 - self._beta2) / self._correction2 * gradient / root.clamp(min=torch.finfo(root.dtype).tiny)
        return self._lr * (direct - mean * slope / (root + self._eps).square())

    def expected_rate(self, magnitude: Tensor | None = None) -> Tensor:
        square = self.expected_square()
        if magnitude is not None:
            square = torch.maximum(square, magnitude.square())
        root = ((self._beta2 * self._square + (1 - self._beta2) * square) / self._correction2).sqrt()
        rate = self._lr * (1 - self._beta1) / self._correction1 / (root + self._eps)
        return torch.where(self._square > 0, rate, torch.zeros_like(rate))

    def expected_square(self) -> Tensor:
        return self._square / self._last_correction2

    def _moments(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = gradient + self._coupled_decay * self._parameter.detach()
        mean = (self._beta1 * self._mean + (1 - self._beta1) * gradient) / self._correction1
        square = (self._beta2 * self._square + (1 - self._beta2) * gradient.square()) / self._correction2
        return mean, square.sqrt(), gradient


def _rule_of(kind: type[torch.optim.Optimizer]) -> type[_Rule]:
    if issubclass(kind, torch.optim.Adam):  # AdamW is one
        return _AdamRule
    if issubclass(kind, torch.optim.SGD):
        return _SGDRule
    raise ValueError(
        f"The inner step of {kind.__name__} is not known; those of SGD, Adam and AdamW of torch.optim are. "
        "Choose one of these as base optimizer, or plain gradient descent as inner step."
    )


def _refuse(group: dict[str, Any], *options: str) -> None:
    for option in options:
        if group.get(option):
            raise ValueError(f"The inner step of an optimizer with {option}=True is not known. Switch it off.")
