"""Cross-lingual named entity recognition: many source sentences, few target sentences."""

from meta_trainer.tasks.ner.arguments import NerArguments
from meta_trainer.tasks.ner.build import build_ner_task

__all__ = ["NerArguments", "build_ner_task"]
