import numpy as np
import pytest

from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_iob2
from meta_trainer.tasks.noisy_ner.noise import corrupt_entities, find_entities

TYPES = ["DATE", "LOC", "ORG", "PER"]
TAGS = [[f"B-{a}", f"I-{a}", "O", f"B-{b}", f"B-{b}"] for a in TYPES for b in TYPES] * 5


def types_of(tags) -> list[str]:
    return [tags[i][start][2:] or "O" for i, start, _ in find_entities(TAGS)]


def test_entities_are_found_where_they_begin_and_end():
    assert find_entities([["B-PER", "I-PER", "B-PER", "O"], ["O"], ["O", "B-LOC"]]) == [
        (0, 0, 2), (0, 2, 3), (2, 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["uniform", "flip", "drop"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_the_share_is_that_of_wrong_entities_and_tags_stay_iob2(kind, share):
    noisy = corrupt_entities(TAGS, TYPES, kind, share, seed=1)
    wrong = sum(a != b for a, b in zip(types_of(TAGS), types_of(noisy), strict=True))
    assert wrong == round(share * len(find_entities(TAGS)))
    check_iob2(Sentences("noisy", [["w"] * len(row) for row in noisy], noisy))


def test_all_words_of_an_entity_are_treated_alike():
    for kind in ("uniform", "drop"):
        for clean, noisy in zip(TAGS, corrupt_entities(TAGS, TYPES, kind, 0.5, seed=2), strict=True):
            assert noisy[0][2:] == noisy[1][2:]
            assert noisy[2] == clean[2] == "O"
            assert noisy[1][:2] in ("I-", "O")


def test_flip_noise_has_one_wrong_type_for_each_and_uniform_noise_all_of_them():
    pairs = {}
    for kind in ("flip", "uniform"):
        noisy = types_of(corrupt_entities(TAGS, TYPES, kind, 0.6, seed=3))
        pairs[kind] = {(a, b) for a, b in zip(types_of(TAGS), noisy, strict=True) if a != b}
    assert len(pairs["flip"]) == 4
    assert len(pairs["uniform"]) == 12


@pytest.mark.parametrize("kind", ["uniform", "flip", "drop"])
def test_noise_is_seeded_and_nested_and_leaves_the_trusted_tags_as_they_are(kind):
    before = [list(row) for row in TAGS]
    little, much = (np.array(corrupt_entities(TAGS, TYPES, kind, share, seed=4)) for share in (0.2, 0.5))
    assert before == TAGS
    changed = little != np.array(TAGS)
    assert (much[changed] == little[changed]).all()
    assert (little == corrupt_entities(TAGS, TYPES, kind, 0.2, seed=4)).all()
    assert (little != corrupt_entities(TAGS, TYPES, kind, 0.2, seed=5)).any()


def test_noise_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="one of none, uniform, flip, drop, got 'swap'"):
        corrupt_entities(TAGS, TYPES, "swap", 0.5, seed=0)
    with pytest.raises(ValueError, match="label_noise='flip' needs two entity types, got PER: take 'drop'"):
        corrupt_entities([["B-PER"]], ["PER"], "flip", 0.5, seed=0)


def test_sentences_without_entities_stay_as_they_are():
    assert corrupt_entities([["O", "O"]], [], "flip", 0.5, seed=0) == [["O", "O"]]
