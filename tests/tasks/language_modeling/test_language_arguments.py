"""Settings of language modeling: what is understood, and what is refused before anything is loaded."""

import pytest

from meta_trainer.tasks.language_modeling import LanguageModelingArguments
from meta_trainer.tasks.language_modeling.locations import Location


@pytest.mark.parametrize(
    ("value", "location", "name"),
    [
        ("text/news.parquet", Location("text/news.parquet"), "news"),
        ("a:b@c.txt", Location("a:b@c.txt"), "a:b@c"),
        ("fancyzhx/ag_news", Location("fancyzhx/ag_news"), "fancyzhx/ag_news"),
        ("owner/name@test", Location("owner/name", None, "test"), "owner/name"),
        ("owner/name:small@test", Location("owner/name", "small", "test"), "owner/name (small)"),
        ("generated:sport", Location("generated", "sport"), "generated (sport)"),
    ],
)
def test_a_location_is_a_file_or_a_split_of_a_data_set(value, location, name):
    assert Location.parse(value) == location
    assert location.name == name


def test_sources_and_corruptions_are_pairs():
    arguments = LanguageModelingArguments(
        sources=["good=generated", "bad=generated:sport@test"], corrupt_sources=["bad=shuffle"]
    )
    assert list(arguments.locations) == ["good", "bad"]
    assert arguments.corruptions == {"bad": "shuffle"}
    assert arguments.dataset_name == "generated, generated (sport)"


SOUND = {"sources": ["a=generated", "b=generated"]}


@pytest.mark.parametrize("setting", ["sources", "test_texts"])
@pytest.mark.parametrize("name", ["wiki.md", "WIKI.TXT", "wiki"])
def test_a_file_of_a_kind_that_is_not_read_is_no_name_of_the_hub(tmp_path, setting, name):
    (tmp_path / name).write_text("a text")
    settings = {"sources": ["a=generated"], "data_dir": str(tmp_path)}
    settings[setting] = [f"a={name}"] if setting == "sources" else name
    with pytest.raises(ValueError, match=rf"{setting}.*={name!r}: expected a file that ends in one of .*\.txt"):
        LanguageModelingArguments(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "No texts to train on: give sources"),
        ({"sources": ["generated"]}, "sources: each entry should read NAME=VALUE, got 'generated'"),
        ({"sources": ["=generated"]}, "sources: each entry should read NAME=VALUE"),
        ({"sources": ["a=generated", "a=generated"]}, "sources: each name should be there once, got a more than once"),
        ({"sources": ["a=x:y:z"]}, r"a file, or DATA\[:SUBSET\]\[@SPLIT\], got 'x:y:z'"),
        ({"sources": ["a=nowhere.txt"]}, "sources: a: there is no file .*nowhere.txt"),
        ({"sources": ["a=./nowhere"]}, "sources: a: there is no folder .*nowhere"),
        ({"sources": ["a=generated:football"]}, "the topics business, .*got generated:football@train"),
        ({"sources": ["a=generated@dev"]}, "the splits train, .*got generated@dev"),
        ({"domain_column": "source"}, "domain_column='source' is for one entry of sources that mixes them, got 2"),
        ({"corrupt_sources": ["a=reverse"]}, "corrupt_sources: a=reverse should be one of shuffle, random"),
        ({"corrupt_sources": ["c=shuffle"]}, "corrupt_sources: there is no source 'c'; the sources are a, b"),
        ({"trusted_source": "c"}, "trusted_source: there is no source 'c'"),
        ({"trusted_source": "a", "corrupt_sources": ["a=shuffle"]}, "trusted_source='a' is among corrupt_sources"),
        ({"trusted_source": "a", "meta_texts": "generated"}, "trusted_source and meta_texts exclude each other"),
        ({"meta_texts": "nowhere.csv"}, "meta_texts: there is no file"),
        ({"test_texts": "generated@dev"}, "test_texts: the generated corpus has the topics"),
        ({"train_on_meta": True, "train_on_meta_alone": True}, "train_on_meta_alone leaves the rest out: set one"),
        ({"block_length": 1}, "block_length must be at least 2, got 1"),
        ({"num_meta_examples": -1}, "num_meta_examples must be at least 0, got -1"),
        ({"max_source_examples": 0}, "max_source_examples must be at least 1, got 0"),
        ({"corruption_seed": -2}, "corruption_seed must be at least 0, got -2"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelingArguments(**{**SOUND, **settings})
