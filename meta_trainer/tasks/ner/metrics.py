"""Entity-level scores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from seqeval.metrics import accuracy_score, classification_report
from transformers import EvalPrediction

from meta_trainer.tasks.ner.encoding import IGNORED

TagSequences = list[list[str]]


class EntityScores:
    """Precision, recall and F1 of whole entities, micro-averaged and per type, as fractions of 1.

    Entities are read from the tags in seqeval's default mode, in which a stray ``I-`` opens an entity, as in
    the official code of MetaXL. Words without a label, explained at
    :func:`~meta_trainer.tasks.ner.encoding.encode`, are not scored.

    Args:
        tags: The classes in the order of their ids.
        further_metrics: Names or local scripts for ``evaluate.load``. Each gets ``predictions`` and
            ``references`` as lists of tag sequences; its numbers are named ``<metric>_<key>``.
        trust_remote_code: Whether the scripts of further metrics may run: a name stands for one as well.

    Raises:
        ValueError: If a further metric cannot be loaded, or may not run.
    """

    def __init__(
        self, tags: Sequence[str], further_metrics: Sequence[str] = (), trust_remote_code: bool = False
    ) -> None:
        if further_metrics and not trust_remote_code:
            raise ValueError(
                f"metrics: {', '.join(further_metrics)} would run as a script, from a file or the Hub. Set "
                "trust_remote_code if you trust it."
            )
        self.tags = tuple(tags)
        self.further_metrics = {Path(name).stem: _load_metric(name) for name in further_metrics}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score the logits ``[N, L, C]`` of N sentences against their labels ``[N, L]``."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted, expected = self.tag_sequences(np.argmax(logits, axis=-1), np.asarray(prediction.label_ids))
        scores = entity_scores(predicted, expected)
        for name, metric in self.further_metrics.items():
            result = metric.compute(predictions=predicted, references=expected)
            scores.update(_flatten(name, result))
        return scores

    def tag_sequences(self, class_ids: np.ndarray, labels: np.ndarray) -> tuple[TagSequences, TagSequences]:
        """Return predicted and expected tags of the labelled words; both arguments have shape ``[N, L]``."""
        rows = [(ids[kept], row[kept]) for ids, row, kept in zip(class_ids, labels, labels != IGNORED, strict=True)]
        predicted = [[self.tags[i] for i in ids] for ids, _ in rows]
        expected = [[self.tags[i] for i in row] for _, row in rows]
        return predicted, expected


def entity_scores(predicted: TagSequences, expected: TagSequences) -> dict[str, float]:
    """Return ``precision``, ``recall``, ``f1``, ``accuracy`` (of words), and ``f1_<TYPE>`` of each type.

    The types are those of all entities, expected or predicted. Undefined ratios are 0.
    """
    scores = {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "accuracy": float(accuracy_score(expected, predicted)),
    }
    # seqeval cannot average over no types at all.
    if all(tag == "O" for tags in (*predicted, *expected) for tag in tags):
        return scores
    report = classification_report(expected, predicted, output_dict=True, zero_division=0)
    micro = report["micro avg"]
    scores.update(precision=float(micro["precision"]), recall=float(micro["recall"]), f1=float(micro["f1-score"]))
    scores.update({f"f1_{key}": float(row["f1-score"]) for key, row in report.items() if not key.endswith(" avg")})
    return scores


def _load_metric(name: str) -> evaluate.EvaluationModule:
    try:
        return evaluate.load(name)
    # What the library raises for an unknown name, a script that cannot be imported, and without a connection.
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"metrics: {name!r} is no metric of the evaluate library and no local script: {error}"
        ) from error


def _flatten(prefix: str, value: Any) -> dict[str, float]:
    return dict(_numbers(prefix, value))


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{prefix}_{key}", inner)
    elif isinstance(value, int | float | np.number):
        yield prefix, float(value)
