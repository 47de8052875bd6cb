"""Small files and arguments for the tests of text classification."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.text_classification import TextClassificationArguments
from meta_trainer.tasks.text_classification.corpus import SIZES


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSON-lines file in the test's own folder."""

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TextClassificationArguments]:
    """Arguments for a small embedded corpus."""
    for split, size in (("train", 120), ("validation", 20), ("test", 30)):
        monkeypatch.setitem(SIZES, split, size)

    def make(**changes: object) -> TextClassificationArguments:
        settings: dict[str, object] = {"data": "generated", "num_meta_examples": 12, "max_length": 32}
        return TextClassificationArguments(**(settings | changes))

    return make


@pytest.fixture
def tiny_model() -> ModelArguments:
    """Settings of an encoder that is built in no time."""
    return ModelArguments(hidden_size=16, num_hidden_layers=1, intermediate_size=16, vocab_size=400)
