"""Texts of several sources: where they are read, how they are shared out, and which are made worse."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from meta_trainer.tasks.language_modeling import LanguageModelingArguments
from meta_trainer.tasks.language_modeling.corruption import corrupt_texts
from meta_trainer.tasks.language_modeling.loading import load_language_data
from meta_trainer.tasks.language_modeling.locations import Location

TEXTS = ["the first of them", "and a second one", "number three", "the very last"]


def test_shuffling_keeps_the_words_and_random_letters_their_lengths():
    shuffled, letters = (corrupt_texts(TEXTS, kind, seed=3) for kind in ("shuffle", "random"))
    assert shuffled != TEXTS
    assert [sorted(text.split()) for text in shuffled] == [sorted(text.split()) for text in TEXTS]
    assert [[len(word) for word in text.split()] for text in letters] == [[len(w) for w in t.split()] for t in TEXTS]
    assert not {word for text in letters for word in text.split()} & {"first", "second", "number", "three"}


def test_corruption_depends_on_its_seed():
    assert corrupt_texts(TEXTS, "random", 1) == corrupt_texts(TEXTS, "random", 1) != corrupt_texts(TEXTS, "random", 2)


def test_a_location_that_two_sources_name_is_shared_out_and_the_trusted_texts_are_in_none(generated):
    data = load_language_data(generated(corrupt_sources=[], num_meta_examples=10), seed=0)
    assert len(data.meta) == 10
    news, bad = set(data.train["news"]), set(data.train["bad"])
    everything = [text for text, _ in Location.parse("generated:sport").read(None, "text")]
    assert sorted([*data.meta, *data.train["news"], *data.train["bad"]]) == sorted(everything)
    assert list(data.train) == ["news", "other", "bad"]
    assert news != bad


def test_only_the_named_sources_are_made_worse_and_the_trusted_texts_are_not(generated):
    good = load_language_data(generated(corrupt_sources=[]), seed=0)
    mixed = load_language_data(generated(corrupt_sources=["bad=shuffle"]), seed=0)
    assert (mixed.train["news"], mixed.train["other"], mixed.meta) == (
        good.train["news"],
        good.train["other"],
        good.meta,
    )
    assert [sorted(t.split()) for t in mixed.train["bad"]] == [sorted(t.split()) for t in good.train["bad"]]
    assert mixed.train["bad"] != good.train["bad"]


def test_the_runs_seed_corrupts_where_the_settings_have_none(generated):
    own = [load_language_data(generated(), seed).train["bad"] for seed in (0, 1)]
    given = [load_language_data(generated(corruption_seed=5), seed).train["bad"] for seed in (0, 1)]
    assert own[0] != own[1]
    assert given[0] == given[1]


def test_a_column_may_name_the_sources(tmp_path):
    rows = [{"words": f"text {i}", "origin": ("forum", "news")[i % 2]} for i in range(8)]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"sources": [f"all={file}"], "domain_column": "origin", "text_column": "words"}
    data = load_language_data(LanguageModelingArguments(**settings, corrupt_sources=["forum=random"]), 0)
    assert list(data.train) == ["forum", "news"]
    assert sorted(data.train["news"]) == ["text 1", "text 3", "text 5", "text 7"]
    with pytest.raises(ValueError, match=r"no source 'blog' in column 'origin' of .*; the sources are forum, news"):
        load_language_data(LanguageModelingArguments(**settings, trusted_source="blog"), 0)


def test_sources_in_a_column_of_classes_have_their_names(tmp_path):
    features = Features({"text": Value("string"), "origin": ClassLabel(names=["forum", "news"])})
    rows = {"text": ["a", "b", "c"], "origin": [1, 0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mixed.parquet")
    arguments = LanguageModelingArguments(sources=[f"all={tmp_path}/mixed.parquet"], domain_column="origin")
    assert list(load_language_data(arguments, 0).train) == ["forum", "news"]


def test_a_text_without_a_source_is_named_unless_it_is_empty(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"text": "a", "origin": "news"}\n{"text": " ", "origin": null}\n')
    assert Location.parse(str(file)).read(None, "text", "origin") == [("a", "news")]
    file.write_text('{"text": "a", "origin": "news"}\n{"text": "b", "origin": null}\n')
    with pytest.raises(ValueError, match=r"row 2, column 'origin': expected a name .* None\. A row .* left out\.$"):
        Location.parse(str(file)).read(None, "text", "origin")


def test_an_empty_cell_of_a_csv_file_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_text('text,origin\none,news\n,news\n"",news\n')
    assert Location.parse("a.csv").read(str(tmp_path), "text", "origin") == [("one", "news")]


def test_a_text_file_is_split_at_line_feeds_only_and_its_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\x0b\u2028three\rfour\n".encode())
    texts = [text for text, _ in Location.parse("a.txt").read(str(tmp_path), "text")]
    assert texts == ["one", "two\x0b\u2028three\rfour"]


def test_a_text_file_has_a_text_a_line_and_empty_ones_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n")
    assert Location.parse("a.txt").read(str(tmp_path), "whatever") == [("one", ""), ("two", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 3}', "row 1: expected a text in 'text', got 3"),
        ('{"words": "a"}', "has no column 'text'; its columns are words"),
        ('{"text": " "}', "holds no text"),
    ],
)
def test_rows_without_a_text_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        Location.parse("a.jsonl").read(str(tmp_path), "text")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="should be UTF-8 text"):
        Location.parse("a.txt").read(str(tmp_path), "text")


def test_more_trusted_texts_than_there_are_is_refused(generated):
    with pytest.raises(ValueError, match=r"num_meta_examples=500 leaves none of the .* texts of 'news' to train on"):
        load_language_data(generated(num_meta_examples=500), 0)


def test_more_sources_than_texts_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    sources = [f"{name}={tmp_path / 'a.txt'}" for name in "abc"]
    with pytest.raises(ValueError, match="holds 2 texts, too few for the sources a, b, c"):
        load_language_data(LanguageModelingArguments(sources=sources), 0)


def test_numbers_of_texts_may_be_limited(generated):
    data = load_language_data(generated(max_source_examples=7, max_eval_examples=3), 0)
    assert [len(texts) for texts in data.train.values()] == [7, 7, 7]
    assert len(data.test) == 3
    assert data.validation is None
