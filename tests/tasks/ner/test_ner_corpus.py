import re

import pytest

from meta_trainer.tasks.ner.columns import read_columns
from meta_trainer.tasks.ner.corpus import generate_corpus
from meta_trainer.tasks.ner.tags import check_iob2, entity_types
from meta_trainer.tasks.ner.templates import ENTITY_SLOTS, FILLERS, TEMPLATES


def names(locale: str, split: str) -> set[tuple[str, str]]:
    """Return type and text of all entities of a split."""
    found = set()
    for row in generate_corpus(locale, split):
        text = " ".join(f"{token}\x00{tag}" for token, tag in zip(row["tokens"], row["ner_tags"], strict=True))
        for match in re.finditer(r"\S+\x00B-(\w+)(?: \S+\x00I-\w+)*", text):
            found.add((match[1], re.sub(r"\x00\S+", "", match[0])))
    return found


@pytest.mark.parametrize("locale", ["en_US", "fi_FI"])
def test_sentences_are_well_formed_iob2_of_the_three_types(locale):
    sentences = read_columns(generate_corpus(locale, "train"), locale, "tokens", "ner_tags")
    check_iob2(sentences)
    assert entity_types([sentences]) == ["LOC", "ORG", "PER"]
    assert not any(re.search(r"[{}\s]", token) for tokens in sentences.tokens for token in tokens)


def test_the_same_seed_gives_the_same_sentences_and_another_seed_others():
    first = generate_corpus("fi_FI", "train", seed=3, size=40).to_list()
    assert generate_corpus("fi_FI", "train", seed=3, size=40).to_list() == first
    assert generate_corpus("fi_FI", "train", seed=3, size=15).to_list() == first[:15]
    assert generate_corpus("fi_FI", "train", seed=4, size=40).to_list() != first


@pytest.mark.parametrize("locale", ["en_US", "fi_FI"])
def test_no_name_of_a_split_occurs_in_another(locale):
    train, validation, test = (names(locale, split) for split in ("train", "validation", "test"))
    assert min(len(train), len(validation), len(test)) > 100
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_every_slot_of_a_template_can_be_filled():
    for language, templates in TEMPLATES.items():
        slots = {slot for template in templates for slot in re.findall(r"{(\w+)}", template)}
        assert slots <= {*ENTITY_SLOTS, "NUM", *FILLERS[language]}
        assert len(set(templates)) >= 25


@pytest.mark.parametrize(
    ("locale", "split", "message"),
    [
        ("en_US", "gold", "splits train, validation, test, got 'gold'"),
        ("sw", "train", "sentences in en, fi; locale 'sw' is in no such language"),
        ("en_XX", "train", "Faker knows no locale 'en_XX'"),
    ],
)
def test_an_unknown_split_or_locale_is_refused(locale, split, message):
    with pytest.raises(ValueError, match=message):
        generate_corpus(locale, split)
