"""Cross-domain few-shot classification: episodes of several image sets, tested on a set that none was trained on."""

from meta_trainer.tasks.few_shot.arguments import FewShotArguments
from meta_trainer.tasks.few_shot.build import build_few_shot_task

__all__ = ["FewShotArguments", "build_few_shot_task"]
