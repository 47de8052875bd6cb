"""Scores of a language model, without its logits: for each token a loss, and whether it was predicted."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from meta_trainer.per_example_loss import IGNORED


def token_scores(logits: Any, labels: Tensor) -> Tensor:
    """Losses of the tokens, and whether each was the likeliest, ``[B, T - 1, 2]``, from logits ``[B, T, V]``.

    Handed to a trainer as `preprocess_logits_for_metrics`: the logits of an evaluation set would fill the memory.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return torch.stack([losses, (logits.argmax(dim=-1) == labels).float()], dim=-1)


def language_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Return ``perplexity``, lower is better, and ``token_accuracy``, a fraction of 1, of what `token_scores` gave."""
    counted = np.asarray(prediction.label_ids)[:, 1:] != IGNORED
    losses, hits = np.moveaxis(np.asarray(prediction.predictions)[counted], -1, 0)  # [N] each
    mean = float(losses.mean(dtype=np.float64))
    # Of a run that diverged.
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": perplexity, "token_accuracy": float(hits.mean(dtype=np.float64))}
