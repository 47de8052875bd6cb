"""Named entity recognition with noisy tags: many sentences of doubtful tags, a small trusted set."""

from meta_trainer.tasks.noisy_ner.arguments import NoisyNerArguments
from meta_trainer.tasks.noisy_ner.build import build_noisy_ner_task

__all__ = ["NoisyNerArguments", "build_noisy_ner_task"]
