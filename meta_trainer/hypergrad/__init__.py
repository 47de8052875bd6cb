r"""Hypergradients of bilevel problems, in pure PyTorch.

A bilevel problem asks for meta-parameters :math:`\lambda` such that a model :math:`\theta` trained with them does well
on validation data. An *estimator* turns a :class:`BilevelProblem` into a :class:`Hypergradient`:

====================== ======================================================= =========================================
estimator              idea                                                    passes
====================== ======================================================= =========================================
:func:`evograd`        an evolutionary inner step over K perturbed candidates  K train forwards, 1 validation forward
                                                                               and backward
:func:`finite_difference` a central difference along the validation gradient   2 train forwards, 1 validation forward
                                                                               and backward
:func:`t1t2`           the exact derivative through one gradient step          1 train forward and double backward,
                                                                               1 validation forward and backward
====================== ======================================================= =========================================

Perturbed at random, ``evograd`` is unbiased and noisy; guided by the validation gradient, it has neither noise nor
further passes. The inner step is gradient descent, or with an :class:`OptimizerStep` what the base optimizer will do.

Each leaves no trace: parameters, buffers, ``.grad`` fields and random state come back bit for bit.
"""

from meta_trainer.hypergrad.evograd import AUTO, DEFAULT_SIGMA, check_evograd_settings, evograd, loss_cotangents
from meta_trainer.hypergrad.finite_difference import finite_difference
from meta_trainer.hypergrad.inner_step import GradientDescent, InnerStep, OptimizerStep
from meta_trainer.hypergrad.noise import NOISE_NAMES, Layout, Noise
from meta_trainer.hypergrad.normalized_descent import NormalizedDescent
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient, Loss, TrainLoss
from meta_trainer.hypergrad.random_state import RandomState, preserved_random_state
from meta_trainer.hypergrad.sharding import Sharding
from meta_trainer.hypergrad.t1t2 import t1t2
from meta_trainer.hypergrad.term_sums import TermSum

__all__ = [
    "AUTO",
    "DEFAULT_SIGMA",
    "NOISE_NAMES",
    "BilevelProblem",
    "GradientDescent",
    "Hypergradient",
    "InnerStep",
    "Layout",
    "Loss",
    "Noise",
    "NormalizedDescent",
    "OptimizerStep",
    "RandomState",
    "Sharding",
    "TermSum",
    "TrainLoss",
    "check_evograd_settings",
    "evograd",
    "finite_difference",
    "loss_cotangents",
    "preserved_random_state",
    "t1t2",
]
