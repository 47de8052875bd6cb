import numpy as np
import pytest

from meta_trainer.tasks.meta_split import split_off_meta

CLASSES = ("a", "b", "c")
LABELS = np.array([0] * 50 + [1] * 30 + [2] * 10)


@pytest.mark.parametrize(("size", "counts"), [(0, [0, 0, 0]), (9, [3, 3, 3]), (11, [4, 4, 3]), (30, [10, 10, 10])])
def test_the_meta_set_has_its_size_and_all_classes_alike(size, counts):
    meta, _ = split_off_meta(LABELS, CLASSES, size, None, seed=0)
    assert np.bincount(LABELS[meta], minlength=3).tolist() == counts


def test_classes_come_as_in_the_data_where_the_meta_set_is_not_balanced():
    labels = np.array([0] * 5000 + [1] * 3000 + [2] * 100)
    meta, train = split_off_meta(labels, CLASSES, 810, None, seed=0, balanced=False)
    assert np.bincount(labels[meta], minlength=3) == pytest.approx([500, 300, 10], abs=40)
    assert sorted([*meta, *train]) == list(range(8100))
    smaller, _ = split_off_meta(labels, CLASSES, 20, None, seed=0, balanced=False)
    assert smaller.tolist() == meta[:20].tolist()


@pytest.mark.parametrize("seed", [0, 5])
def test_every_row_is_in_one_of_the_two_parts_and_none_in_both(seed):
    meta, train = split_off_meta(LABELS, CLASSES, 12, None, seed)
    assert sorted([*meta, *train]) == list(range(90))


def test_smaller_draws_are_parts_of_larger_ones():
    small_meta, small = split_off_meta(LABELS, CLASSES, 12, 20, seed=1)
    same_meta, large = split_off_meta(LABELS, CLASSES, 12, 40, seed=1)
    large_meta, _ = split_off_meta(LABELS, CLASSES, 24, 40, seed=1)
    assert large[:20].tolist() == small.tolist()
    assert same_meta.tolist() == small_meta.tolist()
    assert set(small_meta) < set(large_meta)


def test_another_seed_draws_other_rows():
    first, second = (split_off_meta(LABELS, CLASSES, 12, 20, seed) for seed in (0, 1))
    assert set(first[0]) != set(second[0])
    assert set(first[1]) != set(second[1])


def test_a_class_with_too_few_rows_is_named():
    with pytest.raises(
        ValueError, match="num_meta_examples=33 takes 11 training rows of each class, but class 'c' has 10"
    ):
        split_off_meta(LABELS, CLASSES, 33, None, seed=0)


def test_a_meta_set_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="num_meta_examples=3 leaves none of 3 rows to train on"):
        split_off_meta(np.array([0, 1, 2]), CLASSES, 3, None, seed=0)
