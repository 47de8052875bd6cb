"""T1-T2 and finite differences, and what EvoGrad estimates on average."""

from itertools import pairwise

import pytest
import torch
from problem_zoo import ZOO, relative_error, unrolled_sgd
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2


@pytest.mark.parametrize("name", ZOO)
def test_t1t2_equals_autograd_through_one_step(name):
    case = ZOO[name](torch.float64)
    expected = unrolled_sgd(case, lr=0.3)

    found = t1t2(case.problem(), lr=0.3)

    assert max(g.abs().max() for g in expected) > 1e-6
    assert relative_error(found.grads, expected) < 1e-9


def test_t1t2_reports_the_change_that_its_step_makes_to_first_order():
    case = ZOO["linear"](torch.float64)
    before = case.val(case.model, case.meta_params).item()

    found = t1t2(case.problem(), lr=1e-4)

    assert_close(found.train_losses, case.train(case.model, case.meta_params).detach()[None])
    assert found.weights.tolist() == [1]
    assert found.scores.item() == pytest.approx(found.val_loss.item() - before, rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "dropout", "batch_norm", "tied", "in_the_forward_pass"])
def test_finite_difference_nears_t1t2_with_the_square_of_its_step_size(name):
    """The inner step is so small that what is left of the error is that of the difference."""
    case = ZOO[name](torch.float64)
    exact = t1t2(case.problem(), lr=1e-10).grads

    errors = [
        relative_error(finite_difference(case.problem(), 1e-10, step).grads, exact) for step in (0.04, 0.02, 0.01)
    ]

    assert errors[2] < 1e-2
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(4, rel=0.1)


def test_finite_difference_nears_t1t2_linearly_with_the_learning_rate():
    case = ZOO["linear"](torch.float64)
    errors = [
        relative_error(finite_difference(case.problem(), lr, 1e-4).grads, t1t2(case.problem(), lr).grads)
        for lr in (0.02, 0.01)
    ]

    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_finite_difference_reports_both_sides():
    case = ZOO["linear"](torch.float64)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(case.val(case.model, []), case.theta)])

    found = finite_difference(case.problem(), step_size=0.02)

    assert_close(found.scores, 0.02 * grad.norm() * torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert found.weights.tolist() == [0.5, 0.5]
    assert_close(found.val_loss, case.val(case.model, []).detach())
    slope = (found.train_losses[0] - found.train_losses[1]) / 0.04
    train_grad = torch.cat(
        [g.flatten() for g in torch.autograd.grad(case.train(case.model, case.meta_params), case.theta)]
    )
    assert slope.item() == pytest.approx((train_grad @ grad / grad.norm()).item(), rel=1e-3)


def test_finite_difference_of_a_vanishing_validation_gradient_is_the_direct_term():
    theta, meta = torch.ones(2, requires_grad=True), torch.tensor([3.0], requires_grad=True)
    problem = BilevelProblem(
        [theta], [meta], lambda: (meta * theta**2).sum(), lambda: (theta * 0).sum() + (meta**2).sum()
    )

    assert finite_difference(problem).grads[0].tolist() == [6.0]


@pytest.mark.parametrize("estimator", [evograd, t1t2, finite_difference])
def test_a_loss_that_no_meta_parameter_reaches_gives_zero(estimator):
    theta, meta = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: theta.sum(), lambda: (theta**2).sum())

    assert estimator(problem).grads[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("estimator", [t1t2, finite_difference])
def test_a_loss_scale_of_a_power_of_two_changes_no_bit(estimator):
    case = ZOO["direct_term"](torch.float64)
    plain, scaled = estimator(case.problem()), estimator(case.problem(loss_scale=torch.tensor(2.0**10)))

    assert torch.equal(plain.grads[0], scaled.grads[0])
    assert torch.equal(plain.scores, scaled.scores)


def test_t1t2_runs_through_scaled_dot_product_attention():
    """The fused attention kernels have no second derivative; eager attention is the oracle."""
    config = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    models = [
        BertForSequenceClassification._from_config(BertConfig(**config), attn_implementation=kind).train()
        for kind in ("sdpa", "eager")
    ]
    models[1].load_state_dict(models[0].state_dict())
    ids, labels, meta = (
        torch.randint(11, (4, 5)),
        torch.tensor([0, 1, 1, 0]),
        torch.zeros(4, requires_grad=True),
    )

    def hypergradient(model):
        def train_loss():
            return (torch.sigmoid(meta) * F.cross_entropy(model(ids).logits, labels, reduction="none")).mean()

        theta = list(model.parameters())
        return t1t2(BilevelProblem(theta, [meta], train_loss, lambda: model(ids, labels=1 - labels).loss), lr=0.1)

    assert models[0].config._attn_implementation == "sdpa"
    sdpa, eager = (hypergradient(model.double()).grads[0] for model in models)
    assert sdpa.norm() > 1e-5
    assert relative_error([sdpa], [eager]) < 1e-5


@pytest.mark.parametrize("name", ["linear", "dropout", "in_the_forward_pass"])
def test_evograd_points_along_t1t2_on_average(name):
    case = ZOO[name](torch.float64)
    exact = torch.cat(t1t2(case.problem(), lr=1e-6).grads)

    estimates = [torch.cat(evograd(case.problem(), 8, sigma=1e-2, seed=seed).grads) for seed in range(150)]

    mean = torch.stack(estimates).mean(dim=0)
    assert torch.cosine_similarity(estimates[0], exact, dim=0) < 0.95
    assert torch.cosine_similarity(mean, exact, dim=0) > 0.95
