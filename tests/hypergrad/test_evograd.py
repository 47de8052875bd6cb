"""EvoGrad against the formula as the paper writes it."""

import pytest
import torch
from problem_zoo import ZOO, literal_evograd, relative_error
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, evograd, loss_cotangents
from meta_trainer.hypergrad.noise import Perturbations


def gaussian(scale):
    """Perturbations as a function, the same for the same candidate."""

    def noise(k, theta):
        generator = torch.Generator().manual_seed(100 + k)
        return [scale * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in theta]

    return noise


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("num_candidates", [2, 3, 8])
def test_evograd_equals_the_literal_formula_in_float64(name, num_candidates):
    case = ZOO[name](torch.float64)
    noise = gaussian(0.1)
    epsilons = [noise(k, case.theta) for k in range(num_candidates)]
    expected = literal_evograd(case, epsilons, temperature=0.2)

    found = evograd(case.problem(), num_candidates, temperature=0.2, noise=noise)

    assert max(g.abs().max() for g in expected["grads"]) > 1e-6
    assert relative_error(found.grads, expected["grads"]) < 1e-9
    assert_close(found.train_losses, expected["losses"], rtol=1e-12, atol=1e-12)
    assert_close(found.weights, expected["weights"], rtol=1e-12, atol=1e-12)
    assert_close(found.val_loss, expected["val_loss"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_evograd_draws_the_named_perturbations(name, noise):
    case = ZOO[name](torch.float64)
    perturbations = Perturbations(noise, case.theta, num_candidates=4, sigma=0.05, seed=3)
    sizes, vectors = (
        [t.numel() for t in case.theta],
        [torch.cat([block.clone() for block in epsilon]) for epsilon in perturbations],
    )
    epsilons = [
        [part.view(t.shape) for part, t in zip(vector.split(sizes), case.theta, strict=True)] for vector in vectors
    ]
    expected = literal_evograd(case, epsilons, temperature=0.1)

    found = evograd(case.problem(), num_candidates=4, sigma=0.05, temperature=0.1, noise=noise, seed=3)

    assert relative_error(found.grads, expected["grads"]) < 1e-9


@pytest.mark.parametrize("name", ZOO)
def test_evograd_equals_the_literal_formula_in_float32(name):
    case = ZOO[name](torch.float32)
    epsilons = [gaussian(0.1)(k, case.theta) for k in range(4)]
    expected = literal_evograd(case, epsilons, temperature=0.2)

    found = evograd(case.problem(), num_candidates=4, temperature=0.2, noise=gaussian(0.1))

    assert {g.dtype for g in found.grads} == {torch.float32}
    assert relative_error(found.grads, expected["grads"]) < 1e-5


def test_the_papers_sigma_leaves_float32_three_digits():
    torch.manual_seed(1)
    single = ZOO["linear"](torch.float32)
    torch.manual_seed(1)
    double = ZOO["linear"](torch.float64)
    epsilons = [gaussian(1e-3)(k, single.theta) for k in range(2)]
    exact = literal_evograd(double, [[e.double() for e in eps] for eps in epsilons], temperature=0.05)

    found = evograd(single.problem(), num_candidates=2, temperature=0.05, noise=gaussian(1e-3))

    assert relative_error(found.grads, exact["grads"]) < 1e-3


@pytest.mark.parametrize("name", ["dropout", "batch_norm", "direct_term"])
def test_a_loss_scale_of_a_power_of_two_changes_no_bit(name):
    case = ZOO[name](torch.float64)
    plain = evograd(case.problem(), num_candidates=3, sigma=0.1, noise="normal")
    scaled = evograd(case.problem(loss_scale=torch.tensor(2.0**16)), num_candidates=3, sigma=0.1, noise="normal")

    for a, b in zip(plain.grads, scaled.grads, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.scores, scaled.scores)
    assert torch.equal(plain.val_loss, scaled.val_loss)


def test_scores_are_slopes_of_the_validation_loss_along_the_perturbations():
    case = ZOO["linear"](torch.float64)
    epsilons = [gaussian(0.1)(k, case.theta) for k in range(3)]
    found = evograd(case.problem(), 3, temperature=0.2, noise=gaussian(0.1))
    star = [t.detach() + sum(w * e for w, e in zip(found.weights, group, strict=True))
            for t, group in zip(case.theta, zip(*epsilons, strict=True), strict=True)]  # fmt: skip

    def val_at(shift, epsilon):
        theta = [t + shift * e for t, e in zip(star, epsilon, strict=True)]
        return case.val(case.call_at(theta, torch.get_rng_state()), case.meta_params).detach()

    slopes = torch.stack([(val_at(1e-5, e) - val_at(-1e-5, e)) / 2e-5 for e in epsilons])
    assert_close(found.scores, slopes, rtol=1e-7, atol=1e-9)


def test_loss_cotangents_is_the_vjp_of_the_candidate_weights():
    losses = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.softmax(-losses / 0.3, dim=0) @ scores, losses)

    assert_close(loss_cotangents(losses.detach(), scores, temperature=0.3), expected)


def test_loss_cotangents_sum_to_zero_and_ignore_a_common_score():
    losses, scores = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    cotangents = loss_cotangents(losses, scores, temperature=1.0)

    assert cotangents.abs().max() > 0.1
    assert cotangents.sum().abs() < 1e-14
    assert_close(loss_cotangents(losses, scores + 7, temperature=1.0), cotangents)


def test_loss_cotangents_of_two_equal_losses_by_hand():
    """With w = 1/2 each: c = -(1/2) (s_1 - s_2) / 2 / tau and its opposite."""
    found = loss_cotangents(torch.tensor([0.3, 0.3]), torch.tensor([2.0, -1.0]), temperature=0.5)
    assert_close(found, torch.tensor([-1.5, 1.5]))


def test_a_batch_that_moves_no_candidate_apart_gives_the_direct_term_alone():
    case = ZOO["direct_term"](torch.float64)
    noise = lambda k, theta: [torch.zeros_like(t) for t in theta]  # noqa: E731
    (expected,) = torch.autograd.grad(case.val(case.model, case.meta_params), case.meta_params)

    found = evograd(case.problem(), 3, noise=noise)

    assert_close(found.grads[0], expected)
    assert_close(found.weights, torch.full_like(found.weights, 1 / 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_have_losses_and_weights_of_single_precision(dtype):
    theta = torch.randn(6).to(dtype).requires_grad_()
    meta = torch.zeros(6, requires_grad=True)
    problem = BilevelProblem(
        [theta], [meta], lambda: (torch.sigmoid(meta) * theta**2).mean(), lambda: ((theta - 1) ** 2).mean()
    )

    found = evograd(problem, num_candidates=3, sigma=0.25)

    assert {t.dtype for t in (*found.grads, found.train_losses, found.weights, found.scores)} == {torch.float32}
    assert found.grads[0].norm() > 0
