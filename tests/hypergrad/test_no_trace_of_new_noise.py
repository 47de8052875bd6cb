"""Shaped noise and real inner steps give back what they touch, bit for bit, as blind noise does."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problem_zoo import ZOO
from test_no_trace import Snapshot, StopHereError, drawing_everywhere, draws_to_come, problem_with, throwing_at
from torch import nn

from meta_trainer.hypergrad import BilevelProblem, GradientDescent, OptimizerStep, evograd, finite_difference, t1t2


def optimizer_of(theta, kind=torch.optim.AdamW):
    """An optimizer that has been under way, without random numbers."""
    if kind is torch.optim.SGD:
        optimizer = kind(theta, lr=0.1, momentum=0.9, weight_decay=0.1)
        for t in theta:
            optimizer.state[t] = {"momentum_buffer": torch.full_like(t.detach(), 0.3)}
        return optimizer
    optimizer = kind(theta, lr=0.1, weight_decay=0.1)
    for t in theta:
        moments = {"exp_avg": torch.full_like(t.detach(), 0.1), "exp_avg_sq": torch.full_like(t.detach(), 0.04)}
        optimizer.state[t] = {"step": torch.tensor(7.0), **moments}
    return optimizer


def following(estimator, kind=torch.optim.AdamW, **settings):
    """The estimator with the next step of an optimizer that leads away from theta."""

    def estimate(problem):
        return estimator(
            problem, inner_step=OptimizerStep(optimizer_of(problem.theta, kind), problem.theta, 1.0), **settings
        )

    return estimate


guided = partial(evograd, noise="guided", sigma=0.1)
ESTIMATORS = {
    "guided": partial(guided, num_candidates=3),
    "guided_default": partial(evograd, noise="guided"),
    "guided_mixture": partial(guided, num_candidates=4, guidance=0.4, antithetic=True, orthogonal=True),
    "guided_unperturbed": partial(guided, num_candidates=3, include_unperturbed=True),
    "guided_relative": partial(guided, relative_sigma=True, inner_step=GradientDescent(0.1)),
    "guided_sgd": following(guided, torch.optim.SGD, num_candidates=3),
    "guided_adamw": following(guided),
    "optimizer": following(evograd, num_candidates=3, sigma=0.1, noise="optimizer"),
    "optimizer_sgd": following(
        evograd, torch.optim.SGD, num_candidates=3, sigma=0.1, noise="optimizer", orthogonal=True
    ),
    "all_layouts": partial(evograd, num_candidates=6, antithetic=True, orthogonal=True, include_unperturbed=True),
    "relative": partial(evograd, noise="normal", sigma=0.1, relative_sigma=True, antithetic=True, temperature="auto"),
    "gradient_descent": partial(evograd, inner_step=GradientDescent(0.1)),
    "finite_difference_sgd": following(finite_difference, torch.optim.SGD),
    "finite_difference_adamw": following(finite_difference),
    "t1t2_sgd": following(t1t2, torch.optim.SGD),
    "t1t2_adamw": following(t1t2),
}
NUM_TRAIN_LOSSES = {
    "guided": 3,
    "guided_mixture": 4,
    "guided_sgd": 3,
    "optimizer": 3,
    "all_layouts": 6,
    "relative": 2,
    "finite_difference_sgd": 2,
    "t1t2_adamw": 1,
}
MOVED_AHEAD = ("guided_sgd", "guided_adamw", "finite_difference_sgd", "finite_difference_adamw")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["dropout", "batch_norm", "direct_term"])
def test_success_leaves_no_trace(name, estimator):
    problem = ZOO[name](torch.float32).problem()
    problem = problem_with(problem, drawing_everywhere(problem.train_loss), drawing_everywhere(problem.val_loss))
    snapshot = Snapshot(problem)

    ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_of_other_precision_come_back(estimator, dtype):
    theta, meta = (
        [torch.randn(6, 5).to(dtype).requires_grad_(), torch.randn(()).to(dtype).requires_grad_()],
        torch.ones(5),
    )
    problem = BilevelProblem(
        theta,
        [meta.requires_grad_()],
        lambda: ((theta[0].float() * theta[1].float()).sin() @ meta).square().mean(),
        lambda: (theta[0].float().exp().mean() + theta[1].float()) ** 2,
    )
    snapshot = Snapshot(problem)

    found = ESTIMATORS[estimator](problem)

    snapshot.check()
    assert found.grads[0].isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "call"), [(name, call) for name, count in NUM_TRAIN_LOSSES.items() for call in range(count)]
)
def test_an_exception_in_any_training_loss_leaves_no_trace(estimator, call):
    problem = ZOO["batch_norm"](torch.float32).problem()
    problem = problem_with(problem, throwing_at(call, problem.train_loss), problem.val_loss)
    snapshot = Snapshot(problem)

    with pytest.raises(StopHereError):
        ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_exception_in_the_validation_loss_leaves_no_trace(estimator):
    problem = ZOO["batch_norm"](torch.float32).problem()
    problem = problem_with(problem, problem.train_loss, throwing_at(0, problem.val_loss))
    snapshot = Snapshot(problem)

    with pytest.raises(StopHereError):
        ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
def test_a_loss_that_is_no_scalar_leaves_no_trace(name, estimator):
    problem = ZOO["dropout"](torch.float32).problem(**{name: lambda: torch.ones(2)})
    snapshot = Snapshot(problem)

    with pytest.raises(ValueError, match=f"`{name}` should return a scalar tensor"):
        ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_exception_between_the_losses_leaves_no_trace(estimator):
    """The connection to the other replicas breaks."""
    case = ZOO["batch_norm"](torch.float32)
    calls = 0

    def mean(tensor):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopHereError
        return tensor

    snapshot = Snapshot(case.problem())

    with pytest.raises(StopHereError):
        ESTIMATORS[estimator](case.problem(mean=mean))

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_special_values_come_back_bit_for_bit(estimator):
    theta = torch.tensor([-0.0, 1e-42, -1e-45, 3e38, 1e-20, float("nan"), float("inf")], requires_grad=True)
    theta.data.view(torch.int32)[5] = 0x7FC12345
    meta = torch.tensor([1.0, -0.0, 1e-44], requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: (theta * meta.sum()).sum(), lambda: (theta**2).sum())
    snapshot = Snapshot(problem)

    ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["val_loss", "train_loss"])
def test_losses_that_are_not_finite_leave_no_trace(where, value, estimator):
    case = ZOO["dropout"](torch.float32)
    loss = getattr(case.problem(), where)
    problem = case.problem(**{where: lambda: loss() * value})
    snapshot = Snapshot(problem)

    ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("flags", [(False, True), (False, False)])
def test_flags_of_frozen_tensors_come_back_and_change_no_result(estimator, flags):
    case = ZOO["linear"](torch.float64)
    expected = ESTIMATORS[estimator](case.problem()).grads
    for tensors, flag in zip((case.theta, case.meta_params), flags, strict=True):
        for tensor in tensors:
            tensor.requires_grad_(flag)
    snapshot = Snapshot(case.problem())

    found = ESTIMATORS[estimator](case.problem()).grads

    snapshot.check()
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_caller_without_gradients_gets_the_same_result(estimator):
    case = ZOO["dropout"](torch.float64)
    expected = ESTIMATORS[estimator](case.problem()).grads
    with torch.no_grad():
        snapshot = Snapshot(case.problem())
        found = ESTIMATORS[estimator](case.problem()).grads
        snapshot.check()

    assert expected[0].norm() > 0
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_results_hold_no_graph(estimator):
    found = ESTIMATORS[estimator](ZOO["direct_term"](torch.float64).problem())

    tensors = (*found.grads, found.val_loss, found.train_losses, found.weights, found.scores, found.val_loss_change)
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_graph_recorded_before_is_still_usable_after(estimator):
    case = ZOO["linear"](torch.float64)
    expected = torch.autograd.grad(case.train(case.model, case.meta_params), case.theta)
    loss = case.train(case.model, case.meta_params)

    ESTIMATORS[estimator](case.problem())

    for found, reference in zip(torch.autograd.grad(loss, case.theta), expected, strict=True):
        assert torch.equal(found, reference)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_loss_starts_from_the_same_buffers_and_random_numbers(estimator):
    case = ZOO["batch_norm"](torch.float64)
    norm = next(m for m in case.model.modules() if isinstance(m, nn.BatchNorm1d))
    seen = []

    def watched(loss):
        def evaluate():
            seen.append((norm.num_batches_tracked.item(), norm.running_mean.tolist(), draws_to_come()))
            return loss()

        return evaluate

    problem = case.problem()
    ESTIMATORS[estimator](problem_with(problem, watched(problem.train_loss), watched(problem.val_loss)))

    assert len(seen) >= 2
    assert all(entry == seen[0] for entry in seen)


@pytest.mark.parametrize("estimator", MOVED_AHEAD)
def test_the_validation_gradient_is_taken_ahead_and_the_training_losses_about_theta(estimator):
    case, seen = ZOO["linear"](torch.float64), {"train": [], "val": []}
    vector = lambda: torch.cat([t.detach().flatten() for t in case.theta])  # noqa: E731
    kind = torch.optim.SGD if estimator.endswith("sgd") else torch.optim.AdamW
    drift = OptimizerStep(optimizer_of(case.theta, kind), case.theta).drift()
    start = vector()

    def watched(key, loss):
        def evaluate():
            seen[key].append(vector())
            return loss()

        return evaluate

    problem = case.problem()
    ESTIMATORS[estimator](
        case.problem(train_loss=watched("train", problem.train_loss), val_loss=watched("val", problem.val_loss))
    )

    assert len(seen["val"]) == 1
    expected = torch.cat([d.flatten() for d in drift])
    assert expected.norm() > 0.01
    assert torch.allclose(seen["val"][0] - start, expected, rtol=0, atol=1e-14)
    assert torch.allclose(torch.stack(seen["train"]).mean(dim=0), start, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "estimator", ["guided_adamw", "guided_sgd", "optimizer", "finite_difference_sgd", "t1t2_adamw"]
)
def test_the_state_of_the_optimizer_is_not_touched(estimator):
    case = ZOO["dropout"](torch.float32)
    kept = {}

    class Watched(OptimizerStep):
        def __init__(self, optimizer, theta, max_grad_norm):
            super().__init__(optimizer, theta, max_grad_norm)
            kept["optimizer"], kept["before"] = optimizer, copy.deepcopy(optimizer.state_dict())

    kind = torch.optim.SGD if estimator.endswith("sgd") else torch.optim.AdamW
    base = {
        "guided": guided,
        "optimizer": partial(evograd, noise="optimizer"),
        "finite": finite_difference,
        "t1t2": t1t2,
    }
    base[estimator.split("_")[0]](case.problem(), inner_step=Watched(optimizer_of(case.theta, kind), case.theta, 1.0))

    torch.testing.assert_close(kept["optimizer"].state_dict(), kept["before"], rtol=0, atol=0)


class Renormed(nn.Module):
    """An embedding that writes into its own weight in every forward pass."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, max_norm=0.5)

    def forward(self, indices):
        return self.embedding(indices)


def renormed_problem(**settings):
    model, meta = Renormed(), torch.ones(3, requires_grad=True)
    problem = BilevelProblem(
        list(model.parameters()),
        [meta],
        lambda: (model(torch.arange(4)) * meta).square().sum(),
        lambda: model(torch.arange(1, 5)).sum(),
        **settings,
    )
    return model.embedding.weight, problem


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_that_a_forward_pass_writes_into_come_back(estimator):
    weight, problem = renormed_problem(writes_theta=True)
    before = weight.detach().clone()
    if estimator.startswith("t1t2"):
        # A graph through a weight that changes cannot be differentiated twice: stop before.
        problem = replace(problem, train_loss=throwing_at(0, problem.train_loss))
        with pytest.raises(StopHereError):
            ESTIMATORS[estimator](problem)
    else:
        ESTIMATORS[estimator](problem)

    assert torch.equal(weight, before)


def test_writing_into_theta_without_saying_so_is_an_error():
    _, problem = renormed_problem()
    with pytest.raises(ValueError, match=r"`val_loss` writes into theta.*Set `writes_theta`"):
        evograd(problem, noise="guided")
