"""Meta-Weight-Net: the weight of an example is a learned function of its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_trainer.modules.checks import check_size
from meta_trainer.modules.meta_module import REFERENCE_LOSSES, Batch, MetaModule
from meta_trainer.modules.weighted_mean import weighted_mean

LOSS_INPUTS = ("shared", "unperturbed", "candidate")
SUMMARY_LOSSES = (0.0, 0.5, 1.0, 2.0, 4.0)
WEIGHT_AT_LOSS = "weight_at_loss_"
"""Beginning of the names under which the weights at `SUMMARY_LOSSES` are logged."""


class MetaWeightNet(MetaModule):
    r"""Weigh each example by its own loss, :math:`w_i = \sigma(\mathrm{MLP}(\ell_i))`.

    The objective is :math:`\sum_i w_i \ell_i / \sum_i w_i` over all examples of an optimizer step. The loss that the
    network reads is detached: the base model cannot lower its objective by gaming the weights.

    A candidate of an evolutionary estimator has losses :math:`\ell_i(\theta_k)` of its own. Reading those, the
    network's own change along the perturbation would enter the hypergradient, which the exact one-step derivative with
    detached input (T1-T2) does not have. So the network reads the same losses for every candidate.

    Args:
        hidden_size: Width of the hidden layer.
        loss_input: ``"shared"``, the losses of the first candidate for all of them, which are those of the unperturbed
            model up to the size of a perturbation and cost nothing; ``"unperturbed"``, exactly those, for one more
            forward pass in a meta step over all parameters; or ``"candidate"``, each candidate's own losses, as the
            official EvoGrad code does.

    Raises:
        ValueError: If `loss_input` is none of the three, or `hidden_size` no positive, whole number.

    References:
        Shu et al., `Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting
        <https://arxiv.org/abs/1902.07379>`_, NeurIPS 2019.
    """

    def __init__(self, hidden_size: int = 100, loss_input: str = "shared") -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        if loss_input not in LOSS_INPUTS:
            raise ValueError(f"`loss_input` should be one of {', '.join(LOSS_INPUTS)}, got {loss_input!r}.")
        self.reference_losses = None if loss_input == "candidate" else loss_input
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
        return weighted_mean(self.example_weights(losses, batch), losses)

    def normalizer(self, losses: Tensor, batch: Batch) -> Tensor:
        """Sum of the weights."""
        return self.example_weights(losses, batch).sum()

    def example_weights(self, losses: Tensor, batch: Batch) -> Tensor:
        """Weights in (0, 1), ``[N]``, by the reference losses where the batch holds any."""
        weights: Tensor = self(batch.get(REFERENCE_LOSSES, losses) if self.reference_losses else losses)  # [N]
        return weights

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """The weight at a few losses."""
        losses = torch.tensor(SUMMARY_LOSSES, device=next(self.parameters()).device)
        return {f"{WEIGHT_AT_LOSS}{loss:g}": w for loss, w in zip(SUMMARY_LOSSES, self(losses), strict=True)}
