"""What a trained meta module thinks of each training example: its weight, beside its loss and the model's opinion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meta_trainer.hypergrad import preserved_random_state
from meta_trainer.module_modes import in_mode
from meta_trainer.per_example_loss import IGNORED, PerSentenceLoss
from meta_trainer.trainer import MetaTrainer

UNKNOWN = -1
"""Prediction for a label that is no class."""


@dataclass(frozen=True)
class ExampleWeights:
    """Weights of M labels, in the order of the data set: one an example, or one a token.

    Attributes:
        examples: ``[M]``, place in the data set of the example that a label belongs to.
        losses: ``[M]``, loss of each label.
        weights: ``[M]``, learned weight; tokens of a text that has one weight share it. Only ratios matter.
        predictions: ``[M]``, class that the model predicts; -1 where labels are no classes.
    """

    examples: np.ndarray
    losses: np.ndarray
    weights: np.ndarray
    predictions: np.ndarray

    def per_example(self) -> ExampleWeights:
        """Means over the labels of each example that has any, such as the tokens of a text; without a prediction."""
        examples, inverse, counts = np.unique(self.examples, return_inverse=True, return_counts=True)
        losses, weights = (np.bincount(inverse, values) / counts for values in (self.losses, self.weights))
        return ExampleWeights(examples, losses, weights, np.full(len(examples), UNKNOWN))


@torch.no_grad()
def weigh_examples(trainer: MetaTrainer, dataset: Dataset[Any]) -> ExampleWeights:
    """Weigh all examples of a data set by the present meta module and model, in evaluation mode.

    All processes have to take part; each gets the whole result. Nothing of it stays: neither the modes of model and
    meta module nor the random state are other ones afterwards.

    Args:
        trainer: A trainer whose meta module weighs examples.
        dataset: Usually its training set.

    Raises:
        ValueError: If the meta module weighs no examples.
    """
    module = trainer.meta_module
    if module is None or not module.weighs_examples:
        found = "no meta module" if module is None else type(module).__name__
        raise ValueError(f"Expected a meta module with `example_weights`, such as MetaWeightNet, got {found}.")
    gathered = []
    with in_mode(False, trainer.model_wrapped, module), preserved_random_state([trainer.args.device]):
        for batch in _batches_in_order(trainer, dataset):
            columns = _weigh_batch(trainer, dict(trainer._prepare_inputs(batch)))  # [B, T] each
            padded = trainer.accelerator.pad_across_processes(columns, dim=1)
            gathered.append([column.cpu().numpy() for column in trainer.accelerator.gather_for_metrics(padded)])
    start, parts = 0, []
    for mask, *values in gathered:
        valid = mask.astype(bool)
        parts.append([np.nonzero(valid)[0] + start, *(column[valid] for column in values)])
        start += len(valid)
    return ExampleWeights(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def ranking_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has the higher score of a positive and a negative, both drawn at random.

    Args:
        scores: ``[N]``; equal scores count as half.
        positive: ``[N]``, booleans.

    Returns:
        The area under the ROC curve, by the rank statistic of Mann and Whitney; nan unless there are both kinds.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # [N], from 1; equal scores share their mean rank
    num_positive = int(np.sum(positive))
    pairs = num_positive * (len(positive) - num_positive)
    if not pairs:
        return float("nan")
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / pairs)


def _batches_in_order(trainer: MetaTrainer, dataset: Dataset[Any]) -> DataLoader[Any]:
    # The loaders of Trainer may group rows by length, and drop the last ones.
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="weighed")
    loader = DataLoader(
        dataset,
        batch_size=trainer.args.eval_batch_size,
        collate_fn=collate,
        num_workers=trainer.args.dataloader_num_workers,
    )
    prepared: DataLoader[Any] = trainer.accelerator.prepare_data_loader(loader)
    return prepared


def _weigh_batch(trainer: MetaTrainer, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Which places of ``[B, T]`` have a label, and of each label loss, weight and prediction."""
    module, labels = trainer.meta_module, batch["labels"]
    with trainer.compute_loss_context_manager():
        outputs = trainer.model_wrapped(**{k: v for k, v in batch.items() if k not in module.batch_columns})
    losses = trainer.per_example_loss(outputs, labels)  # [N]
    batch = trainer._at_loss_door(trainer.model_wrapped, batch, losses, {})
    weights = module.example_weights(losses, batch)
    if weights is None:
        raise ValueError(f"{type(module).__name__}.example_weights should return weights [N], got None.")
    if isinstance(trainer.per_example_loss, PerSentenceLoss):
        losses = trainer.per_example_loss.per_token(outputs, labels)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
    if getattr(trainer.per_example_loss, "shifts_labels", False):
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = not labels.is_floating_point() and logits.shape[:-1] == labels.shape
    valid = (labels != IGNORED).reshape(len(labels), -1)  # [B, T]
    if labels.is_floating_point():
        valid = valid[:, :1]
    predictions = (
        logits.argmax(dim=-1).reshape(valid.shape) if classes else torch.full_like(valid, UNKNOWN, dtype=torch.long)
    )
    # Padding to the length of another process's batch would make integers of booleans here and not there.
    return valid.long(), _laid_out(losses, valid), _laid_out(weights, valid), predictions


def _laid_out(values: Tensor, valid: Tensor) -> Tensor:
    """Values ``[N]`` at the places ``[B, T]`` of their labels; those of rows with a label at all of their places."""
    rows = valid.any(dim=1)  # [B]
    values = values.detach().float()
    laid_out = torch.zeros(valid.shape, dtype=values.dtype, device=values.device)
    if len(values) == int(valid.sum()):
        laid_out[valid] = values
    elif len(values) == int(rows.sum()):
        laid_out[rows] = values.unsqueeze(1).expand(-1, valid.shape[1])
    else:
        raise ValueError(
            f"Expected one loss for each of {int(valid.sum())} labels, or for each of {int(rows.sum())} examples, got "
            f"{len(values)}."
        )
    return laid_out
