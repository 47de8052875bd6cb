"""Losses before the average: one per example, or one per token, for the loss door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100


def per_example_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Losses whose mean is the loss that the Hugging Face heads compute.

    ========================== ================= =============================== ==========
    head                       logits            labels                          losses
    ========================== ================= =============================== ==========
    single-label               ``[B, C]``        integers ``[B]``                ``[B]``
    token classification       ``[B, T, C]``     integers ``[B, T]``             ``[N]``
    multi-label                ``[B, C]``        floats ``[B, C]``               ``[B]``
    regression                 ``[B, 1]``        floats ``[B]`` or ``[B, 1]``    ``[B]``
    ========================== ================= =============================== ==========

    Args:
        logits: Of the model.
        labels: As given to the model. Labels of -100 are left out, N counts the others.
        label_smoothing: Share of the uniform distribution in the targets of classification.

    Raises:
        ValueError: If the shapes fit none of the heads.
    """
    if labels.is_floating_point() and logits.numel() == labels.numel() == len(labels):
        return F.mse_loss(logits.reshape(-1), labels.reshape(-1).to(logits.dtype), reduction="none")
    if labels.is_floating_point() and logits.shape == labels.shape:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").flatten(1).mean(dim=1)
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"No per-example loss is known for logits of shape {list(logits.shape)} and {labels.dtype} labels of shape "
            f"{list(labels.shape)}. Pass `per_example_loss` to the trainer: a function (outputs, labels) -> losses [N]."
        )
    valid = labels != IGNORED  # [B] or [B, T]
    return F.cross_entropy(logits[valid], labels[valid], reduction="none", label_smoothing=label_smoothing)


class PerExampleLoss:
    """Per-example losses of a model's outputs, next-token prediction included.

    Args:
        model: The base model, to know whether its labels are shifted.
        label_smoothing: As in `TrainingArguments.label_smoothing_factor`.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        self.shifts_labels = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        """Losses ``[N]`` of `outputs`, a `ModelOutput`, a dictionary or a tuple that starts with (loss, logits)."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        if self.shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return per_example_losses(logits, labels, self.label_smoothing)

    def examples(self, labels: Tensor) -> Tensor:
        """Row of the batch that each loss belongs to, ``[N]``, for `labels` as given to the model."""
        if labels.is_floating_point():
            return torch.arange(len(labels), device=labels.device)
        if self.shifts_labels:
            labels = labels[:, 1:]
        return (labels != IGNORED).nonzero()[:, 0]

    def classes(self, labels: Tensor) -> Tensor:
        """Class that each loss was computed for, ``[N]``, for integer `labels` as given to the model."""
        if self.shifts_labels:
            labels = labels[:, 1:]
        return labels[labels != IGNORED]


class PerSentenceLoss:
    """One loss a sentence, the mean over its labelled tokens, for meta modules that are to weigh whole sentences.

    Sentences without any label have no loss; a classifier of whole texts keeps its losses.

    Args:
        model: As in `PerExampleLoss`.
        label_smoothing: As in `PerExampleLoss`.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        self.per_token = PerExampleLoss(model, label_smoothing)
        self.shifts_labels = self.per_token.shifts_labels

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        """Losses ``[N]`` of the N sentences among ``labels``, ``[B, T]``, that have a label."""
        losses = self.per_token(outputs, labels)  # [M]
        if labels.dim() != 2 or labels.is_floating_point():
            return losses
        valid = (labels[:, 1:] if self.shifts_labels else labels) != IGNORED  # [B, T]
        counts = valid.sum(dim=1)  # [B]
        sums = losses.new_zeros(len(labels)).index_add(0, valid.nonzero()[:, 0], losses)
        return (sums / counts.clamp(min=1))[counts > 0]

    def examples(self, labels: Tensor) -> Tensor:
        """Row of the batch that each loss belongs to, ``[N]``, for `labels` as given to the model."""
        return self.per_token.examples(labels).unique()


def check_agreement(losses: Tensor, model_loss: Tensor) -> None:
    """Raise a ValueError unless the mean of `losses` is the loss that the model itself computed.

    A head with class weights, a CRF or an auxiliary term would otherwise be trained on another objective than its own.
    """
    mean, own = losses.detach().mean().float(), model_loss.detach().mean().float()
    if not torch.allclose(mean, own, rtol=2e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"The per-example losses average to {mean.item():.4f}, but the model's own loss is "
            f"{own.item():.4f}: its objective is no plain mean. Pass `per_example_loss` to the trainer: a function "
            "(outputs, labels) -> losses [N]."
        )
