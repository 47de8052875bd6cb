"""Small files and arguments for the tests of named entity recognition."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ner_rows import ROWS

from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.ner import NerArguments
from meta_trainer.tasks.ner.corpus import SIZES


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (default: three sentences) to a JSON-lines file in the test's own folder."""

    def write(name: str, rows: list[dict] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
        return path

    return write


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NerArguments]:
    """Arguments for a small draw from a small embedded corpus."""
    for split in ("train", "validation", "test"):
        monkeypatch.setitem(SIZES, split, 60)

    def make(**changes: object) -> NerArguments:
        settings: dict[str, object] = {
            "source_data": "generated",
            "target_data": "generated",
            "max_source_examples": 30,
            "max_target_examples": 20,
            "target_batch_size": 3,
        }
        return NerArguments(**(settings | changes))

    return make


@pytest.fixture
def tiny_model() -> ModelArguments:
    """Settings of an encoder that is built in no time."""
    return ModelArguments(hidden_size=16, num_hidden_layers=1, intermediate_size=16, vocab_size=400)
