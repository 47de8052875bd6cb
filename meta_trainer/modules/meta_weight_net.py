"""Meta-Weight-Net: the weight of an example is a learned function of its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_trainer.modules.checks import check_size
from meta_trainer.modules.meta_module import IS_TRUSTED, LABEL_OF_LOSS, REFERENCE_LOSSES, Batch, MetaModule
from meta_trainer.modules.per_loss import per_loss
from meta_trainer.modules.weighted_mean import weighted_mean

LOSS_INPUTS = ("shared", "unperturbed", "candidate")
SUMMARY_LOSSES = (0.0, 0.5, 1.0, 2.0, 4.0)
WEIGHT_AT_LOSS = "weight_at_loss_"
"""Beginning of the names under which the weights at `SUMMARY_LOSSES` are logged."""


class MetaWeightNet(MetaModule):
    r"""Weigh each example by its own loss, :math:`w_i = \sigma(\mathrm{MLP}(\ell_i))`.

    The objective is :math:`\sum_i w_i \ell_i / \sum_i w_i` over all examples of an optimizer step. The loss that the
    network reads is detached: the base model cannot lower its objective by gaming the weights.

    With `num_classes` the network reads the label as well: each class shifts the hidden layer, by nothing at first.
    Where labels are wrong by rule, some classes are to be trusted and others not, whatever the loss.

    Examples that the column ``is_trusted`` marks have the weight 1, the highest that the network can give. By it a
    model can train on the meta set, too, and what is learned is how much the others count beside it.

    A candidate of an evolutionary estimator has losses :math:`\ell_i(\theta_k)` of its own. Reading those, the
    network's own change along the perturbation would enter the hypergradient, which the exact one-step derivative with
    detached input (T1-T2) does not have. So the network reads the same losses for every candidate.

    Args:
        hidden_size: Width of the hidden layer.
        loss_input: ``"shared"``, the losses of the first candidate for all of them, which are those of the unperturbed
            model up to the size of a perturbation and cost nothing; ``"unperturbed"``, exactly those, for one more
            forward pass in a meta step over all parameters; or ``"candidate"``, each candidate's own losses, as the
            official EvoGrad code does.
        num_classes: Number of classes that labels are of; None for weights by the loss alone.

    Raises:
        ValueError: If `loss_input` is none of the three, or a size is no positive, whole number.

    References:
        Shu et al., `Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting
        <https://arxiv.org/abs/1902.07379>`_, NeurIPS 2019; of weights that know the class, Shu et al., `CMW-Net:
        Learning a Class-Aware Sample Weighting Mapping <https://arxiv.org/abs/2202.05613>`_, TPAMI 2023.
    """

    batch_columns = (IS_TRUSTED,)

    def __init__(self, hidden_size: int = 100, loss_input: str = "shared", num_classes: int | None = None) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        if loss_input not in LOSS_INPUTS:
            raise ValueError(f"`loss_input` should be one of {', '.join(LOSS_INPUTS)}, got {loss_input!r}.")
        self.reference_losses = None if loss_input == "candidate" else loss_input
        self.network = nn.Sequential(nn.Linear(1, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1), nn.Sigmoid())
        self.class_shifts: nn.Parameter | None = None  # [C, H]
        if num_classes is not None:
            check_size("num_classes", num_classes)
            self.class_shifts = nn.Parameter(torch.zeros(num_classes, hidden_size))

    def forward(self, losses: Tensor, classes: Tensor | None = None) -> Tensor:
        """Weights in (0, 1), ``[N]``, of the losses ``[N]`` for labels of the classes ``[N]``; not normalised.

        Raises:
            ValueError: If the shapes are others, or the classes are missing and read, or given and not read.
        """
        if losses.dim() != 1:
            raise ValueError(
                f"MetaWeightNet expects one loss per example, shape [N], got {list(losses.shape)}. "
                "Flatten the losses of tokens, without the ignored ones."
            )
        if (classes is None) != (self.class_shifts is None):
            raise ValueError(
                "MetaWeightNet reads the class of a label exactly where it was made with `num_classes`: got "
                f"{'no classes' if classes is None else 'classes'} of the losses, and num_classes={self.num_classes}."
            )
        inputs = losses.detach().to(next(self.parameters()).dtype)
        hidden = self.network[0](inputs.unsqueeze(1))  # [N, H]
        if self.class_shifts is not None and classes is not None:
            hidden = hidden + self.class_shifts[classes]
        weights: Tensor = self.network[1:](hidden)  # [N, 1]
        return weights.squeeze(1).to(losses.dtype)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that labels are of; None where labels are not read."""
        return None if self.class_shifts is None else len(self.class_shifts)

    def reduce(self, losses: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """Weighted mean of the losses ``[N]``."""
        return weighted_mean(self.example_weights(losses, batch), losses)

    def normalizer(self, losses: Tensor, batch: Batch) -> Tensor:
        """Sum of the weights."""
        return self.example_weights(losses, batch).sum()

    def example_weights(self, losses: Tensor, batch: Batch) -> Tensor:
        """Weights ``[N]`` by the reference losses where the batch holds any; 1 for trusted examples, else in (0, 1)."""
        inputs = batch.get(REFERENCE_LOSSES, losses) if self.reference_losses else losses
        weights: Tensor = self(inputs, None if self.class_shifts is None else self._classes(losses, batch))
        if IS_TRUSTED not in batch:
            return weights
        return torch.where(self._is_trusted(losses, batch), torch.ones_like(weights), weights)

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError when the classes of `model` are not as many as those that are read."""
        num_labels = getattr(getattr(model, "config", None), "num_labels", self.num_classes)
        if self.num_classes not in (None, num_labels):
            raise ValueError(
                f"MetaWeightNet reads labels of num_classes={self.num_classes} classes, but the model has {num_labels}."
            )

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """The weight at a few losses, in the mean over the classes."""
        device = next(self.parameters()).device
        classes = None if self.num_classes is None else torch.arange(self.num_classes, device=device)
        losses = torch.ones(self.num_classes or 1, device=device)
        return {f"{WEIGHT_AT_LOSS}{loss:g}": self(loss * losses, classes).mean() for loss in SUMMARY_LOSSES}

    def _classes(self, losses: Tensor, batch: Batch) -> Tensor:
        """Class of each label, ``[N]``."""
        classes = batch.get(LABEL_OF_LOSS)
        if not isinstance(classes, Tensor) or classes.shape != losses.shape:
            found = "none" if classes is None else f"{list(classes.shape)}"
            raise ValueError(
                f"MetaWeightNet with `num_classes` expects the class of each of {len(losses)} losses as "
                f"`{LABEL_OF_LOSS}`, got {found}. Labels have to be classes, each with a loss of its own."
            )
        return classes

    def _is_trusted(self, losses: Tensor, batch: Batch) -> Tensor:
        """Whether each loss is one of a trusted example, ``[N]``."""
        trusted = batch[IS_TRUSTED].bool()
        return per_loss(trusted, losses, batch, "MetaWeightNet", f"`{IS_TRUSTED}` of shape {list(trusted.shape)}")
