"""Scores of test episodes."""

import numpy as np
from transformers import EvalPrediction

NORMAL_QUANTILE = 1.96
"""Of a two-sided interval of 95%."""


def episode_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Return ``accuracy``, the mean over episodes, and ``accuracy_interval``, half its 95% interval; fractions of 1.

    Scores are ``[E, Q, n_way]``, labels ``[E, Q]``. The interval is that of the normal approximation, with the
    standard deviation over episodes.
    """
    predictions = prediction.predictions
    scores = predictions[0] if isinstance(predictions, tuple) else predictions
    accuracies = np.mean(np.argmax(scores, axis=-1) == np.asarray(prediction.label_ids), axis=-1)  # [E]
    interval = NORMAL_QUANTILE * np.std(accuracies) / np.sqrt(len(accuracies))
    return {"accuracy": float(np.mean(accuracies)), "accuracy_interval": float(interval)}
