"""An inner step of given length, against autograd through the step itself."""

import pytest
import torch
from problem_zoo import ZOO, relative_error
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, NormalizedDescent, evograd, finite_difference, t1t2

ESTIMATORS = {
    "guided": lambda problem, step: evograd(problem, noise="guided", sigma=1e-5, inner_step=step),
    "guided, four candidates": lambda problem, step: evograd(problem, 4, noise="guided", sigma=1e-5, inner_step=step),
    "finite difference": lambda problem, step: finite_difference(problem, step_size=1e-4, inner_step=step),
}


def unrolled(case, lr):
    """Autograd through one step of length `lr`."""
    with torch.random.fork_rng():
        random_state = torch.get_rng_state()
        theta = [t.detach().clone().requires_grad_() for t in case.theta]
        loss = case.train(case.call_at(theta, random_state), case.meta_params)
        slopes = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True, materialize_grads=True)
        norm = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        stepped = [t - lr * slope / norm for t, slope in zip(theta, slopes, strict=True)]
        val_loss = case.val(case.call_at(stepped, random_state), case.meta_params)
        return torch.autograd.grad(val_loss, case.meta_params, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_t1t2_is_autograd_through_the_step(name, lr):
    case = ZOO[name](torch.float64)
    found = t1t2(case.problem(), inner_step=NormalizedDescent(lr)).grads
    assert relative_error(found, unrolled(case, lr)) < 1e-9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ZOO)
def test_first_order_estimators_come_near_it_as_the_step_gets_short(name, estimator):
    case, lr = ZOO[name](torch.float64), 1e-6
    found = ESTIMATORS[estimator](case.problem(), NormalizedDescent(lr)).grads
    assert relative_error(found, unrolled(case, lr)) < 1e-3


class Weighed:
    """A regression whose examples have learned weights; `scale` is a further one of the whole objective."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.inputs, self.targets, self.held_out = torch.randn(3, 8, 3).double().unbind()
        self.logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def losses(self):
        return (self.model(self.inputs) - self.targets[:, :1]).square().mean(dim=1)

    def train_loss(self):
        return self.scale * torch.softmax(self.logits, dim=0) @ self.losses()

    def problem(self, **changes):
        settings = {
            "theta": list(self.model.parameters()),
            "meta_params": [self.logits, self.scale],
            "train_loss": self.train_loss,
            "val_loss": lambda: self.model(self.held_out).square().mean(),
        }
        return BilevelProblem(**(settings | changes))


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "exact"])
def test_a_longer_training_gradient_has_no_reward(estimator):
    """By the scale of the objective a plain step is longer, and one of given length the same."""
    weighed, step = Weighed(), NormalizedDescent(1e-3)
    estimate = ESTIMATORS.get(estimator, lambda problem, step: t1t2(problem, inner_step=step))
    by_logits, by_scale = estimate(weighed.problem(), step).grads
    assert by_scale.abs() < 1e-6 * by_logits.norm()
    assert t1t2(weighed.problem(), lr=1e-3).grads[1].abs() > 1e-6


def test_what_is_reported_is_the_change_that_the_step_makes():
    weighed, lr = Weighed(), 1e-4
    problem = weighed.problem()
    before = problem.val_loss().item()
    found = t1t2(problem, inner_step=NormalizedDescent(lr))
    assert found.val_loss_change.item() == pytest.approx(found.val_loss.item() - before, rel=1e-2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_terms_of_a_training_loss_give_what_their_sum_gives(estimator):
    weighed, step = Weighed(), NormalizedDescent(1e-3)

    def term(rows):
        return lambda: weighed.scale * torch.softmax(weighed.logits, dim=0)[rows] @ weighed.losses()[rows]

    whole = ESTIMATORS[estimator](weighed.problem(), step).grads
    split = ESTIMATORS[estimator](weighed.problem(train_loss=[term(slice(3)), term(slice(3, 8))]), step).grads
    assert_close(split, whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_quotient_of_sums_is_the_loss_whose_gradient_is_followed(estimator):
    weighed, step = Weighed(), NormalizedDescent(1e-3)

    def objective():
        weights = torch.sigmoid(weighed.logits)
        return weights @ weighed.losses() / weights.sum()

    def term(rows):
        def parts():
            weights = torch.sigmoid(weighed.logits)[rows]
            return weights @ weighed.losses()[rows], weights.sum()

        return parts

    parameters = {"meta_params": [weighed.logits]}
    whole = ESTIMATORS[estimator](weighed.problem(train_loss=objective, **parameters), step).grads
    terms = [term(slice(3)), term(slice(3, 8))]
    split = ESTIMATORS[estimator](weighed.problem(train_loss=terms, **parameters), step).grads
    assert_close(split, whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_it_leaves_no_trace(estimator):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    inputs, labels = torch.randn(6, 4), torch.randint(2, (6,))
    weights = torch.zeros(6, requires_grad=True)
    problem = BilevelProblem(
        theta=list(model.parameters()),
        meta_params=[weights],
        train_loss=lambda: torch.sigmoid(weights) @ F.cross_entropy(model(inputs), labels, reduction="none"),
        val_loss=lambda: F.cross_entropy(model(inputs.flip(0)), labels),
        state=list(model.buffers()),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (ESTIMATORS[estimator](problem, NormalizedDescent(1e-2)).grads[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), weights))


def test_without_a_training_gradient_there_is_no_step_and_no_hypergradient():
    theta, weight = [torch.ones(3, dtype=torch.float64, requires_grad=True)], torch.ones((), requires_grad=True)
    problem = BilevelProblem(theta, [weight], lambda: weight * (theta[0] - 1).square().sum(), lambda: theta[0].sum())
    step = NormalizedDescent(0.1)
    assert [u.tolist() for u in step.displacement([torch.zeros(2)])] == [[0, 0]]
    for estimate in (*ESTIMATORS.values(), lambda problem, step: t1t2(problem, inner_step=step)):
        assert estimate(problem, step).grads[0] == 0


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_its_length_is_positive(lr):
    with pytest.raises(ValueError, match="`lr` should be a positive, finite number"):
        NormalizedDescent(lr)


def test_the_rates_of_no_gradient_are_refused():
    with pytest.raises(ValueError, match="need the training gradient, got none"):
        NormalizedDescent(0.1).precondition([torch.ones(2)])


def test_blind_noise_is_refused():
    problem = Weighed().problem()
    for noise in ("optimizer", "sign", "normal"):
        with pytest.raises(ValueError, match=r"(of given length needs noise='guided'|needs noise='optimizer' or 'gui)"):
            evograd(problem, noise=noise, inner_step=NormalizedDescent(0.1))
    with pytest.raises(ValueError, match="`relative_sigma` and `guidance` do not go with"):
        evograd(problem, noise="guided", relative_sigma=True, inner_step=NormalizedDescent(0.1))
