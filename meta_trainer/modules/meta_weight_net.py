"""Meta-Weight-Net: the weight of an example is a learned function of its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_trainer.modules.meta_module import UNPERTURBED_LOSSES, Batch, MetaModule


class MetaWeightNet(MetaModule):
    r"""Weigh each example by its own loss, :math:`w_i = \sigma(\mathrm{MLP}(\ell_i))`.

    The objective is :math:`\sum_i w_i \ell_i / \sum_i w_i`. The loss that the network reads is detached: the base model
    cannot lower its objective by gaming the weights.

    A candidate of an evolutionary estimator has losses :math:`\ell_i(\theta_k)` of its own. Reading those, the
    network's own change along the perturbation would enter the hypergradient, which the exact one-step derivative with
    detached input (T1-T2) does not have. So every candidate is weighed by the losses of the unperturbed model.

    Args:
        hidden_size: Width of the hidden layer.
        loss_input: ``"unperturbed"``, or ``"candidate"`` to read each candidate's own losses, as the official EvoGrad
            code does.

    Raises:
        ValueError: If `loss_input` is neither of the two.

    References:
        Shu et al., `Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting
        <https://arxiv.org/abs/1902.07379>`_, NeurIPS 2019.
    """

    def __init__(self, hidden_size: int = 100, loss_input: str = "unperturbed") -> None:
        super().__init__()
        if loss_input not in ("unperturbed", "candidate"):
            raise ValueError(f"`loss_input` should be 'unperturbed' or 'candidate', got {loss_input!r}.")
        self.reads_unperturbed_losses = loss_input == "unperturbed"
        self.network = nn.Sequential(nn.Linear(1, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """Weights in (0, 1), ``[N]``, of the losses ``[N]``; not normalised."""
        if losses.dim() != 1:
            raise ValueError(
                f"MetaWeightNet expects one loss per example, shape [N], got {list(losses.shape)}. "
                "Flatten the losses of tokens, without the ignored ones."
            )
        inputs = losses.detach().to(next(self.parameters()).dtype)
        return self.network(inputs.unsqueeze(1)).squeeze(1).to(losses.dtype)

    def reduce(self, losses: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """Weighted mean of the losses ``[N]``."""
        weights = self(batch.get(UNPERTURBED_LOSSES, losses) if self.reads_unperturbed_losses else losses)  # [N]
        total = weights.sum()
        # A sigmoid can underflow to zero for the whole batch.
        return (weights * losses).sum() / torch.where(total > 0, total, torch.ones_like(total))
