"""Train or evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(training: bool, *modules: nn.Module) -> Iterator[None]:
    """Train mode, or evaluation mode, for a while; every submodule gets its own mode back."""
    modes = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode
