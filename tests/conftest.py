"""What every test gets: a seed, and the folder of real data where there is one."""

import os
from pathlib import Path

import pytest
import torch

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
