"""Gradient-based meta-learning for Hugging Face Trainer.

Hand :class:`MetaTrainer` a meta module and a small trusted data set, and it learns the module by a hypergradient while
it trains the model::

    trainer = MetaTrainer(
        model=model,
        args=MetaTrainingArguments(output_dir="out", hypergradient="evograd"),
        meta_module=MetaWeightNet(),
        train_dataset=noisy,
        meta_dataset=clean,
    )
    trainer.train()
"""

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.modules import (
    DomainWeights,
    FeatureWiseTransform,
    InputRotation,
    LearnedWeightDecay,
    MetaModule,
    MetaModuleList,
    MetaWeightNet,
    RepresentationTransform,
)
from meta_trainer.trainer import MetaTrainer
from meta_trainer.version import __version__

__all__ = [
    "DomainWeights",
    "FeatureWiseTransform",
    "InputRotation",
    "LearnedWeightDecay",
    "MetaModule",
    "MetaModuleList",
    "MetaTrainer",
    "MetaTrainingArguments",
    "MetaWeightNet",
    "RepresentationTransform",
    "__version__",
]
