"""Hypothesis draws the same cases on every machine, unless META_TRAINER_FUZZ asks for a longer run."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))  # tiny models and trainers

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("longer", derandomize=False, deadline=None, database=None, print_blob=True)
settings.load_profile("longer" if "META_TRAINER_FUZZ" in os.environ else "repeatable")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all cases of a file: a function's own would be the same for all of its cases anyway."""
    return tmp_path_factory.mktemp("fuzz")
