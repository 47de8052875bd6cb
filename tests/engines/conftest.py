"""Tiny models, and an environment that no test leaves settings of its engine in."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))  # tiny.py


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """`TrainingArguments` tell accelerate through the environment to compile, also in later tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
