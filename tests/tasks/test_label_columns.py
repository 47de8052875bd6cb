import pytest
from datasets import ClassLabel, Dataset, Features, Value

from meta_trainer.tasks.label_columns import class_names, read_labels, used_rows


def test_noisy_labels_without_names_are_numbers_of_the_trusted_columns_classes():
    features = Features({"label": ClassLabel(names=["cat", "dog"]), "noisy": Value("int64")})
    dataset = Dataset.from_dict({"label": [0, 1, 1], "noisy": [1, 1, 0]}, features=features)
    labels = read_labels(dataset, "pets", [0, 1, 2], "label", "noisy")
    assert labels.noisy_labels == ["dog", "dog", "cat"]
    assert class_names([labels]) == ["cat", "dog"]


def test_noisy_labels_with_names_of_their_own_keep_them():
    names = {"label": ClassLabel(names=["cat", "dog"]), "noisy": ClassLabel(names=["dog", "cat"])}
    dataset = Dataset.from_dict({"label": [0, 1], "noisy": [0, 0]}, features=Features(names))
    assert read_labels(dataset, "pets", [0, 1], "label", "noisy").noisy_labels == ["dog", "dog"]


def test_numbers_here_and_names_there_are_refused():
    numbers = read_labels(Dataset.from_dict({"label": [0, 1]}), "train", [0, 1], "label")
    names = read_labels(Dataset.from_dict({"label": ["cat", "dog"]}), "test", [0, 1], "label")
    with pytest.raises(ValueError, match=r"No label of train to train on \('0, 1'\) is one of test \('cat, dog'\)"):
        class_names([numbers, names])


def test_whole_numbers_beside_a_missing_one_are_labels_and_others_are_not():
    dataset = Dataset.from_dict({"label": [0.0, None, 1.0, 0.5]})
    assert read_labels(dataset, "pets", [0, 2], "label").labels == ["0", "1"]
    with pytest.raises(ValueError, match=r"pets, row 2, .* got None\. A row without one has to be left out; a scored"):
        read_labels(dataset, "pets", [1], "label")
    with pytest.raises(ValueError, match=r"pets, row 4, column 'label': expected a label as text or integer, got 0.5"):
        read_labels(dataset, "pets", [3], "label")


@pytest.mark.parametrize("flags", [["no", "yes"], [None, True]])
def test_rows_are_left_out_by_booleans_alone(flags):
    with pytest.raises(ValueError, match=r"pets: exclude_column='dup' should hold booleans, got ('no'|None)"):
        used_rows(Dataset.from_dict({"label": [0, 1], "dup": flags}), "pets", ["label"], "dup")
    assert used_rows(Dataset.from_dict({"label": [0, 1], "dup": [1, 0]}), "pets", ["label"], "dup") == [1]
