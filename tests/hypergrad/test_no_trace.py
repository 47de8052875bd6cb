"""Estimators give back what they touch, bit for bit."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from problem_zoo import ZOO
from torch import nn

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, preserved_random_state, t1t2

ESTIMATORS = {
    "evograd": partial(evograd, num_candidates=3, sigma=0.1),
    "evograd_normal": partial(evograd, num_candidates=2, sigma=0.1, noise="normal"),
    "finite_difference": finite_difference,
    "t1t2": partial(t1t2, lr=0.1),
}
NUM_TRAIN_LOSSES = {"evograd": 3, "evograd_normal": 2, "finite_difference": 2, "t1t2": 1}


class StopHereError(Exception):
    """Thrown inside a loss."""


def bits(tensor):
    return tensor.detach().flatten().view(torch.uint8).clone()


def draws_to_come():
    """What each global generator gives next; leaves their states as they are."""
    with preserved_random_state():
        return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def set_sentinel_grads(tensors):
    for position, tensor in enumerate(tensors):
        tensor.grad = torch.full_like(tensor, 40.0 + position)
    return [(tensor.grad, bits(tensor.grad)) for tensor in tensors]


class Snapshot:
    """Everything that a caller may see of a problem, read now and compared later."""

    def __init__(self, problem):
        self.tensors = [*problem.theta, *problem.meta_params, *problem.state]
        self.leaves = [*problem.theta, *problem.meta_params]
        self.bits = [bits(t) for t in self.tensors]
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.flags = [t.requires_grad for t in self.tensors]
        self.grads = set_sentinel_grads(self.leaves)
        self.draws, self.grad_mode = draws_to_come(), torch.is_grad_enabled()

    def check(self):
        assert [t.data_ptr() for t in self.tensors] == self.addresses
        for tensor, before in zip(self.tensors, self.bits, strict=True):
            assert torch.equal(bits(tensor), before)
        assert [t.requires_grad for t in self.tensors] == self.flags
        for leaf, (grad, before) in zip(self.leaves, self.grads, strict=True):
            assert leaf.grad is grad
            assert torch.equal(bits(grad), before)
        assert draws_to_come() == self.draws
        assert torch.is_grad_enabled() == self.grad_mode


def drawing_everywhere(loss):
    """A loss that draws from every global generator before it is computed."""

    def evaluate():
        random.random(), np.random.rand(), torch.rand(2)
        return loss()

    return evaluate


def throwing_at(call, loss):
    """A loss that throws when it is evaluated for the n-th time, counted from 0."""
    calls = iter(range(100))

    def evaluate():
        value = loss()
        if next(calls) == call:
            raise StopHereError
        return value

    return evaluate


def problem_with(problem, train_loss, val_loss):
    return BilevelProblem(problem.theta, problem.meta_params, train_loss, val_loss, problem.state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ZOO)
def test_success_leaves_no_trace(name, estimator):
    problem = ZOO[name](torch.float32).problem()
    problem = problem_with(problem, drawing_everywhere(problem.train_loss), drawing_everywhere(problem.val_loss))
    snapshot = Snapshot(problem)

    ESTIMATORS[estimator](problem)

    snapshot.check()


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
def test_special_values_come_back_bit_for_bit(estimator):
    """Adding and subtracting a perturbation would lose a negative zero, a denormal and a NaN's payload."""
    theta = torch.tensor([-0.0, 1e-42, -1e-45, 3e38, 1e-20, float("nan"), float("inf")], requires_grad=True)
    theta.data.view(torch.int32)[5] = 0x7FC12345
    meta = torch.tensor([1.0, -0.0, 1e-44], requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: (theta * meta.sum()).sum(), lambda: (theta**2).sum())
    snapshot = Snapshot(problem)

    ESTIMATORS[estimator](problem)

    snapshot.check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("flags", [(False, True), (True, False), (False, False)])
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
    assert not found[0].requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_results_hold_no_graph(estimator):
    found = ESTIMATORS[estimator](ZOO["direct_term"](torch.float64).problem())

    for tensor in (*found.grads, found.val_loss, found.train_losses, found.weights, found.scores):
        assert not tensor.requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_graph_recorded_before_is_still_usable_after(estimator):
    """A gradient-accumulating caller may hold one."""
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

    assert len(seen) == NUM_TRAIN_LOSSES[estimator] + 1
    assert all(entry == seen[0] for entry in seen)
    assert seen[0][0] == 0
