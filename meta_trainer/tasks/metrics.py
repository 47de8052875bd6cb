"""Scores of a classifier."""

import numpy as np
from transformers import EvalPrediction


def classification_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Return ``accuracy`` and ``macro_f1``, as fractions of 1, of logits ``[N, C]`` against labels ``[N]``."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, expected = np.argmax(logits, axis=-1), np.asarray(prediction.label_ids)
    return {"accuracy": float(np.mean(predicted == expected)), "macro_f1": macro_f1(predicted, expected)}


def macro_f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur among predicted or expected labels, both of shape ``[N]``."""
    scores = []
    for number in np.union1d(predicted, expected):
        hits = np.sum((predicted == number) & (expected == number))
        # Harmonic mean of precision and recall; the sum is positive, for the class occurs.
        scores.append(2 * hits / (np.sum(predicted == number) + np.sum(expected == number)))
    return float(np.mean(scores))
