"""The scope of a meta step: which parameters of the base model its inner step moves."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn


def select_parameters(model: nn.Module, perturb: str | Sequence[str]) -> list[nn.Parameter]:
    """Trainable parameters of `model` within the scope `perturb`.

    Args:
        model: The base model. Of parameters that are tied, the first name counts.
        perturb: ``"all"``; ``"head"``, what a Hugging Face model has outside its base model, adapted by PEFT or not;
            or patterns of parameter names with the wildcards of `fnmatch`. A pattern that names a module selects its
            parameters.

    Raises:
        ValueError: If nothing is selected, or a pattern matches no trainable parameter.
    """
    patterns = [perturb] if isinstance(perturb, str) else list(perturb)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("The model has no trainable parameter, so there is nothing that a meta step could perturb.")
    if patterns == ["all"]:
        return list(trainable.values())
    if patterns == ["head"]:
        return _head(model)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in trainable):
            near = get_close_matches(pattern, trainable, n=3, cutoff=0.3)
            raise ValueError(
                f"`perturb` has the pattern {pattern!r}, which matches no trainable parameter. Near it are {near}."
            )
    return [p for name, p in trainable.items() if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _head(model: nn.Module) -> list[nn.Parameter]:
    # Inside PEFT's wrapper, whose `model` is all that it wraps, not a decoder's base model; its prompts are no head.
    model = getattr(model, "get_base_model", lambda: model)()
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        raise ValueError(
            f"perturb='head' needs a Hugging Face model with a head on a base model, got {type(model).__name__}. "
            "Name the parameters by patterns instead."
        )
    # By identity: adapters change the names, and a tied parameter has several.
    body = {id(p) for p in getattr(model, prefix).parameters()}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in body]
    if not head:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter outside its base model `{prefix}` (its "
            "head may be tied to the embeddings). Name the parameters to perturb by patterns instead."
        )
    return head
