import numpy as np
import pytest
from transformers import EvalPrediction

from meta_trainer.tasks.metrics import classification_scores, macro_f1


def test_scores_of_a_case_that_is_worked_out_by_hand():
    logits = np.eye(4)[[0, 1, 1, 1]]
    scores = classification_scores(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 1, 2])))
    # F1 of class 0 is 2/3, of class 1 1/2, of class 2 0; class 3 occurs nowhere.
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}


def test_logits_may_come_with_further_outputs():
    logits = np.eye(2)[[0, 1]]
    prediction = EvalPrediction(predictions=(logits, np.zeros(2)), label_ids=np.array([0, 1]))
    assert classification_scores(prediction) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_class_that_is_only_predicted_counts_as_missed():
    assert macro_f1(np.array([0, 1]), np.array([0, 0])) == pytest.approx((2 / 3 + 0) / 2)
