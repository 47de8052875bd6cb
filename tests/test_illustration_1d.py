"""The one-dimensional illustration: its closed forms, what its estimators do, and what the script writes."""

import json
import math
import random
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import illustration_1d
from illustration_1d import (
    BEST_LAMBDA,
    BEST_X,
    ESTIMATORS,
    LAMBDAS,
    SIGMA,
    STARTS,
    TEMPERATURE,
    Estimator,
    limit,
    optimum,
    problem,
    trajectory,
    true_hypergradient,
)

REPETITIONS = 25
EVOGRAD, GUIDED = ESTIMATORS[:3], ESTIMATORS[3]


@pytest.fixture(scope="module")
def estimates():
    """Of every estimator with random candidates, ``[REPETITIONS]`` for each of three lambdas, at x*."""
    rng = random.Random(0)
    return {
        (e.num_candidates, lam): np.array([e(optimum(lam), lam, rng.getrandbits(63)) for _ in range(REPETITIONS)])
        for e in EVOGRAD
        for lam in (0.0, 0.5, 2.0)
    }


# ---------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.0])
def test_the_true_hypergradient_is_that_of_implicit_differentiation(lam):
    stated = problem(optimum(lam), lam)
    (slope,) = torch.autograd.grad(stated.train_loss(), stated.theta, create_graph=True)
    curvature, mixed = torch.autograd.grad(slope, [*stated.theta, *stated.meta_params])
    (val_slope,) = torch.autograd.grad(stated.val_loss(), stated.theta)

    assert slope.item() == pytest.approx(0, abs=1e-15)
    assert true_hypergradient(lam) == pytest.approx((-val_slope * mixed / curvature).item(), abs=1e-14)


def test_the_best_lambda_has_the_lowest_validation_loss_at_the_minimum_of_the_training_loss():
    lambdas = np.linspace(0, 2, 41)
    losses = [problem(optimum(lam), lam).val_loss().item() for lam in lambdas]

    assert lambdas[np.argmin(losses)] == BEST_LAMBDA
    assert optimum(BEST_LAMBDA) == BEST_X
    assert true_hypergradient(BEST_LAMBDA) == 0


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.0), (0.0, 1.0)])
def test_the_limit_is_the_derivative_through_a_dense_grid_of_candidates(lam, mean, std):
    nodes, chances = np.polynomial.hermite_e.hermegauss(20)
    epsilon = torch.linspace(-8, 8, 2001, dtype=torch.float64) * SIGMA
    meta = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for x, chance in zip(mean + std * nodes, chances / chances.sum(), strict=True):
        candidates = x + epsilon
        losses = (candidates - 1) ** 2 + meta * candidates**2
        weights = torch.softmax(-losses / TEMPERATURE - (epsilon / SIGMA) ** 2 / 2, dim=0)
        expected = expected + chance * (weights @ candidates - 0.5) ** 2
    expected.backward()

    assert limit(lam, mean, std) == pytest.approx(meta.grad.item(), abs=1e-10)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_at_the_optimum_the_limit_is_the_truth_with_a_damped_curvature(lam):
    curvature = 2 * (1 + lam)
    damped = curvature / (curvature + TEMPERATURE / SIGMA**2)
    assert limit(lam, optimum(lam), 0.0) == pytest.approx(damped * true_hypergradient(lam), abs=1e-15)
    assert 0.8 <= damped <= 0.93


# ------------------------------------------------------------------------------------------------------ estimators


def test_the_mean_of_many_candidates_has_the_sign_and_the_shape_of_the_truth(estimates):
    means = {lam: values.mean() for (k, lam), values in estimates.items() if k == 100}
    for lam, mean in means.items():
        expected = limit(lam, optimum(lam), 0.0)
        standard_error = estimates[100, lam].std(ddof=1) / math.sqrt(REPETITIONS)
        assert standard_error < 0.1 * abs(expected)
        assert abs(mean - expected) < 4 * standard_error
        assert mean * true_hypergradient(lam) > 0
    assert means[0.0] < means[0.5] < means[2.0]


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_the_standard_deviation_falls_with_the_number_of_candidates(estimates, lam):
    two, ten, hundred = (estimates[e.num_candidates, lam].std(ddof=1) for e in EVOGRAD)
    assert two > 1.5 * ten > 1.5 * 1.5 * hundred


