"""Settings of shaped noise and of inner steps that are out of range or do not go together end in one clear error."""

import math

import pytest
import torch

from meta_trainer.hypergrad import (
    BilevelProblem,
    GradientDescent,
    Layout,
    OptimizerStep,
    check_evograd_settings,
    evograd,
    finite_difference,
)


def zeros(k, theta):
    return [torch.zeros_like(t) for t in theta]


def problem():
    """Its losses are not to be reached."""
    theta, meta = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)

    def loss():
        raise AssertionError("evaluated")

    return BilevelProblem([theta], [meta], loss, loss)


def real_step(base, kind=torch.optim.AdamW):
    theta = base.theta[0]
    optimizer = kind([theta], lr=0.1)
    theta.grad = torch.ones(3)
    optimizer.step()
    theta.grad = None
    return OptimizerStep(optimizer, [theta])


OUT_OF_RANGE = [
    ({"temperature": "automatic"}, "`temperature` should be a positive, finite number or 'auto', got 'automatic'"),
    ({"temperature": "0.05"}, "`temperature` should be a positive, finite number or 'auto', got '0.05'"),
    ({"temperature": None}, "`temperature` should be a positive, finite number, got None"),
    ({"temperature": -1.0}, "`temperature` should be a positive, finite number, got -1.0"),
    ({"temperature": math.nan}, "`temperature` should be a positive, finite number, got nan"),
    ({"sigma": -1e-3, "noise": "guided"}, "`sigma` should be a positive, finite number, got -0.001"),
    ({"sigma": 0.0, "noise": "guided"}, "`sigma` should be a positive, finite number, got 0.0"),
    ({"sigma": math.inf, "noise": "guided"}, "`sigma` should be a positive, finite number, got inf"),
    ({"num_candidates": 1, "noise": "guided"}, "`num_candidates` should be at least 2, got 1"),
    (
        {"noise": "Guided"},
        "`noise` should be one of 'sign', 'normal', 'optimizer', 'guided' or a function, got 'Guided'",
    ),
    ({"guidance": 0.0, "noise": "guided"}, "`guidance` should be above 0 and at most 1, got 0.0"),
    ({"guidance": -0.5, "noise": "guided"}, "`guidance` should be above 0 and at most 1, got -0.5"),
    ({"guidance": 1.5, "noise": "guided"}, "`guidance` should be above 0 and at most 1, got 1.5"),
    ({"guidance": math.nan, "noise": "guided"}, "`guidance` should be above 0 and at most 1, got nan"),
    ({"guidance": 2.0}, "`guidance` should be above 0 and at most 1, got 2.0"),
]
AT_ODDS = [
    ({"guidance": 0.5}, "`guidance` is the share of a known direction in noise='guided', but `noise` is 'sign'"),
    ({"guidance": 0.5, "noise": "normal"}, "`guidance` is the share of a known direction .* but `noise` is 'normal'"),
    ({"guidance": 0.5, "noise": zeros}, "`guidance` is the share of a known direction in noise='guided'"),
    (
        {"noise": "guided", "antithetic": True},
        "`antithetic` is a layout of random perturbations, of which noise='guided'",
    ),
    (
        {"noise": "guided", "orthogonal": True},
        "`orthogonal` is a layout of random perturbations, of which noise='guided'",
    ),
    ({"noise": zeros, "antithetic": True}, "`antithetic` is a layout of random perturbations, of which noise="),
    ({"noise": zeros, "orthogonal": True}, "`orthogonal` is a layout of random perturbations, of which noise="),
    ({"noise": "normal", "orthogonal": True}, "`orthogonal` is a layout of random signs: choose noise='sign'"),
    ({"noise": zeros, "include_unperturbed": True}, "`include_unperturbed` does not go with a function as `noise`"),
    ({"noise": zeros, "relative_sigma": True}, "`relative_sigma` .* noise=<function zeros"),
    ({"noise": "optimizer", "relative_sigma": True}, "`relative_sigma` .* noise='optimizer' has a scale of its own"),
]


@pytest.mark.parametrize(("settings", "message"), [*OUT_OF_RANGE, *AT_ODDS])
def test_evograd_refuses_before_any_loss_is_evaluated(settings, message):
    with pytest.raises(ValueError, match=message):
        evograd(problem(), **settings)


