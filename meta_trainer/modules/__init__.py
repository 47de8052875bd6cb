"""Meta modules: what is learned by the hypergradient, and the three doors through which it enters training.

===================================== ================ ==============================================================
module                                door             what it learns
===================================== ================ ==============================================================
:class:`InputRotation`                batch            the angle by which training images are rotated
:class:`RepresentationTransform`      forward pass     a map of source-language hidden states towards the target
                                                       language (MetaXL)
:class:`FeatureWiseTransform`         forward pass     how much the channels of hidden layers are to vary (LFT)
:class:`MetaWeightNet`                loss             the weight of each example, given its loss
:class:`DomainWeights`                loss             the weight of each data source
:class:`LearnedWeightDecay`           loss             the strength of weight decay, for groups of parameters
:class:`MetaModuleList`               those of its     several modules at once
                                      members
===================================== ================ ==============================================================

A new one subclasses :class:`MetaModule` and overrides the doors it uses.
"""

from meta_trainer.modules.composition import MetaModuleList
from meta_trainer.modules.domain_weights import DomainWeights
from meta_trainer.modules.feature_wise_transform import FeatureWiseTransform
from meta_trainer.modules.input_rotation import InputRotation
from meta_trainer.modules.learned_weight_decay import LearnedWeightDecay
from meta_trainer.modules.meta_module import Batch, MetaModule
from meta_trainer.modules.meta_weight_net import MetaWeightNet
from meta_trainer.modules.representation_transform import RepresentationTransform

__all__ = [
    "Batch",
    "DomainWeights",
    "FeatureWiseTransform",
    "InputRotation",
    "LearnedWeightDecay",
    "MetaModule",
    "MetaModuleList",
    "MetaWeightNet",
    "RepresentationTransform",
]
