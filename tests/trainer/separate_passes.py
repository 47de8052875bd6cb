"""What training steps leave behind, to compare a shared forward pass with separate ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import meta_trainer.shared_forward
from meta_trainer import MetaTrainer


@contextmanager
def separate_passes() -> Iterator[None]:
    """Every candidate and the base step run the whole model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_trainer.shared_forward, "independent_calls", lambda *arguments: ())
        yield


class Witness(MetaTrainer):
    """Keeps the results of its meta steps."""

    result = None

    def meta_step(self, model, inputs):
        self.result = super().meta_step(model, inputs)
        return self.result


def random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


def copied(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().clone() for tensor in tensors]


def training_step(trainer: Witness, batch: dict[str, Any]) -> dict[str, Any]:
    """A meta step, a base step and one step of SGD; all that they leave behind."""
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch)
    result, parameters = trainer.result, list(trainer.model.parameters())
    found = {
        "hypergradient": copied([*result.grads, result.val_loss, result.train_losses, result.weights, result.scores]),
        "loss": loss,
        "gradients": copied(parameter.grad for parameter in parameters),
        "buffers": copied(trainer.model.buffers()),
        "random state": random_state(),
    }
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    trainer.state.global_step += 1
    return {**found, "parameters": copied(parameters), "meta parameters": copied(trainer.meta_parameters)}


def training_steps(trainer: Witness, batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps from random numbers that are always the same."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    return [training_step(trainer, batch) for batch in batches]


def assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]], rtol: float, atol: float) -> None:
    """Gradients of tensors that are used more than once may be summed in another order."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in one:
            if name == "random state":
                assert one[name] == other[name], f"random state of step {number}"
            else:
                label = f"{name} of step {number}"
                torch.testing.assert_close(
                    one[name], other[name], rtol=rtol, atol=atol, msg=lambda m, n=label: f"{n}: {m[:300]}"
                )


@contextmanager
def counted_lookups() -> Iterator[list[int]]:
    """The number of embedding look-ups and convolutions, the lowest layers of a model."""
    count = [0]

    def counting(function):
        def counted(*args, **kwargs):
            count[0] += 1
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("embedding", "conv2d"):
            patch.setattr(F, name, counting(getattr(F, name)))
        yield count
