"""What every test may use: a seed, the folder of real data where there is one, and the figures that are drawn."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

# The models here are so small that a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(0)
    return 0


@pytest.fixture
def data_dir() -> Path:
    """The folder named by META_TRAINER_DATA; tests that need it are marked ``real_data``."""
    folder = os.environ.get("META_TRAINER_DATA")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("META_TRAINER_DATA names no folder")
    return Path(folder)


@pytest.fixture
def record_figures(monkeypatch) -> Callable[[ModuleType], list[Figure]]:
    """Gives, for a module that draws, the list of the figures that it is going to draw, in order."""

    def record(module: ModuleType) -> list[Figure]:
        drawn: list[Figure] = []

        class Recorded(Figure):
            def __init__(self, *args, **kwargs) -> None:
                super().__init__(*args, **kwargs)
                drawn.append(self)

        monkeypatch.setattr(module, "Figure", Recorded)
        return drawn

    return record
