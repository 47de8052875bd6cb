"""A training loss and its derivatives, summed up over its terms; or those of a quotient of two such sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Derivatives = Sequence[Tensor | None]
"""By a list of tensors; None for no influence, and none at all where nothing was evaluated."""


class TermSum:
    """What the terms of a training loss add up to at one point.

    Attributes:
        values: The sum, or those of numerators and denominators; empty before the first term.
        grads: Derivatives of each value.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.grads: list[Derivatives] = []

    def add(self, values: Sequence[Tensor], grads: Sequence[Derivatives]) -> None:
        """Add a term."""
        values = [value.detach() for value in values]
        if not self.values:
            self.values, self.grads = values, list(grads)
            return
        self.values = [old + new for old, new in zip(self.values, values, strict=True)]
        self.grads = [added(old, new) for old, new in zip(self.grads, grads, strict=True)]


def averaged(
    sums: Sequence[TermSum], mean: Callable[[Tensor], Tensor], num_turns: int
) -> tuple[Tensor, list[Derivatives]]:
    """Training losses ``[K]`` over all replicas, and this replica's part of their derivatives.

    Args:
        sums: One for each of K points, empty for a point that is another replica's.
        mean: Average over the replicas.
        num_turns: Replicas that the points are dealt out to.
    """
    known = next(point.values for point in sums if point.values)
    zeros = [torch.zeros_like(value) for value in known]
    table = torch.stack([torch.stack(point.values or zeros) for point in sums]) * num_turns  # [K, 1 or 2]
    if len(known) == 1:
        return mean(table[:, 0]), [point.grads[0] if point.grads else () for point in sums]
    numerators, denominators = mean(table).unbind(dim=1)
    losses = numerators / denominators  # [K]
    return losses, [
        of_quotient(point.grads, loss, denominator)
        for point, loss, denominator in zip(sums, losses, denominators, strict=True)
    ]


def of_quotient(grads: Sequence[Derivatives], quotient: Tensor, denominator: Tensor) -> Derivatives:
    """Derivatives of a quotient from those of numerator and denominator."""
    if not grads:
        return ()
    return added(scaled(grads[0], 1 / denominator), scaled(grads[1], -quotient / denominator))


def scaled(derivatives: Derivatives, factor: Tensor) -> Derivatives:
    """Times a scalar."""
    return [None if d is None else factor.to(d) * d for d in derivatives]


def added(left: Derivatives, right: Derivatives) -> Derivatives:
    """Element by element; none at all are zeros."""
    if not left or not right:
        return left or right
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]
