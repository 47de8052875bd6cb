"""The table, the score and the picture of the weights of a run."""

import math

import numpy as np
import pyarrow.parquet
import pytest
from datasets import Dataset
from matplotlib.figure import Figure

from meta_trainer import weights_report
from meta_trainer.example_weights import ExampleWeights
from meta_trainer.weights_report import detection_scores, draw_weights, report_weights, weights_table

CLASSES = {0: "cat", 1: "dog"}
LABELS = Dataset.from_dict(
    {
        "row": [7, 3, 5, 4],
        "text": ["a", "b", "c", "d"],
        "label": ["cat", "dog", "dog", "cat"],
        "trusted_label": ["cat", "cat", "dog", "cat"],
        "is_corrupted": [False, True, False, False],
    }
)
HISTORY = [
    {"step": 1, "loss": 1.0, "meta_module/weight_at_loss_0": 0.5, "meta_module/weight_at_loss_4": 0.5},
    {"step": 2, "eval_loss": 1.0},
    {"step": 3, "loss": 0.5, "meta_module/weight_at_loss_0": 0.8, "meta_module/weight_at_loss_4": 0.0},
]


def found(**changes) -> ExampleWeights:
    columns = {
        "examples": np.arange(4),
        "losses": np.array([0.5, 3.0, 0.1, 0.7], dtype=np.float32),
        "weights": np.array([0.6, 0.2, 0.9, 0.6], dtype=np.float32),
        "predictions": np.array([0, 0, 1, 1]),
    }
    return ExampleWeights(**{**columns, **changes})


@pytest.fixture
def figures(record_figures) -> list[Figure]:
    """The figures that are drawn, in order."""
    return record_figures(weights_report)


def test_the_most_suspicious_row_comes_first_with_what_a_reader_needs_to_judge_it():
    table = weights_table(found(), LABELS, CLASSES)
    assert table.column_names == [
        "row", "text", "label", "predicted_label", "trusted_label", "is_corrupted", "loss", "weight",
    ]  # fmt: skip
    first = table.to_pylist()[0]
    assert (first["row"], first["text"], first["label"], first["predicted_label"]) == (3, "b", "dog", "cat")
    assert (first["loss"], first["weight"]) == (3.0, pytest.approx(0.2))
    # Of the two equal weights, the higher loss.
    assert table["row"].to_pylist() == [3, 4, 7, 5]


def test_rows_of_whole_texts_get_the_means_over_their_tokens():
    tokens = found(examples=np.array([0, 0, 2, 2]), predictions=np.zeros(4, dtype=int))
    table = weights_table(tokens, Dataset.from_dict({"row": [0, 2]}), CLASSES)
    assert table.column_names == ["row", "loss", "weight"]
    assert table["row"].to_pylist() == [0, 2]
    assert table["loss"].to_pylist() == pytest.approx([1.75, 0.4])
    assert table["weight"].to_pylist() == pytest.approx([0.4, 0.75])


def test_labels_of_other_data_are_refused():
    with pytest.raises(ValueError, match="labels of 4 examples, got 3: these are other data"):
        weights_table(found(), LABELS.select(range(3)), CLASSES)


def test_low_weights_are_to_find_the_wrong_labels():
    losses, weights = np.array([0.1, 2.0, 3.0]), np.array([0.9, 0.1, 0.5])
    is_corrupted = np.array([False, True, False])
    assert detection_scores(losses, weights, is_corrupted) == {"corrupted_auc": 1.0, "corrupted_auc_by_loss": 0.5}
    assert detection_scores(losses, weights, np.zeros(3, dtype=bool)) == {}


def test_a_report_is_a_table_a_picture_and_scores(tmp_path):
    scores = report_weights(found(), LABELS, CLASSES, HISTORY, tmp_path)
    assert scores == {"corrupted_auc": 1.0, "corrupted_auc_by_loss": 1.0}
    assert pyarrow.parquet.read_table(tmp_path / "training_weights.parquet").num_rows == 4
    assert (tmp_path / "weights.png").is_file()


def test_without_trusted_labels_there_is_no_score(tmp_path, figures):
    labels = LABELS.select_columns(["row", "text", "label"])
    assert report_weights(found(), labels, CLASSES, HISTORY, tmp_path) == {}
    (_, histogram) = figures[0].axes
    assert histogram.get_title() == "Weights of the training examples"
    assert histogram.get_legend() is None


def test_the_curves_go_from_the_first_to_the_last_log_relative_to_the_mean_of_the_examples(tmp_path, figures):
    losses = np.array([0.0, 4.0])
    draw_weights(losses, np.array([0.8, 0.0]), np.array([False, True]), HISTORY, tmp_path / "weights.png")
    curves, histogram = figures[0].axes
    early, late, plain = curves.lines
    assert (early.get_label(), late.get_label()) == ("step 1", "step 3")
    assert early.get_ydata().tolist() == [1.0, 1.0]
    assert late.get_ydata().tolist() == [2.0, 0.0]
    assert set(plain.get_ydata()) == {1}
    assert early.get_color() != late.get_color()
    assert histogram.get_title() == "Wrong labels are found with AUC 1.000"
    assert [text.get_text() for text in histogram.get_legend().texts] == ["right label (1)", "wrong label (1)"]


def test_of_many_logs_a_few_curves_are_drawn_the_first_and_the_last_among_them(tmp_path, figures):
    history = [{"step": step, "meta_module/weight_at_loss_0": 1.0 + step} for step in range(100)]
    draw_weights(np.ones(3), np.ones(3), None, history, tmp_path / "weights.png")
    labels = [line.get_label() for line in figures[0].axes[0].lines]
    assert (labels[0], labels[-2], len(labels)) == ("step 0", "step 99", weights_report.MOST_CURVES + 1)


def test_of_curves_alike_the_last_is_drawn_so_that_a_late_first_meta_step_hides_nothing(tmp_path, figures):
    learned = [1.0, 1.0, 1.0, 0.5, 0.2]
    history = [{"step": step, "meta_module/weight_at_loss_0": weight} for step, weight in enumerate(learned)]
    draw_weights(np.zeros(2), np.ones(2), None, history, tmp_path / "weights.png")
    labels = [line.get_label() for line in figures[0].axes[0].lines]
    assert labels[:-1] == ["step 2", "step 3", "step 4"]


def test_a_module_that_is_no_function_of_the_loss_has_a_histogram_only(tmp_path, figures):
    draw_weights(np.ones(3), np.array([1.0, 2.0, 3.0]), None, [{"step": 1, "loss": 1.0}], tmp_path / "weights.png")
    assert len(figures[0].axes) == 1


@pytest.mark.parametrize("weights", [[math.nan, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_weights_that_are_zero_or_not_finite_can_be_drawn(tmp_path, weights):
    draw_weights(np.ones(3), np.array(weights), np.array([True, True, False]), HISTORY, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").is_file()


def test_without_a_finite_weight_there_is_no_picture(tmp_path):
    draw_weights(np.ones(2), np.full(2, math.nan), None, HISTORY, tmp_path / "weights.png")
    assert not (tmp_path / "weights.png").exists()
