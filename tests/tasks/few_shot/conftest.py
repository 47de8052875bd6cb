"""Small image sets and arguments for the tests of few-shot learning."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from meta_trainer.tasks.few_shot import FewShotArguments

NUM_CLASSES, IMAGES_PER_CLASS = 4, 5


@pytest.fixture
def write_domain(tmp_path: Path) -> Callable[..., str]:
    """Write a set of random images, each class around a grey value of its own, as a parquet file."""

    def write(name: str, classes: int = NUM_CLASSES, per_class: int = IMAGES_PER_CLASS, channels: int = 3) -> str:
        generator = np.random.default_rng(len(name))
        rows = []
        for number in range(classes * per_class):
            shape = (9, 9) if channels == 1 else (9, 9, channels)
            grey = 200 * (number % classes) // classes
            rows.append(
                {"image": (grey + generator.integers(0, 40, shape)).astype(np.uint8), "label": number % classes}
            )
        path = tmp_path / f"{name}.parquet"
        Dataset.from_list(rows, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(str(path))
        return str(path)

    return write


@pytest.fixture
def arguments(write_domain: Callable[..., str]) -> Callable[..., FewShotArguments]:
    """Arguments for three small domains to train on and one to hold out."""
    places = {name: write_domain(name) for name in ("red", "green", "yellow", "infrared")}

    def make(**changes: object) -> FewShotArguments:
        settings: dict[str, object] = {
            "domains": [f"{name}={place}" for name, place in places.items()],
            "held_out_domain": "infrared",
            "image_size": 8,
            "n_way": 3,
            "k_shot": 2,
            "num_queries": 3,
            "num_train_episodes": 40,
            "episodes_per_epoch": 5,
            "num_test_episodes": 3,
            "backbone_width": 2,
            "stem": "small",
        }
        return FewShotArguments(**(settings | changes))

    return make
