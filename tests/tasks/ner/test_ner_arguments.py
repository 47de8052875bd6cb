from pathlib import Path

import pytest
from transformers import HfArgumentParser

from meta_trainer.tasks.ner import NerArguments


def test_the_command_line_help_can_be_formatted_and_explains_every_field():
    parser = HfArgumentParser(NerArguments)
    assert "50%" in parser.format_help()
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_data": None}, "No source sentences"),
        ({"target_data": None}, "No target sentences"),
        ({"target_data": None, "target_test_file": "x.json"}, "No target sentences"),
        ({"target_test_file": "x.json"}, "target_data='generated' and target_test_file exclude each other"),
        ({"source_train_file": "x.json"}, "source_data='generated' and source_train_file exclude each other"),
        ({"max_source_examples": 0}, "max_source_examples must be at least 1, got 0"),
        ({"max_target_examples": -1}, "max_target_examples must be at least 1, got -1"),
        ({"target_batch_size": 0}, "target_batch_size must be at least 1, got 0"),
        ({"max_length": 2}, "max_length must leave room"),
        ({"subset_seed": -1}, "subset_seed must not be negative, got -1"),
        ({"meta_split": "half"}, "meta_split must be 'per_batch' or 'fixed', got 'half'"),
        ({"meta_fraction": 1.0}, "meta_fraction must lie between 0 and 1, got 1.0"),
        ({"map_tags": ["DATE"]}, "entries such as PERSON=PER or DATE=O, got 'DATE'"),
        ({"map_tags": ["A=B", "A=C"]}, "maps 'A' twice"),
        ({"source_data": "./nowhere"}, "source_data: there is no folder .*nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(generated, changes, message):
    with pytest.raises(ValueError, match=message):
        generated(**changes)


def test_a_missing_file_is_named_with_the_path_it_was_looked_up_at(tmp_path: Path):
    with pytest.raises(ValueError, match=f"source_train_file: there is no file {tmp_path / 'train.parquet'}"):
        NerArguments(source_train_file="train.parquet", target_data="generated", data_dir=str(tmp_path))


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path):
    (tmp_path / "train.xml").touch()
    with pytest.raises(ValueError, match=r"'train.xml': expected a file that ends in one of .parquet"):
        NerArguments(source_train_file="train.xml", target_data="generated", data_dir=str(tmp_path))


def test_relative_paths_start_from_data_dir_then_the_environment_then_the_current_folder(generated, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", "/from/environment")
    assert generated(data_dir="/from/setting").path("a.json") == Path("/from/setting/a.json")
    assert generated().path("a.json") == Path("/from/environment/a.json")
    assert generated().path("/whole/a.json") == Path("/whole/a.json")
    monkeypatch.delenv("META_TRAINER_DATA")
    assert generated().path("a.json") == Path("a.json")
