"""Causal language modeling on a mixture of sources, with a small set of trusted texts."""

from meta_trainer.tasks.language_modeling.arguments import LanguageModelingArguments
from meta_trainer.tasks.language_modeling.build import build_language_modeling_task

__all__ = ["LanguageModelingArguments", "build_language_modeling_task"]
