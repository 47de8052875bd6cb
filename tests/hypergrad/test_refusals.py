"""Bad problems and settings end in one clear error."""

from functools import partial

import pytest
import torch
from torch import nn

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2
from meta_trainer.hypergrad.noise import Perturbations


def problem(**changes):
    theta, meta = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    settings = {
        "theta": [theta],
        "meta_params": [meta],
        "train_loss": lambda: (theta**2).sum() * meta.sum(),
        "val_loss": lambda: (theta**2).sum(),
    }
    return BilevelProblem(**{**settings, **changes})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 1}, "at least 2, got 1. A single candidate has weight 1"),
        ({"num_candidates": 0}, "`num_candidates` should be at least 2, got 0"),
        ({"num_candidates": -3}, "`num_candidates` should be at least 2, got -3"),
        ({"sigma": 0.0}, "`sigma` should be a positive, finite number, got 0.0"),
        ({"sigma": -1.0}, "`sigma` should be a positive, finite number, got -1.0"),
        ({"sigma": float("nan")}, "`sigma` should be a positive, finite number, got nan"),
        ({"temperature": 0.0}, "`temperature` should be a positive, finite number, got 0.0"),
        ({"temperature": float("inf")}, "`temperature` should be a positive, finite number, got inf"),
        ({"sigma": "0.1"}, "`sigma` should be a positive, finite number, got '0.1'"),
        ({"sigma": 1e-320}, "`sigma` should be a positive, finite number, got 1e-320"),
        ({"temperature": True}, "`temperature` should be a positive, finite number, got True"),
        ({"num_candidates": 2.0}, "`num_candidates` should be a whole number, got 2.0"),
        ({"seed": "1"}, "`seed` should be a whole number, got '1'"),
        ({"antithetic": "no"}, "`antithetic` should be True or False, got 'no'"),
        ({"noise": "uniform"}, "`noise` should be one of 'sign', .*'guided' or a function, got 'uniform'"),
        ({"noise": lambda k, theta: []}, r"of shapes \[\[3\]\], got \[\] for candidate 0"),
        (
            {"noise": lambda k, theta: [torch.zeros(3 + k)]},
            r"of shapes \[\[3\]\], got \[\[4\]\] for candidate 1",
        ),
    ],
)
def test_evograd_refuses_a_setting_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        evograd(problem(), **settings)


@pytest.mark.parametrize(
    ("estimator", "name"), [(t1t2, "lr"), (finite_difference, "lr"), (finite_difference, "step_size")]
)
@pytest.mark.parametrize("value", [0.0, -1e-3, float("inf"), float("nan")])
def test_inner_rates_should_be_positive_and_finite(estimator, name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be a positive, finite number, got {value}"):
        estimator(problem(), **{name: value})


@pytest.mark.parametrize("estimator", [evograd, t1t2, finite_difference])
@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.ones(2), r"shape \[2\]"), (torch.ones(0), r"shape \[0\]"), (1.5, "float"), (None, "NoneType")],
)
def test_a_loss_that_is_no_scalar_is_named(estimator, name, value, found):
    with pytest.raises(ValueError, match=f"`{name}` should return a scalar tensor, got {found}"):
        estimator(problem(**{name: lambda: value}))


@pytest.mark.parametrize("estimator", [evograd, t1t2, finite_difference])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_loss_that_is_no_real_number_is_named(estimator, dtype):
    with pytest.raises(ValueError, match=f"`train_loss` should return a floating-point tensor, got {dtype}"):
        estimator(problem(train_loss=lambda: torch.ones((), dtype=dtype)))


@pytest.mark.parametrize("name", ["theta", "meta_params"])
def test_tensors_that_could_not_be_differentiated_are_named(name):
    leaf = torch.ones(2, requires_grad=True)
    for tensors, message in [
        ([], f"`{name}` should hold at least one tensor, got none"),
        ([None], rf"`{name}\[0\]` should be a tensor, got NoneType"),
        ([torch.ones(0, requires_grad=True)], rf"`{name}` should hold at least one number, got .* \[\[0\]\]"),
        ([leaf, leaf], f"`{name}` holds the same tensor twice"),
        (
            [leaf, torch.ones(2, dtype=torch.int64)],
            rf"`{name}\[1\]` should be a floating-point tensor, got torch.int64",
        ),
        ([leaf * 2], rf"`{name}\[0\]` should be a leaf tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            problem(**{name: tensors})


def test_theta_and_meta_params_share_nothing():
    shared = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="`theta` and `meta_params` should have no tensor in common"):
        problem(theta=[shared], meta_params=[shared])


@pytest.mark.parametrize("estimator", [partial(evograd, num_candidates=3), t1t2, finite_difference])
def test_a_loss_of_shape_one_counts_as_a_scalar(estimator):
    plain = problem()
    wrapped = BilevelProblem(
        plain.theta, plain.meta_params, lambda: plain.train_loss()[None], lambda: plain.val_loss()[None]
    )
    assert torch.equal(estimator(wrapped).grads[0], estimator(plain).grads[0])


def test_perturbations_have_no_candidate_beyond_the_last():
    with pytest.raises(IndexError):
        Perturbations("sign", [torch.ones(2)], 2, 0.1, 0)[2]