@pytest.mark.parametrize(("settings", "message"), [*OUT_OF_RANGE, *AT_ODDS])
def test_settings_can_be_checked_without_a_problem(settings, message):
    flags = {name: settings.get(name, False) for name in ("antithetic", "orthogonal", "include_unperturbed")}
    values = {
        name: settings.get(name, default)
        for name, default in [
            ("num_candidates", 2),
            ("sigma", None),
            ("temperature", 0.05),
            ("noise", "sign"),
            ("guidance", 1.0),
        ]
    }

    with pytest.raises(ValueError, match=message):
        check_evograd_settings(**values, layout=Layout(**flags), relative_sigma=settings.get("relative_sigma", False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "optimizer"}, "noise='optimizer' needs an `inner_step`, whose learning rates shape it"),
        (
            {"noise": zeros, "inner_step": GradientDescent(0.1)},
            "`inner_step` scales named noise; the tensors of a function stay",
        ),
    ],
)
def test_noise_and_inner_step_should_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        evograd(problem(), **settings)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_the_rates_of_an_optimizer_need_noise_of_their_shape(noise, kind):
    base = problem()
    message = f"An `inner_step` with rates of its own needs noise='optimizer' or 'guided', got '{noise}'"
    with pytest.raises(ValueError, match=message):
        evograd(base, noise=noise, inner_step=real_step(base, kind))


@pytest.mark.parametrize("noise", ["sign", "normal", "guided"])
def test_the_rates_of_an_optimizer_leave_no_room_for_relative_sigma(noise):
    base = problem()
    with pytest.raises(ValueError, match="`relative_sigma` and `guidance` do not go with an `inner_step`"):
        evograd(base, noise=noise, relative_sigma=True, inner_step=real_step(base))


def test_the_rates_of_an_optimizer_leave_no_room_for_a_mixture():
    base = problem()
    with pytest.raises(ValueError, match="`relative_sigma` and `guidance` do not go with an `inner_step`"):
        evograd(base, noise="guided", guidance=0.5, inner_step=real_step(base))


@pytest.mark.parametrize("value", [5, None])
def test_noise_that_is_neither_a_name_nor_a_function_is_refused(value):
    with pytest.raises(
        ValueError, match="`noise` should be one of 'sign', 'normal', 'optimizer', 'guided' or a function"
    ):
        evograd(problem(), noise=value)


@pytest.mark.parametrize("step_size", [0.0, -1.0, math.inf, math.nan])
def test_the_step_of_a_difference_should_be_positive_and_finite(step_size):
    with pytest.raises(ValueError, match=f"`step_size` should be a positive, finite number, got {step_size}"):
        finite_difference(problem(), step_size=step_size)


@pytest.mark.parametrize("max_grad_norm", [-1.0, math.nan])
def test_a_norm_to_clip_to_should_not_be_negative(max_grad_norm):
    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="`max_grad_norm`"):
        OptimizerStep(torch.optim.SGD([theta], lr=0.1), [theta], max_grad_norm)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise": "guided", "include_unperturbed": True},
        {"noise": "guided", "guidance": 0.5, "antithetic": True, "orthogonal": True, "include_unperturbed": True},
        {"noise": "guided", "relative_sigma": True},
        {"noise": "normal", "relative_sigma": True, "antithetic": True, "include_unperturbed": True},
        {"temperature": "auto", "orthogonal": True},
        {"temperature": 1, "num_candidates": 3},
        {"noise": zeros, "temperature": "auto"},
        {"inner_step": GradientDescent(0.1), "relative_sigma": True},
    ],
)
def test_what_goes_together_is_taken(settings):
    theta, meta = torch.randn(5, requires_grad=True), torch.ones(5, requires_grad=True)
    fine = BilevelProblem([theta], [meta], lambda: (meta * theta.sin()).sum(), lambda: theta.exp().sum())

    assert evograd(fine, **settings).grads[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_loss": 5}, r"`train_loss` should be a function \(\) -> scalar or several, got 5"),
        ({"train_loss": []}, r"`train_loss` should be a function \(\) -> scalar or several, got none"),
        ({"val_loss": None}, r"`val_loss` should be a function \(\) -> scalar, got None"),
        ({"theta": torch.ones(3)}, r"`theta` should be a list of tensors, got a tensor of shape \[3\]"),
        ({"turn": (3, 2)}, r"`turn` should be whole numbers \(i, n\) with 0 <= i < n, got \(3, 2\)"),
        ({"turn": None}, r"`turn` should be whole numbers .* got None"),
    ],
)
def test_a_problem_of_parts_of_the_wrong_kind_is_refused(change, message):
    parts = {name: getattr(problem(), name) for name in ("theta", "meta_params", "train_loss", "val_loss")}
    with pytest.raises(ValueError, match=message):
        BilevelProblem(**{**parts, **change})


def test_more_candidates_than_anyone_evaluates_are_refused():
    with pytest.raises(ValueError, match="`num_candidates` should be at most 10000, got 1000000000"):
        check_evograd_settings(10**9, 1e-3, 0.05, "sign", Layout())
