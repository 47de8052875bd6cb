import math

import pytest
from transformers import HfArgumentParser

from meta_trainer.tasks.image_classification import ImageClassificationArguments


def test_the_command_line_help_can_be_formatted_and_explains_every_field():
    parser = HfArgumentParser(ImageClassificationArguments)
    assert "counter-clockwise" in parser.format_help()
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": [], "test_file": None}, "No images to train on: give data or train_file"),
        ({"data": "ylecun/mnist"}, "data='ylecun/mnist' and train_file, test_file exclude each other"),
        ({"train_file": ["here.parquet", "nowhere.parquet"]}, "train_file: there is no file"),
        ({"train_file": ["images.zip"]}, "train_file='images.zip': expected a file that ends in one of .parquet"),
        ({"max_test_examples": 0}, "max_test_examples must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"random_crop_padding": -1}, "random_crop_padding must be at least 0, got -1"),
        ({"rotate_train_degrees": math.nan}, "rotate_train_degrees must be a finite number of degrees, got nan"),
        ({"rotate_target_degrees": math.inf}, "rotate_target_degrees must be a finite number of degrees, got inf"),
        ({"image_mean": [0.1, 0.2]}, "image_mean must be one number, or three"),
        ({"image_mean": [math.inf]}, "image_mean must be one number, or three"),
        ({"image_std": [0.0]}, r"image_std must be above 0, got \[0.0\]"),
        (
            {"train_on_meta": True, "rotate_target_degrees": 30},
            "train_on_meta trains .* cannot be turned by two angles",
        ),
        ({"train_on_meta_alone": True, "rotate_target_degrees": 30}, "train_on_meta_alone trains .* by two angles"),
        ({"label_noise": "flip", "label_noise_share": 1.0}, "less than 1, got 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(small, changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_one_file_may_be_given_without_a_list(small):
    (file,) = small().train_file
    assert ImageClassificationArguments(train_file=file).train_file == [file]
    assert ImageClassificationArguments(train_file=[file]).dataset_name == "train"
