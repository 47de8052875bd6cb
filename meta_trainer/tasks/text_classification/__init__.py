"""Text classification with noisy labels: many rows of doubtful labels, a small trusted set."""

from meta_trainer.tasks.text_classification.arguments import TextClassificationArguments
from meta_trainer.tasks.text_classification.build import build_text_classification_task

__all__ = ["TextClassificationArguments", "build_text_classification_task"]
