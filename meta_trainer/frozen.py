"""Parameters that autograd leaves alone for a while, or does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Record no graph through `parameters`."""
    with _requiring_grad(parameters, False):
        yield


@contextmanager
def thawed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Record a graph through `parameters`."""
    with _requiring_grad(parameters, True):
        yield


@contextmanager
def _requiring_grad(parameters: Sequence[nn.Parameter], needed: bool) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(needed)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.requires_grad_(value)
