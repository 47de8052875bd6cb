import numpy as np
import pytest

from meta_trainer.tasks.label_noise import corrupt_labels

LABELS = np.random.default_rng(3).integers(0, 5, size=2000)


@pytest.mark.parametrize("kind", ["uniform", "flip"])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.4, 0.99])
def test_the_share_of_wrong_labels_is_exact(kind, share):
    noisy = corrupt_labels(LABELS, 5, kind, share, seed=0)
    assert np.sum(noisy != LABELS) == round(share * 2000)
    assert set(np.unique(noisy)) <= set(range(5))


def test_flip_noise_takes_every_class_to_one_other_class():
    noisy = corrupt_labels(LABELS, 5, "flip", 0.4, seed=0)
    for number in range(5):
        assert len(np.unique(noisy[(number == LABELS) & (noisy != number)])) == 1


def test_uniform_noise_takes_every_class_to_all_others_alike():
    noisy = corrupt_labels(LABELS, 5, "uniform", 0.5, seed=0)
    counts = np.array([[np.sum((i == LABELS) & (noisy == j)) for j in range(5) if j != i] for i in range(5)])
    assert np.all(np.abs(counts - 50) < 25)  # 1000 wrong labels, 20 pairs: about 3.6 standard deviations


@pytest.mark.parametrize("kind", ["uniform", "flip"])
def test_the_wrong_labels_of_a_smaller_share_are_among_those_of_a_larger_one(kind):
    few, many = (corrupt_labels(LABELS, 5, kind, share, seed=4) for share in (0.2, 0.6))
    wrong = few != LABELS
    assert np.array_equal(few[wrong], many[wrong])


@pytest.mark.parametrize("kind", ["uniform", "flip"])
def test_a_seed_gives_the_same_labels_and_another_seed_others(kind):
    before = LABELS.copy()
    first, again, other = (corrupt_labels(LABELS, 5, kind, 0.3, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(LABELS, before)


def test_two_classes_are_swapped_by_either_kind():
    labels = np.array([0, 1] * 50)
    for kind in ("uniform", "flip"):
        noisy = corrupt_labels(labels, 2, kind, 0.5, seed=0)
        assert np.array_equal(noisy[noisy != labels], 1 - labels[noisy != labels])


def test_no_noise_leaves_every_label_and_an_unknown_kind_is_refused():
    assert np.array_equal(corrupt_labels(LABELS, 5, "none", 0.9, seed=0), LABELS)
    with pytest.raises(ValueError, match="one of none, uniform, flip, got 'pair'"):
        corrupt_labels(LABELS, 5, "pair", 0.1, seed=0)
