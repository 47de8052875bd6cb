"""The estimators on their own, whatever tensors, losses and settings they are given."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import REFUSED, attempt, cases
from torch import Tensor
from values import objects

from meta_trainer.hypergrad import BilevelProblem, GradientDescent, Hypergradient, evograd, finite_difference, t1t2

ESTIMATORS = {"evograd": evograd, "finite_difference": finite_difference, "t1t2": t1t2}
shapes = st.lists(st.integers(0, 3), max_size=3)
dtypes = st.sampled_from(
    [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.complex64,
    ]
)
tensors = st.one_of(
    st.tuples(shapes, dtypes, st.sampled_from(["leaf", "leaf", "leaf", "no grad", "result", "zeros"])),
    st.sampled_from([None, 1.0, "theta"]),
)
LOSSES = (
    "sound", "sound", "sound", "no theta", "no lambda", "constant", "vector", "empty", "shape [1]", "number", "none",
    "integer", "complex", "half", "nan", "inf", "detached", "tuple",
)  # fmt: skip
losses = st.sampled_from(LOSSES)


def tensor(recipe: Any) -> Any:
    if not isinstance(recipe, tuple):
        return recipe
    shape, dtype, kind = recipe
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    value = (
        torch.zeros(shape, dtype=dtype)
        if kind == "zeros"
        else torch.linspace(-1, 1, torch.Size(shape).numel()).to(dtype).reshape(shape)
    )
    value.requires_grad_(kind != "no grad")
    return value * 2 if kind == "result" else value


def loss(kind: str, theta: list[Any], meta: list[Any]) -> Any:
    def total(group: list[Any]) -> Tensor:
        return sum((t.float().tanh().sum() for t in group), start=torch.zeros(()))

    both = (1 + total(theta)) * (2 + total(meta)) + total(theta) ** 2
    return {
        "sound": lambda: both,
        "no theta": lambda: total(meta),
        "no lambda": lambda: total(theta),
        "constant": lambda: torch.ones(()),
        "vector": lambda: torch.stack([both, both]),
        "empty": lambda: both.new_zeros(0),
        "shape [1]": lambda: both.reshape(1),
        "number": lambda: 1.0,
        "none": lambda: None,
        "integer": lambda: torch.ones((), dtype=torch.int64),
        "complex": lambda: both.to(torch.complex64),
        "half": lambda: both.to(torch.float16),
        "nan": lambda: both * float("nan"),
        "inf": lambda: both * float("inf"),
        "detached": lambda: both.detach(),
        "tuple": lambda: (both, both),
    }[kind]()


def check_sound(result: Hypergradient, meta: list[Tensor], is_finite: bool) -> None:
    assert [g.shape for g in result.grads] == [m.shape for m in meta]
    if is_finite:
        for value in (*result.grads, result.val_loss, result.train_losses, result.weights, result.scores):
            assert value.isfinite().all()
        assert result.weights.sum().item() == pytest.approx(1)


@cases(250)
@given(
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    theta=st.lists(tensors, max_size=3),
    meta=st.lists(tensors, max_size=2),
    train=losses,
    val=losses,
    with_train_grads=st.booleans(),
)
def test_a_problem_is_solved_or_refused_and_theta_is_given_back(estimator, theta, meta, train, val, with_train_grads):
    theta, meta = [tensor(t) for t in theta], [tensor(t) for t in meta]
    before = [t.detach().clone() for t in theta if isinstance(t, Tensor)]

    def solve() -> Hypergradient:
        problem = BilevelProblem(
            theta,
            meta,
            lambda: loss(train, theta, meta),
            lambda: loss(val, theta, meta),
            with_train_grads=with_train_grads,
        )
        return ESTIMATORS[estimator](problem)

    result = attempt(solve)
    if result is not REFUSED:
        check_sound(result, meta, is_finite=not {train, val} & {"nan", "inf"})
    for tensor_before, now in zip(before, (t for t in theta if isinstance(t, Tensor)), strict=True):
        assert torch.equal(tensor_before, now.detach())


SETTINGS = {
    "evograd": [
        "num_candidates", "sigma", "temperature", "noise", "seed", "antithetic", "orthogonal", "include_unperturbed",
        "relative_sigma", "guidance",
    ],
    "finite_difference": ["lr", "step_size"],
    "t1t2": ["lr"],
}  # fmt: skip
settings_of = st.sampled_from(sorted(SETTINGS)).flatmap(
    lambda name: st.tuples(st.just(name), st.dictionaries(st.sampled_from(SETTINGS[name]), objects, max_size=2))
)


@cases(200)
@given(settings=settings_of, noise=st.sampled_from([{}, {"noise": "guided"}, {"noise": "normal"}]))
def test_settings_are_taken_or_refused(settings, noise):
    name, strange = settings
    # A great number of candidates is slow, not wrong; what a callable does is its own matter.
    slow = isinstance(strange.get("num_candidates"), int) and strange["num_candidates"] > 64
    strange = {
        k: v for k, v in strange.items() if not (k == "num_candidates" and slow) and not (k == "noise" and callable(v))
    }
    theta, meta = torch.linspace(-1, 1, 5).requires_grad_(), torch.ones(2, requires_grad=True)

    def solve() -> Hypergradient:
        problem = BilevelProblem(
            [theta], [meta], lambda: loss("sound", [theta], [meta]), lambda: loss("sound", [theta], [])
        )
        return ESTIMATORS[name](problem, **({**noise, **strange} if name == "evograd" else strange))

    result = attempt(solve)
    if result is not REFUSED:
        # What is large is large: only numbers between a thousandth and a thousand have to come out as such.
        values = [abs(v) for v in strange.values() if isinstance(v, float | int) and v]
        check_sound(result, [meta], is_finite=all(1e-3 <= v <= 1e3 for v in values))


@cases(30)
@given(value=objects)
def test_the_rate_of_an_inner_step_is_taken_or_refused(value):
    step = attempt(lambda: GradientDescent(value))
    assert step is REFUSED or 0 < step.lr < float("inf")