@pytest.mark.parametrize("lam", LAMBDAS)
def test_guided_candidates_have_no_randomness_and_are_off_by_half_the_distance_to_the_best_lambda(lam):
    found = {GUIDED(optimum(lam), lam, seed) for seed in range(5)}
    assert len(found) == 1
    assert found.pop() == pytest.approx((1 + (lam - BEST_LAMBDA) / 2) * true_hypergradient(lam), abs=1e-14)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_guided_candidates_with_the_papers_sigma_would_be_four_to_twelve_times_too_long(lam):
    wide = Estimator("wide", 2, SIGMA, "guided", "black")
    found = wide(optimum(lam), lam, 0)
    assert found == pytest.approx(4 * (1 + lam) * true_hypergradient(lam), abs=1e-13)


# ---------------------------------------------------------------------------------------------------- trajectories


def test_a_trajectory_takes_the_hypergradient_at_the_new_x():
    points = trajectory((1.0, 0.5), lambda x, lam: 10 * x + lam)
    # The slope of the training loss is 2 (x - 1) + 2 lambda x = 1.
    assert points[1] == pytest.approx((0.9, 0.5 - 0.1 * 9.5), rel=1e-12)
    assert len(points) == illustration_1d.STEPS + 1


@pytest.mark.parametrize("start", STARTS)
def test_the_truth_leads_to_the_best_lambda_and_its_x(start, monkeypatch):
    monkeypatch.setattr(illustration_1d, "STEPS", 2000)
    points = np.array(trajectory(start, lambda x, lam: true_hypergradient(lam)))
    distances = np.abs(points[:, 1] - BEST_LAMBDA)
    assert (np.diff(distances) <= 0).all()
    assert points[-1] == pytest.approx((BEST_X, BEST_LAMBDA), abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS[2:], ids=lambda estimator: estimator.name)
def test_near_the_optimum_of_x_estimates_lead_towards_the_best_lambda(estimator):
    start = (optimum(0.3), 0.3)
    points = trajectory(start, lambda x, lam: estimator(x, lam, 0))
    distances = np.abs(np.array(points)[:, 1] - BEST_LAMBDA)
    assert (np.diff(distances) < 0).all()


# ------------------------------------------------------------------------------------------------------ the script


def test_the_command_writes_pictures_and_numbers_that_its_seed_decides(tmp_path, monkeypatch, capsys):
    # Two panels and one path from each start are enough here.
    monkeypatch.setattr(illustration_1d, "ESTIMATORS", (ESTIMATORS[0], GUIDED))
    monkeypatch.setattr(illustration_1d, "TRAJECTORIES", 1)
    contents = []
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        illustration_1d.main(["--output", str(tmp_path / folder), "--repetitions", "2", "--seed", seed])
        contents.append(json.loads((tmp_path / folder / "illustration_1d.json").read_text(encoding="utf-8")))
    first, same, other = contents

    assert "guided, K = 2  rms error" in capsys.readouterr().out
    assert first["estimates"] == same["estimates"] != other["estimates"]
    assert first["trajectories"] == same["trajectories"] != other["trajectories"]
    assert first["truth"] == [true_hypergradient(lam) for lam in LAMBDAS]
    assert [(e["point"], e["estimator"]) for e in first["estimates"]] == [
        (point, name) for point in illustration_1d.POINTS for name in ("K = 2", "guided, K = 2")
    ]
    guided = first["estimates"][1]
    assert guided["std"] == [0.0] * len(LAMBDAS)
    assert guided["right_signs"] == 1.0
    assert len(first["trajectories"]) == len(STARTS) * (1 + 2 * illustration_1d.TRAJECTORIES)
    for name in ("estimates", "trajectories"):
        pixels = matplotlib.image.imread(tmp_path / "a" / f"illustration_{name}.png")[..., :3]
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.05


def test_at_least_one_repetition_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        illustration_1d.main(["--repetitions", "0"])
    assert "--repetitions should be at least 1, got 0" in capsys.readouterr().err
