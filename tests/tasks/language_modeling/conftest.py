"""Small files and arguments for the tests of language modeling."""

from collections.abc import Callable

import pytest

from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.language_modeling import LanguageModelingArguments
from meta_trainer.tasks.text_classification.corpus import SIZES

GENERATED = ["news=generated:sport", "other=generated:science", "bad=generated:sport"]


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LanguageModelingArguments]:
    """Arguments for a small embedded corpus, of which one source is bad."""
    for split, size in (("train", 240), ("validation", 40), ("test", 60)):
        monkeypatch.setitem(SIZES, split, size)

    def make(**changes: object) -> LanguageModelingArguments:
        settings: dict[str, object] = {
            "sources": GENERATED,
            "corrupt_sources": ["bad=random"],
            "trusted_source": "news",
            "num_meta_examples": 10,
            "test_texts": "generated:sport@test",
            "block_length": 16,
        }
        return LanguageModelingArguments(**(settings | changes))

    return make


@pytest.fixture
def tiny_model() -> ModelArguments:
    """Settings of a decoder that is built in no time."""
    return ModelArguments(hidden_size=16, num_hidden_layers=1, intermediate_size=16, vocab_size=400)
