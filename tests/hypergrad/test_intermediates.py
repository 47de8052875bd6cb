"""What candidates have in common of the meta-parameters' graph: differentiated once, with the same result."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference


class Transformed:
    """A head on features that two learned maps have transformed, one after the other."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.features, self.held_out = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
        self.labels = torch.randint(3, (6,))
        self.first, self.second = nn.Linear(4, 4).to(dtype), nn.Linear(4, 4).to(dtype)
        self.weights = torch.randn(6).to(dtype).requires_grad_()
        self.head = nn.Linear(4, 3).to(dtype)
        self.runs = 0

    @property
    def meta_params(self):
        return [*self.first.parameters(), *self.second.parameters(), self.weights]

    def transform(self, cut):
        """Two values that the head reads, the second computed from the first; `cut` makes a leaf of each."""
        self.runs += 1
        one = cut(torch.tanh(self.first(self.features)))
        return one, cut(torch.tanh(self.second(one)))

    def objective(self, one, two):
        losses = F.cross_entropy(self.head(one + two), self.labels, reduction="none")
        return (torch.sigmoid(self.weights) * losses).mean()

    def val_loss(self):
        return F.cross_entropy(self.head(self.held_out), self.labels.flip(0)) + self.weights.square().mean()

    def problem(self, **changes):
        train_loss = lambda: self.objective(*self.transform(lambda value: value))  # noqa: E731
        return BilevelProblem(list(self.head.parameters()), self.meta_params, train_loss, self.val_loss, **changes)

    def shared_problem(self, **changes):
        pairs, leaves = [], []

        def cut(value):
            pairs.append((value.detach().requires_grad_(), value))
            return pairs[-1][0]

        def train_loss():
            if not leaves:
                leaves.extend(self.transform(cut))
            return self.objective(*leaves)

        settings = {"intermediates": pairs, **changes}
        return BilevelProblem(list(self.head.parameters()), self.meta_params, train_loss, self.val_loss, **settings)


@pytest.mark.parametrize(
    ("estimator", "settings"), [(evograd, {"num_candidates": 5, "sigma": 0.1}), (finite_difference, {})]
)
@pytest.mark.parametrize("loss_scale", [None, torch.tensor(1024.0)])
def test_intermediates_change_the_cost_and_not_the_result(estimator, settings, loss_scale):
    case = Transformed()
    expected, separate_runs = estimator(case.problem(loss_scale=loss_scale), **settings), case.runs

    found = estimator(case.shared_problem(loss_scale=loss_scale), **settings)

    assert case.runs - separate_runs == 1 < separate_runs
    assert min(grad.abs().max() for grad in expected.grads) > 1e-9
    assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-15)
    assert_close(found.train_losses, expected.train_losses, rtol=0, atol=0)


def test_derivatives_of_half_precision_are_summed_up_in_single_precision():
    """The candidates' derivatives nearly cancel, so that their sum would be lost in the rounding errors."""
    leaf_value = torch.linspace(1, 2, 64)
    meta, theta = torch.ones(64, requires_grad=True), torch.ones(()).requires_grad_()
    pairs = []

    def train_loss():
        if not pairs:
            value = (leaf_value * meta).half()
            pairs.append((value.detach().requires_grad_(), value))
        return (pairs[0][0].float() * (1 + theta)).mean()

    problem = BilevelProblem([theta], [meta], train_loss, lambda: 3 * theta, intermediates=pairs)
    noise = lambda k, theta: [torch.full_like(theta[0], 0.01 * (k + 1))]  # noqa: E731
    found = evograd(problem, num_candidates=2, temperature=10.0, noise=noise)

    # The derivative of a candidate's loss is (1 + theta_k) / 64 times the feature.
    losses = found.train_losses.double()
    weights = torch.softmax(-losses / 10, dim=0)
    scores = 3 * torch.tensor([0.01, 0.02]).double()
    cotangents = -weights * (scores - weights @ scores) / 10
    expected = (cotangents @ torch.tensor([2.01, 2.02]).double()) / 64 * leaf_value.double()
    assert_close(found.grads[0].double(), expected, rtol=0.1, atol=0)


def test_a_leaf_that_no_candidate_reads_has_no_influence():
    case = Transformed()
    expected = evograd(case.problem()).grads
    problem = case.shared_problem()
    unread = case.first(case.features)
    problem.intermediates.append((unread.detach().requires_grad_(), unread))

    assert_close(evograd(problem).grads, expected, rtol=1e-9, atol=1e-15)
