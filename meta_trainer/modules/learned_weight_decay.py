"""Learned weight decay: the strength of a quadratic penalty on the model's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from meta_trainer.hypergrad.checks import is_positive
from meta_trainer.modules.meta_module import BASE_MODEL, Batch, MetaModule

_COMPILED = "_orig_mod."  # what torch.compile puts before names


class LearnedWeightDecay(MetaModule):
    r"""Add a quadratic penalty to the loss, whose strength is learned for each group of parameters.

    The objective is :math:`\frac{1}{N}\sum_i \ell_i + \sum_g \lambda_g \lVert\theta_g\rVert^2` with
    :math:`\lambda_g = \exp(\rho_g)`: learned are the logarithms :math:`\rho`, as useful decays differ by orders of
    magnitude. It is the one-dimensional example of the EvoGrad paper, :math:`(x-1)^2 + \lambda x^2`, grown up.

    The penalty is on matrices and tensors of more dimensions; biases and the scales of norms, which are vectors, are
    left alone. It takes part in the gradient, so that Adam scales it as it scales the gradient: set the optimizer's own
    `weight_decay`, which it does not scale, to zero, and leave embeddings out, as those of words that no batch has get
    no gradient but the penalty's, which Adam makes full steps of.

    Only what the inner step moves can teach a decay. With ``perturb: head``, candidates differ in the norm of the head
    alone; the decay of a group that has nothing in the scope gets no hypergradient and stays as it is, although its
    penalty acts on the base step. Likewise, a single inner step does not see what decay does to weights in front of a
    layer norm, whose scale has no effect at once: expect most of what is learned in the layers after the last norm.

    Args:
        groups: Patterns of parameter names with the wildcards of `fnmatch`, one for each group; a pattern that names a
            module selects its parameters. A parameter belongs to the first pattern that matches, and without one it is
            not decayed.
        initial_decay: Of each group, :math:`\lambda_g` at first.

    Raises:
        ValueError: If `groups` holds no pattern or one twice, or `initial_decay` is not positive and finite.

    References:
        Bohdal et al., `EvoGrad <https://arxiv.org/abs/2106.10575>`_, NeurIPS 2021, section 4.1.
    """

    reads_base_model = True

    def __init__(self, groups: Sequence[str] = ("*",), initial_decay: float = 1e-4) -> None:
        super().__init__()
        patterns = isinstance(groups, list | tuple) and all(isinstance(group, str) and group for group in groups)
        if not patterns or not groups or len(set(groups)) < len(groups):
            raise ValueError(f"`groups` should be a list of name patterns, each once, got {groups!r}.")
        if not is_positive(initial_decay):
            raise ValueError(f"`initial_decay` should be a positive number, got {initial_decay!r}.")
        self.groups = list(groups)
        self.log_decays = nn.Parameter(torch.full((len(groups),), math.log(initial_decay)))
        self._members: list[list[str]] = []  # of each group, once `check_model` has seen the model

    def decays(self) -> Tensor:
        """Decay of each group, ``[G]``."""
        return self.log_decays.exp()

    def reduce(self, losses: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """Mean of the losses ``[N]``, and the penalty."""
        if BASE_MODEL not in batch:
            raise ValueError(
                f"LearnedWeightDecay expects the base model as `{BASE_MODEL}` beside the columns of the batch, got "
                f"{sorted(batch)}."
            )
        parameters = _named_parameters(batch[BASE_MODEL])
        members = self._members or self._select(parameters)
        norms = torch.stack([_squared_norm([parameters[name] for name in names]) for names in members])  # [G]
        return losses.mean() + (self.decays().to(norms.dtype) * norms).sum().to(losses.dtype)

    def summary(self) -> dict[str, Tensor]:
        """Decay of each group."""
        names = ["weight_decay" if group == "*" else f"weight_decay_{group}" for group in self.groups]
        return dict(zip(names, self.decays(), strict=True))

    def check_model(self, model: nn.Module) -> None:
        """Find the members of every group among the trainable parameters of `model`, and remember their names."""
        # A meta step freezes what it does not perturb: later on, nobody could tell what is trained.
        trainable = {name: p for name, p in _named_parameters(model).items() if p.requires_grad}
        self._members = self._select(trainable)

    def _select(self, parameters: dict[str, Tensor]) -> list[list[str]]:
        """Names of the parameters in each group."""
        members: list[list[str]] = [[] for _ in self.groups]
        for name, parameter in parameters.items():
            matching = [i for i, group in enumerate(self.groups) if _matches(name, group)]
            if parameter.dim() > 1 and matching:
                members[matching[0]].append(name)
        for group, names in zip(self.groups, members, strict=True):
            if not names:
                raise ValueError(
                    f"`groups` has the pattern {group!r}, which matches no trainable parameter of two or more "
                    f"dimensions that an earlier pattern has left. The parameters are {list(parameters)[:10]} ..."
                )
        return members


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(_COMPILED, ""): parameter for name, parameter in model.named_parameters()}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares, in single precision at least."""
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return torch.stack([tensor.square().sum() for tensor in wide]).sum()
