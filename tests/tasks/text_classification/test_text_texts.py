from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from meta_trainer.tasks.label_columns import class_names
from meta_trainer.tasks.text_classification.texts import Texts, read_texts


def read(rows: list[dict[str, Any]], **options: str) -> Texts:
    return read_texts(Dataset.from_list(rows), "news", "text", "label", **options)


def named(labels: list[int]) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["sport", "art"])})
    return Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=features)


def test_text_labels_are_sorted_by_name():
    texts = read([{"text": "a", "label": "sport"}, {"text": "b", "label": "art"}])
    assert texts.labels.labels == texts.labels.noisy_labels == ["sport", "art"]
    assert class_names([texts.labels]) == ["art", "sport"]


def test_integers_are_sorted_as_numbers():
    texts = read([{"text": "a", "label": label} for label in (10, 2, 1)])
    assert class_names([texts.labels]) == ["1", "2", "10"]


def test_named_classes_keep_their_order_and_other_sets_may_add_to_them():
    texts = read_texts(named([1, 0, 1]), "news", "text", "label")
    assert texts.labels.labels == ["art", "sport", "art"]
    further = read([{"text": "a", "label": "bank"}, {"text": "b", "label": "art"}]).labels
    assert class_names([texts.labels, further]) == ["sport", "art", "bank"]


def test_noisy_labels_and_rows_to_leave_out_come_from_columns_of_their_own():
    rows = [
        {"text": "a", "label": "x", "noisy": "y", "dup": False},
        {"text": None, "label": None, "noisy": "y", "dup": True},
        {"text": "c", "label": "y", "noisy": "z", "dup": False},
    ]
    texts = read(rows, noisy_label_column="noisy", exclude_column="dup")
    labels = texts.labels
    assert (texts.texts, labels.rows) == (["a", "c"], [0, 2])
    assert (labels.labels, labels.noisy_labels) == (["x", "y"], ["y", "z"])
    assert class_names([texts.labels]) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "label": "x"}, "news, row 2: expected a text in 'text', got None"),
        ({"text": "b", "label": None}, "news, row 2, column 'label': expected a label as text or integer, got None"),
    ],
)
def test_a_row_without_a_text_or_a_label_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        read([{"text": "a", "label": "x"}, row])


def test_a_number_is_no_text_and_a_fraction_no_label():
    with pytest.raises(ValueError, match="row 1: expected a text in 'text', got 3"):
        read([{"text": 3, "label": "x"}])
    with pytest.raises(ValueError, match=r"row 1, column 'label': expected a label as text or integer, got 0\.5"):
        read([{"text": "a", "label": 0.5}])


def test_a_split_without_labels_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"label -1 is outside the 2 classes sport, art\. A row without one"):
        read_texts(named([-1]), "news", "text", "label")


def test_a_missing_column_and_a_set_without_rows_are_refused():
    with pytest.raises(ValueError, match="news has no column 'noisy'"):
        read([{"text": "a", "label": "x"}], noisy_label_column="noisy")
    with pytest.raises(ValueError, match="news holds no row to use"):
        read([{"text": "a", "label": "x", "dup": True}], exclude_column="dup")


def test_one_class_is_not_enough():
    with pytest.raises(ValueError, match="at least two classes, got x"):
        class_names([read([{"text": "a", "label": "x"}]).labels])
