"""The quotient that modules with learned weights take their losses to."""

import torch
from torch import Tensor


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """Mean of the losses ``[N]`` under weights ``[N]`` of any scale; zero where all weights are zero.

    Weights that a network learns can underflow to zero for a whole batch.
    """
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total > 0, total, torch.ones_like(total))
