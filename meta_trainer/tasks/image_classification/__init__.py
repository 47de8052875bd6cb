"""Image classification: labels that may be wrong, or target images that look different, and a small trusted set."""

from meta_trainer.tasks.image_classification.arguments import ImageClassificationArguments
from meta_trainer.tasks.image_classification.build import build_image_classification_task

__all__ = ["ImageClassificationArguments", "build_image_classification_task"]
