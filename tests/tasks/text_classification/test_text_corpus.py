from collections import Counter

import pytest

from meta_trainer.tasks.text_classification.corpus import SIZES, TOPICS, generate_corpus


def test_the_corpus_is_a_function_of_its_arguments():
    first = generate_corpus("train", size=30).to_list()
    assert generate_corpus("train", size=60).to_list()[:30] == first
    assert generate_corpus("train", seed=1, size=30).to_list() != first
    assert generate_corpus("test", size=30).to_list() != first


def test_every_sentence_names_its_topic_more_often_than_any_other():
    for row in generate_corpus("train", size=300).to_list():
        counts = Counter(
            name for word in row["text"].split() for name, words in TOPICS.items() if word in words.split()
        )
        # A tie where one word of each stands in "about the ..., not about the ...".
        assert counts[row["label"]] == max(counts.values())


def test_no_sentence_comes_twice():
    texts = [text for split in SIZES for text in generate_corpus(split)["text"]]
    assert len(set(texts)) == len(texts) == 1800


def test_all_topics_are_about_equally_frequent():
    counts = Counter(generate_corpus("train")["label"])
    assert set(counts) == set(TOPICS)
    assert min(counts.values()) > 240


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="has the splits train, validation, test, got 'dev'"):
        generate_corpus("dev")
