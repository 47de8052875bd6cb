"""Small bilevel problems, each written once so that an estimator and its oracle can both evaluate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meta_trainer.hypergrad import BilevelProblem

Call = Callable[..., Tensor]


@dataclass
class Case:
    """A model and two objectives ``(call, meta_params) -> scalar``, where `call` runs the model."""

    model: nn.Module
    meta_params: list[Tensor]
    train: Callable[[Call, Sequence[Tensor]], Tensor]
    val: Callable[[Call, Sequence[Tensor]], Tensor]

    @property
    def theta(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def problem(self, **changes: Any) -> BilevelProblem:
        """What an estimator sees."""
        settings = {
            "theta": self.theta,
            "meta_params": self.meta_params,
            "train_loss": lambda: self.train(self.model, self.meta_params),
            "val_loss": lambda: self.val(self.model, self.meta_params),
            "state": list(self.model.buffers()),
        }
        return BilevelProblem(**{**settings, **changes})

    def call_at(self, theta: Sequence[Tensor], random_state: Tensor) -> Call:
        """The model as a function of `theta`, from a given random state and with buffers of its own."""
        names = [name for name, _ in self.model.named_parameters()]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def call(*inputs: Tensor) -> Tensor:
            torch.set_rng_state(random_state)
            return functional_call(self.model, {**dict(zip(names, theta, strict=True)), **buffers}, inputs)

        return call


def literal_evograd(case: Case, epsilons: Sequence[Sequence[Tensor]], temperature: float) -> dict[str, Any]:
    """EvoGrad as the paper writes it: all K graphs are kept, autograd goes through the softmax and theta*."""
    with torch.random.fork_rng():
        random_state = torch.get_rng_state()
        candidates = [[t.detach() + e for t, e in zip(case.theta, eps, strict=True)] for eps in epsilons]
        losses = torch.stack([case.train(case.call_at(theta, random_state), case.meta_params) for theta in candidates])
        weights = torch.softmax(-losses / temperature, dim=0)
        star = [sum(w * t for w, t in zip(weights, group, strict=True)) for group in zip(*candidates, strict=True)]
        val_loss = case.val(case.call_at(star, random_state), case.meta_params)
        grads = torch.autograd.grad(val_loss, case.meta_params, allow_unused=True, materialize_grads=True)
    return {
        "grads": grads,
        "losses": losses.detach(),
        "weights": weights.detach(),
        "val_loss": val_loss.detach(),
    }


def unrolled_sgd(case: Case, lr: float) -> tuple[Tensor, ...]:
    """Autograd through one step of gradient descent."""
    with torch.random.fork_rng():
        random_state = torch.get_rng_state()
        theta = [t.detach().clone().requires_grad_() for t in case.theta]
        loss = case.train(case.call_at(theta, random_state), case.meta_params)
        slopes = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True, materialize_grads=True)
        stepped = [t - lr * s for t, s in zip(theta, slopes, strict=True)]
        val_loss = case.val(case.call_at(stepped, random_state), case.meta_params)
        return torch.autograd.grad(val_loss, case.meta_params, allow_unused=True, materialize_grads=True)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the expected value, all tensors as one vector."""
    a, b = (torch.cat([t.detach().double().flatten() for t in group]) for group in (found, expected))
    return float((a - b).norm() / b.norm())


class Tied(nn.Module):
    """An input map whose weight is also the output map."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(inputs)))


class WithIdleParameter(nn.Module):
    """A parameter that reaches no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.linear(inputs))


class Modulated(nn.Module):
    """A hidden layer that is scaled by a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(3, 6), nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, gamma: Tensor | None = None) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(inputs)))
        return self.second(hidden if gamma is None else hidden * gamma)


def _weighted(model: nn.Module, dtype: torch.dtype, inputs: Tensor | None = None, spare: bool = False) -> Case:
    """Classification with a learned weight of each example: lambda enters after the model."""
    inputs = torch.randn(8, 3) if inputs is None else inputs
    held_out, labels = torch.randn_like(inputs).to(dtype), torch.randint(3, (len(inputs),))
    inputs, held_out_labels = inputs.to(dtype), torch.randint(3, (len(inputs),))
    meta_params = [torch.randn(len(inputs)).to(dtype).requires_grad_()]
    if spare:
        meta_params.append(torch.randn(2, 2).to(dtype).requires_grad_())

    def train(call: Call, meta: Sequence[Tensor]) -> Tensor:
        return (torch.sigmoid(meta[0]) * F.cross_entropy(call(inputs), labels, reduction="none")).mean()

    def val(call: Call, meta: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(call(held_out), held_out_labels)

    return Case(model.to(dtype), meta_params, train, val)


def _in_the_forward_pass(dtype: torch.dtype) -> Case:
    case = _weighted(Modulated(), dtype)
    inputs, labels = torch.randn(8, 3).to(dtype), torch.randint(3, (8,))
    case.meta_params = [torch.randn(6).to(dtype).requires_grad_()]
    case.train = lambda call, meta: F.cross_entropy(call(inputs, meta[0]), labels)
    return case


def _with_direct_term(dtype: torch.dtype) -> Case:
    case = _weighted(nn.Linear(3, 3), dtype)
    val = case.val
    case.val = lambda call, meta: val(call, meta) + (meta[0] ** 2).mean() * val(call, meta)
    return case


def _linear(dtype: torch.dtype) -> Case:
    return _weighted(nn.Linear(3, 3), dtype)


def _dropout(dtype: torch.dtype) -> Case:
    return _weighted(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)), dtype)


def _batch_norm(dtype: torch.dtype) -> Case:
    return _weighted(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), dtype)


def _convolution(dtype: torch.dtype) -> Case:
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 3 * 3, 3)
    return _weighted(nn.Sequential(*layers), dtype, inputs=torch.randn(6, 1, 5, 5))


def _tied(dtype: torch.dtype) -> Case:
    return _weighted(Tied(), dtype)


def _idle_theta(dtype: torch.dtype) -> Case:
    return _weighted(WithIdleParameter(), dtype)


def _idle_meta(dtype: torch.dtype) -> Case:
    return _weighted(nn.Linear(3, 3), dtype, spare=True)


ZOO: dict[str, Callable[[torch.dtype], Case]] = {
    "linear": _linear,
    "dropout": _dropout,
    "batch_norm": _batch_norm,
    "convolution": _convolution,
    "tied": _tied,
    "idle_theta": _idle_theta,
    "idle_meta": _idle_meta,
    "in_the_forward_pass": _in_the_forward_pass,
    "direct_term": _with_direct_term,
}
