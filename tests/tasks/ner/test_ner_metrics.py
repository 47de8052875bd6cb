from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction

from meta_trainer.tasks.ner.metrics import EntityScores, entity_scores

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
METRIC = """
import datasets
import evaluate

class SameLength(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({
                "predictions": datasets.Sequence(datasets.Value("string")),
                "references": datasets.Sequence(datasets.Value("string")),
            }),
        )

    def _compute(self, predictions, references):
        right = sum(p == r for ps, rs in zip(predictions, references) for p, r in zip(ps, rs))
        return {"right": right, "sizes": {"rows": len(references)}, "note": "a text is no number"}
"""


def prediction(predicted: list[list[int]], labels: list[list[int]]) -> EvalPrediction:
    """Logits whose largest entry is the predicted class."""
    return EvalPrediction(predictions=np.eye(len(TAGS))[predicted], label_ids=np.array(labels))


def test_an_entity_counts_only_when_type_and_both_ends_are_right():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O", "B-LOC", "I-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O", "B-LOC", "O"]]
    # 4 entities expected, 4 found, 2 right: the second sentence has a wrong type and a wrong end.
    assert entity_scores(predicted, expected) == pytest.approx(
        {
            "precision": 2 / 4,
            "recall": 2 / 4,
            "f1": 2 / 4,
            "accuracy": 6 / 8,
            "f1_LOC": 2 * 1 / (3 + 2),
            "f1_PER": 2 * 1 / (1 + 2),
        }
    )


def test_scores_are_zero_without_a_warning_when_nothing_is_found_or_nothing_is_there():
    assert entity_scores([["O", "O"]], [["B-PER", "O"]]) == {
        "precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5, "f1_PER": 0.0,
    }  # fmt: skip
    assert entity_scores([["B-PER"]], [["O"]])["f1"] == 0.0
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}


def test_positions_without_a_label_are_not_scored():
    scores = EntityScores(TAGS)(prediction([[1, 3, 4, 4], [1, 1, 0, 2]], [[-100, 3, -100, 4], [-100, 1, 0, -100]]))
    assert (scores["f1"], scores["accuracy"]) == (1.0, 1.0)


def test_only_the_logits_are_scored_when_a_model_gives_more():
    plain = prediction([[3, 0]], [[3, 0]])
    more = EvalPrediction(predictions=(plain.predictions, np.zeros((1, 2, 7))), label_ids=plain.label_ids)
    assert EntityScores(TAGS)(more) == EntityScores(TAGS)(plain)


def test_the_numbers_of_a_local_metric_script_are_added_under_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path)
    script = tmp_path / "same_length.py"
    script.write_text(METRIC)
    scores = EntityScores(TAGS, [str(script)], trust_remote_code=True)(
        prediction([[3, 0], [1, 1]], [[3, 0], [-100, 0]])
    )
    assert {key: value for key, value in scores.items() if key.startswith("same_length")} == {
        "same_length_right": 2.0,
        "same_length_sizes_rows": 2.0,
    }


def test_a_metric_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no_metric\.py' is no metric"):
        EntityScores(TAGS, [str(tmp_path / "no_metric.py")], trust_remote_code=True)
