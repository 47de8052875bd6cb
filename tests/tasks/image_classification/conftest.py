"""Small sets of images for the tests of image classification."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from pictures import picture, png

from meta_trainer.tasks.image_classification import ImageClassificationArguments


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., str]:
    """Write labelled images to a parquet file in the test's own folder, as the Hub does."""

    def write(name: str, numbers: range, channels: int = 1, size: int = 16, **columns: list[Any]) -> str:
        rows = {
            "image": [{"bytes": png(picture(i, size, channels)), "path": None} for i in numbers],
            "label": [i % 2 for i in numbers],
            **columns,
        }
        features = {"image": Image(), "label": ClassLabel(names=["left", "right"])}
        features |= {name: Value("bool" if isinstance(v[0], bool) else "int64") for name, v in columns.items()}
        path = tmp_path / name
        Dataset.from_dict(rows, features=Features(features)).to_parquet(path)
        assert pyarrow.parquet.read_table(path).num_rows == len(numbers)
        return str(path)

    return write


@pytest.fixture
def small(write_images: Callable[..., str]) -> Callable[..., ImageClassificationArguments]:
    """Arguments for forty small images of two classes and ten to be scored."""
    files = {"train_file": [write_images("train.parquet", range(40))]}
    files["test_file"] = write_images("test.parquet", range(100, 110))

    def make(**changes: object) -> ImageClassificationArguments:
        settings: dict[str, Any] = {**files, "num_meta_examples": 8, **changes}
        return ImageClassificationArguments(**settings)

    return make
