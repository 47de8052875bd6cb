"""The update of the meta module."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Trainer

from meta_trainer import MetaTrainingArguments
from meta_trainer.meta_optimizer import apply_hypergradient, create_meta_optimizer, create_meta_scheduler

OPTIMIZERS = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture
def arguments(tmp_path):
    def build(**settings):
        return MetaTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)

    return build


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def scaler_of(scale):
    return torch.amp.GradScaler("cpu", enabled=True, init_scale=scale, growth_interval=1000)


def like(parameters, fill=None):
    return [torch.randn_like(p) if fill is None else torch.full_like(p, fill) for p in parameters]


def values(parameters):
    return [p.detach().clone() for p in parameters]


# -------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_torchs_own_optimizer(name, arguments, parameters):
    args = arguments(meta_optim=name, meta_learning_rate=0.01, meta_weight_decay=0.1)
    optimizer = create_meta_optimizer(args, parameters)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    expected = OPTIMIZERS[name](twins, lr=0.01, weight_decay=0.1)

    for _ in range(3):
        grads = like(parameters)
        apply_hypergradient(parameters, grads, optimizer, no_scaler(), max_grad_norm=0)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        expected.step()

    for found, twin in zip(parameters, twins, strict=True):
        assert_close(found, twin, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["adafactor", "adamw_torch_fused"])
def test_trainers_other_optimizers_move_the_parameters(name, arguments, parameters):
    before = values(parameters)
    optimizer = create_meta_optimizer(arguments(meta_optim=name, meta_learning_rate=0.01), parameters)

    apply_hypergradient(parameters, like(parameters), optimizer, no_scaler(), max_grad_norm=0)

    assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_the_base_models_settings_do_not_reach_the_meta_optimizer(arguments, parameters, monkeypatch):
    build, seen = Trainer.get_optimizer_cls_and_kwargs, []
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args: seen.append(args) or build(args))
    args = arguments(optim="sgd", optim_args="momentum=0.9", learning_rate=7.0, weight_decay=0.5)
    optimizer = create_meta_optimizer(args, parameters)

    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == args.meta_learning_rate == 1e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert seen[0].optim_args is None
    assert (args.optim, args.optim_args, args.learning_rate) == ("sgd", "momentum=0.9", 7.0)


# ----------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_hypergradient_that_is_not_finite_leaves_parameters_and_optimizer_as_they_were(
    bad, scale, arguments, parameters
):
    optimizer = create_meta_optimizer(arguments(), parameters)
    scaler = no_scaler() if scale is None else scaler_of(scale)
    apply_hypergradient(parameters, like(parameters), optimizer, scaler, max_grad_norm=1.0)
    before, state = values(parameters), copy.deepcopy(optimizer.state_dict())
    grads = like(parameters)
    grads[1][0, 1] = bad

    norm, stepped = apply_hypergradient(parameters, grads, optimizer, scaler, max_grad_norm=1.0)

    assert not stepped
    assert not torch.isfinite(norm)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_training_goes_on_after_a_hypergradient_that_is_not_finite(arguments, parameters):
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizers = [create_meta_optimizer(arguments(), group) for group in (parameters, twins)]
    grads = like(parameters)

    apply_hypergradient(parameters, like(parameters, math.nan), optimizers[0], no_scaler(), 1.0)
    for group, optimizer in zip((parameters, twins), optimizers, strict=True):
        assert apply_hypergradient(group, grads, optimizer, no_scaler(), 1.0)[1]

    assert all(torch.equal(p, t) for p, t in zip(parameters, twins, strict=True))


@pytest.mark.parametrize(("max_norm", "factor"), [(0, 1.0), (100.0, 1.0), (0.5, 0.1)])
def test_a_hypergradient_is_clipped_by_the_norm_of_the_whole(max_norm, factor, arguments):
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = create_meta_optimizer(arguments(meta_optim="sgd", meta_learning_rate=1.0), parameters)

    norm, _ = apply_hypergradient(
        parameters, [torch.tensor([3.0]), torch.tensor([4.0])], optimizer, no_scaler(), max_norm
    )

    assert norm == 5
    found = torch.cat([p.detach() for p in parameters])
    assert_close(found, -factor * torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [None, 4.0])
def test_clipping_and_scaling_do_not_reach_the_callers_hypergradient(scale, arguments, parameters):
    grads, scaler = like(parameters, 10.0), no_scaler() if scale is None else scaler_of(scale)
    apply_hypergradient(parameters, grads, create_meta_optimizer(arguments(), parameters), scaler, 1.0)
    assert all((grad == 10).all() for grad in grads)


def test_an_update_leaves_no_gradient_behind(arguments, parameters):
    apply_hypergradient(parameters, like(parameters), create_meta_optimizer(arguments(), parameters), no_scaler(), 1.0)
    assert all(p.grad is None for p in parameters)


def test_a_hypergradient_is_cast_to_the_type_of_its_parameter(arguments):
    parameters = [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    optimizer = create_meta_optimizer(arguments(meta_optim="sgd", meta_learning_rate=1.0), parameters)
    apply_hypergradient(parameters, [torch.tensor([1.0, -2.0])], optimizer, no_scaler(), 0)
    assert parameters[0].tolist() == [-1, 2]


# ------------------------------------------------------------------------------------------------- loss scale


def test_a_finite_step_is_the_same_with_and_without_a_scale(arguments, parameters):
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    grads, scaler = like(parameters), scaler_of(2.0**12)

    plain = apply_hypergradient(parameters, grads, create_meta_optimizer(arguments(), parameters), no_scaler(), 0.5)
    scaled = apply_hypergradient(twins, grads, create_meta_optimizer(arguments(), twins), scaler, 0.5)

    assert plain[1]
    assert scaled[1]
    assert torch.equal(plain[0], scaled[0])
    assert all(torch.equal(p, t) for p, t in zip(parameters, twins, strict=True))
    assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_the_scale_falls_when_the_hypergradient_is_not_finite(bad, arguments, parameters):
    optimizer, scaler = create_meta_optimizer(arguments(), parameters), scaler_of(1024.0)

    for expected in (512.0, 256.0):
        apply_hypergradient(parameters, like(parameters, bad), optimizer, scaler, 1.0)
        assert scaler.get_scale() == expected
    assert apply_hypergradient(parameters, like(parameters), optimizer, scaler, 1.0)[1]
    assert scaler.get_scale() == 256.0


def test_the_scale_grows_after_enough_finite_steps(arguments, parameters):
    optimizer = create_meta_optimizer(arguments(), parameters)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0, growth_interval=2)
    for _ in range(2):
        apply_hypergradient(parameters, like(parameters), optimizer, scaler, 1.0)
    assert scaler.get_scale() == 16


# --------------------------------------------------------------------------------------------------- schedule


def rates(args, num_training_steps, count):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.meta_learning_rate)
    scheduler = create_meta_scheduler(args, optimizer, num_training_steps)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_the_rate_is_constant_by_default(arguments):
    assert rates(arguments(meta_learning_rate=0.5), 10, 10) == [0.5] * 11


@pytest.mark.parametrize(("steps", "every", "meta_steps"), [(10, 1, 10), (10, 3, 4), (9, 3, 3), (2, 5, 1)])
def test_the_schedule_ends_with_the_last_meta_step(steps, every, meta_steps, arguments):
    args = arguments(meta_learning_rate=1.0, meta_lr_scheduler_type="linear", meta_every=every)
    expected = [1 - step / meta_steps for step in range(meta_steps + 1)]
    assert rates(args, steps, meta_steps) == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "warmup_steps"), [(0, 0), (2, 2), (0.25, 2), (0.3, 3)])
def test_warm_up_is_a_number_of_meta_steps_or_a_share_of_them(warmup, warmup_steps, arguments):
    """16 optimizer steps with a meta step every other time are 8 meta steps."""
    args = arguments(
        meta_learning_rate=1.0,
        meta_lr_scheduler_type="constant_with_warmup",
        meta_every=2,
        meta_warmup_steps=warmup,
    )
    expected = [min(1.0, step / max(warmup_steps, 1)) if warmup_steps else 1.0 for step in range(9)]
    assert rates(args, 16, 8) == pytest.approx(expected)
