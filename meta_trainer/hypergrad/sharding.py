"""Parameters that are spread over data-parallel replicas, of which each holds and moves a part only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class Sharding(Protocol):
    """How theta is spread: `BilevelProblem.theta` are this replica's shards, some of them possibly empty.

    All replicas list the shards of the same parameters in the same order, and evaluate the same losses in the same
    order.

    Attributes:
        index: Number of this replica's part.
        parameters: What a forward pass records a graph through; their ``requires_grad`` decides.
    """

    @property
    def index(self) -> int:
        """Number of this replica's part."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters behind the shards, whose ``requires_grad`` decides whether a graph is recorded."""

    def refresh(self) -> None:
        """Forget whole copies of the parameters: the next forward pass is to gather the shards as they stand."""

    def gradient(self, loss: Tensor, meta_params: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Gradient of this replica's `loss`, without a trace in any ``.grad`` field.

        Returns:
            That by the shards, averaged over the replicas, and that by the meta-parameters, this replica's own.
        """

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all parts."""


def seed_of_shard(seed: int, index: int) -> int:
    """A seed of each part's own, so that equal places of two parts are not perturbed alike."""
    if index == 0:
        return seed
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)[0] >> 1)
