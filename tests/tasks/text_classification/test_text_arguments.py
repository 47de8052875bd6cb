from pathlib import Path

import pytest
from transformers import HfArgumentParser

from meta_trainer.tasks.text_classification import TextClassificationArguments


def test_the_command_line_help_can_be_formatted_and_explains_every_field():
    parser = HfArgumentParser(TextClassificationArguments)
    assert "trusted labels" in parser.format_help()
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "No texts to train on: give data or train_file"),
        ({"data": None, "test_file": "x.json"}, "No texts to train on"),
        ({"test_file": "x.json"}, "data='generated' and test_file exclude each other"),
        ({"data": "./nowhere"}, "data: there is no folder .*nowhere"),
        ({"max_train_examples": 0}, "max_train_examples must be at least 1, got 0"),
        ({"num_meta_examples": -1}, "num_meta_examples must not be negative, got -1"),
        ({"train_on_meta": True, "meta_repeats": 0}, "meta_repeats must be at least 1, got 0"),
        ({"meta_repeats": 4}, "meta_repeats=4 is for train_on_meta=true"),
        ({"train_on_meta_alone": True, "num_meta_examples": 0}, "train_on_meta_alone needs a meta set"),
        ({"train_on_meta_alone": True, "train_on_meta": True}, "train_on_meta_alone leaves the rest out: set one"),
        ({"subset_seed": -1}, "subset_seed must not be negative, got -1"),
        ({"noise_seed": -2}, "noise_seed must not be negative, got -2"),
        ({"max_length": 2}, "max_length must leave room"),
        ({"label_noise": "flips"}, "label_noise must be one of none, uniform, flip, got 'flips'"),
        ({"label_noise": "flip", "label_noise_share": 1.0}, "less than 1, got 1.0"),
        ({"label_noise": "flip", "label_noise_share": -0.1}, "at least 0 and less than 1, got -0.1"),
        ({"label_noise_share": 0.2}, "label_noise_share=0.2 needs a kind of noise: set label_noise to uniform or flip"),
        ({"label_noise": "flip", "train_label_column": "noisy"}, "train_label_column='noisy' holds noisy labels"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(generated, changes, message):
    with pytest.raises(ValueError, match=message):
        generated(**changes)


def test_files_are_looked_up_under_the_data_folder(tmp_path: Path):
    (tmp_path / "train.csv").touch()
    arguments = TextClassificationArguments(train_file="train.csv", data_dir=str(tmp_path))
    assert arguments.path("train.csv") == tmp_path / "train.csv"
    assert arguments.dataset_name == "train"
    with pytest.raises(ValueError, match=f"test_file: there is no file {tmp_path / 'test.csv'}"):
        TextClassificationArguments(train_file="train.csv", test_file="test.csv", data_dir=str(tmp_path))
