r"""The paper's one-dimensional problem, where everything has a closed form.

The training loss is (x - 1)^2 + lambda x^2, with its minimum at x* = 1 / (1 + lambda). The validation loss
is (x - 0.5)^2. The true hypergradient at x* is (lambda - 1) / (lambda + 1)^3.

Up to a constant the training loss is (1 + lambda) (x - x*)^2. With Gaussian noise and K -> infinity the
candidates, weighed by exp(-loss / tau), are therefore Gaussian again. With a = 2 (1 + lambda), their
precision is 1 / s^2 = 1 / sigma^2 + a / tau and their mean m = s^2 (x / sigma^2 + a x* / tau). There
theta* = m, and as d theta* / d lambda = -Cov(theta, theta^2) / tau = -2 m s^2 / tau, the estimate is
h = 2 (m - 0.5) (-2 m) / (tau / sigma^2 + a).
"""

import math

import pytest
import torch

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2

LAMBDAS = [0.0, 0.4, 1.0, 2.5]


def problem(x, lam):
    theta = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    meta = torch.tensor([lam], dtype=torch.float64, requires_grad=True)
    return BilevelProblem(
        theta=[theta],
        meta_params=[meta],
        train_loss=lambda: ((theta - 1) ** 2 + meta * theta**2).sum(),
        val_loss=lambda: ((theta - 0.5) ** 2).sum(),
    )


def limit(x, lam, sigma, temperature):
    """Closed forms for infinitely many candidates: theta* and the hypergradient."""
    a, optimum = 2 * (1 + lam), 1 / (1 + lam)
    mean = (x / sigma**2 + a * optimum / temperature) / (1 / sigma**2 + a / temperature)
    return mean, 2 * (mean - 0.5) * (-2 * mean) / (temperature / sigma**2 + a)


def quantiles(sigma, count):
    """The midpoints of equally likely slices of a Gaussian: noise without its randomness."""
    points = sigma * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return lambda k, theta: [points[k : k + 1]]


def truth(lam):
    return (lam - 1) / (lam + 1) ** 3


@pytest.mark.parametrize("lam", LAMBDAS)
def test_two_candidates_by_hand(lam):
    x, epsilon, tau = 0.7, (0.3, -0.2), 0.5
    candidates = [x + e for e in epsilon]
    losses = [(c - 1) ** 2 + lam * c**2 for c in candidates]
    odds = [math.exp(-loss / tau) for loss in losses]
    weights = [o / sum(odds) for o in odds]
    star = weights[0] * candidates[0] + weights[1] * candidates[1]
    # w_0 is a logistic function of (l_1 - l_0) / tau, and dl_k / dlambda = x_k^2.
    slope_of_weight = weights[0] * weights[1] * (candidates[1] ** 2 - candidates[0] ** 2) / tau
    expected = 2 * (star - 0.5) * slope_of_weight * (candidates[0] - candidates[1])

    noise = lambda k, theta: [torch.tensor([epsilon[k]], dtype=torch.float64)]  # noqa: E731
    found = evograd(problem(x, lam), 2, temperature=tau, noise=noise)

    assert found.grads[0].item() == pytest.approx(expected, rel=1e-12)
    assert found.train_losses.tolist() == pytest.approx(losses, rel=1e-12)
    assert found.weights.tolist() == pytest.approx(weights, rel=1e-12)
    assert found.scores.tolist() == pytest.approx([2 * (star - 0.5) * e for e in epsilon], rel=1e-12)
    assert found.val_loss.item() == pytest.approx((star - 0.5) ** 2, rel=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.4, 2.5])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_many_candidates_reach_the_limit_of_gaussian_noise(lam, offset):
    """Slices of 1 / K leave a relative error of the order 1 / K."""
    x, sigma, tau = 1 / (1 + lam) + offset, 1.0, 0.5
    star, expected = limit(x, lam, sigma, tau)

    found = evograd(problem(x, lam), 1000, temperature=tau, noise=quantiles(sigma, 1000))

    assert found.grads[0].item() == pytest.approx(expected, rel=5e-3)
    assert found.val_loss.item() == pytest.approx((star - 0.5) ** 2, rel=5e-3)


def test_normal_noise_reaches_the_same_limit_within_its_standard_error():
    lam, sigma, tau = 0.4, 1.0, 0.5
    _, expected = limit(1 / (1 + lam), lam, sigma, tau)
    found = torch.stack(
        [evograd(problem(1 / (1 + lam), lam), 300, sigma, tau, "normal", seed).grads[0] for seed in range(24)]
    )

    standard_error = found.std() / math.sqrt(24)
    assert standard_error < 0.06 * abs(expected)
    assert abs(found.mean() - expected) < 4 * standard_error


@pytest.mark.parametrize("lam", [0.0, 0.4, 2.5])
def test_wide_noise_gives_the_true_hypergradient(lam):
    _, expected = limit(1 / (1 + lam), lam, sigma=10.0, temperature=0.5)
    assert expected == pytest.approx(truth(lam), rel=5e-3)

    found = evograd(problem(1 / (1 + lam), lam), 2000, temperature=0.5, noise=quantiles(10.0, 2000))

    assert found.grads[0].item() == pytest.approx(truth(lam), rel=2e-2)


def test_the_true_hypergradient_vanishes_where_the_optimum_is_the_target():
    found = evograd(problem(0.5, 1.0), 1000, temperature=0.5, noise=quantiles(1.0, 1000))
    assert abs(found.grads[0].item()) < 1e-12


@pytest.mark.parametrize("lam", LAMBDAS)
def test_t1t2_with_a_newton_step_gives_the_true_hypergradient(lam):
    """At x* the step size 1 / a inverts the curvature: the step is the best response to first order."""
    found = t1t2(problem(1 / (1 + lam), lam), lr=1 / (2 * (1 + lam)))
    assert found.grads[0].item() == pytest.approx(truth(lam), rel=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.4, 2.5])
@pytest.mark.parametrize("step_size", [1e-3, 1.0])
def test_finite_difference_is_exact_on_a_quadratic(lam, step_size):
    """d loss / d lambda = x^2 has no third derivative; at x* the inner step does not move x."""
    found = finite_difference(problem(1 / (1 + lam), lam), lr=1 / (2 * (1 + lam)), step_size=step_size)
    assert found.grads[0].item() == pytest.approx(truth(lam), rel=1e-9)
