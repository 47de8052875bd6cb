"""Scales of the noise and of the selection: absolute, relative, automatic, and taken out by an inner step."""

import pytest
import torch
from problem_zoo import ZOO, literal_evograd, relative_error, unrolled_sgd
from torch.testing import assert_close

from meta_trainer.hypergrad import (
    DEFAULT_SIGMA,
    BilevelProblem,
    GradientDescent,
    evograd,
    finite_difference,
    flat_blocks,
    t1t2,
)
from meta_trainer.hypergrad.flat_blocks import FlatBlocks
from meta_trainer.hypergrad.noise import Perturbations


def as_vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def shaped(vector, theta):
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in theta]), theta, strict=True)]


def matrix(noise, theta, num_candidates, sigma, seed):
    """All perturbations, ``[K, P]``."""
    draw = Perturbations(noise, theta, num_candidates, sigma, seed)
    return torch.stack([torch.cat([block.clone() for block in epsilon]) for epsilon in draw])


def candidates_of(problem_of, theta, **settings):
    """Displacements of theta in the training losses of one estimate, a list of tensors for each candidate."""
    before, seen = [t.detach().clone() for t in theta], []

    def watched(loss):
        def evaluate():
            seen.append([t.detach() - b for t, b in zip(theta, before, strict=True)])
            return loss()

        return evaluate

    problem = problem_of()
    evograd(
        BilevelProblem(problem.theta, problem.meta_params, watched(problem.train_loss), problem.val_loss), **settings
    )
    return seen


# The automatic temperature.


@pytest.mark.parametrize("name", ["dropout", "convolution", "in_the_forward_pass", "direct_term"])
@pytest.mark.parametrize("num_candidates", [2, 3, 8])
@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_the_automatic_temperature_is_the_standard_deviation_of_the_losses(name, num_candidates, noise):
    case = ZOO[name](torch.float64)
    rows = matrix(noise, case.theta, num_candidates, 0.05, seed=2)
    epsilons = [shaped(row, case.theta) for row in rows]
    losses = literal_evograd(case, epsilons, temperature=1.0)["losses"]
    temperature = ((losses - losses.mean()).square().sum() / (num_candidates - 1)).sqrt().item()
    expected = literal_evograd(case, epsilons, temperature)

    found = evograd(case.problem(), num_candidates, 0.05, "auto", noise, seed=2)

    assert relative_error(found.grads, expected["grads"]) < 1e-9
    assert_close(found.weights, expected["weights"], rtol=1e-10, atol=0)
    assert_close(found.val_loss, expected["val_loss"], rtol=1e-12, atol=0)


def test_two_candidates_have_the_same_two_weights_at_the_automatic_temperature():
    weights = evograd(ZOO["linear"](torch.float64).problem(), 2, temperature="auto").weights

    assert_close(weights.sort().values, torch.softmax(torch.tensor([0.0, 2**0.5]).double(), dim=0))


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("settings", [{}, {"noise": "guided"}, {"inner_step": GradientDescent(0.1)}])
def test_the_automatic_temperature_makes_the_unit_of_the_training_loss_irrelevant(settings, dtype, tolerance, factor):
    case = ZOO["linear"](dtype)
    plain = evograd(case.problem(), 4, 0.1, "auto", **settings)
    scaled = case.problem(train_loss=lambda: factor * case.train(case.model, case.meta_params))

    found = evograd(scaled, 4, 0.1, "auto", **settings)

    assert (plain.weights - 0.25).abs().max() > 0.05
    assert_close(found.weights, plain.weights, rtol=tolerance, atol=0)
    # An inner step of a given rate is as much longer as the loss is steeper.
    expected = [g * factor for g in plain.grads] if "inner_step" in settings else plain.grads
    assert relative_error(found.grads, expected) < tolerance


@pytest.mark.parametrize("temperature", [0.05, "auto"])
@pytest.mark.parametrize("settings", [{}, {"noise": "guided"}, {"inner_step": GradientDescent(0.1)}])
def test_equal_losses_have_equal_weights(settings, temperature):
    theta, meta = torch.randn(5, requires_grad=True), torch.tensor([2.0], requires_grad=True)
    problem = BilevelProblem(
        [theta], [meta], lambda: (meta**2).sum() + 0 * theta.sum(), lambda: (theta**2).sum() + (meta**2).sum()
    )

    found = evograd(problem, 4, temperature=temperature, **settings)

    assert found.weights.tolist() == [0.25] * 4
    assert abs(found.val_loss_change) < 1e-9
    # The derivatives of the candidates' losses by the meta-parameter are equal, so that they cancel.
    scale = found.scores.abs().max() / (DEFAULT_SIGMA**2 if "inner_step" in settings else 1)
    assert abs(found.grads[0].item() - 4.0) < 1e-5 * scale


def test_losses_that_differ_by_rounding_alone_are_no_problem():
    theta, meta = torch.randn(50, requires_grad=True), torch.ones(50, requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: 1e4 + (meta * theta).sum() * 1e-5, lambda: (theta**2).sum())

    found = evograd(problem, 4, temperature="auto", inner_step=GradientDescent(0.1))

    assert found.weights.isfinite().all()
    assert found.grads[0].isfinite().all()


def test_a_temperature_may_be_an_integer():
    case = ZOO["linear"](torch.float64)
    assert torch.equal(
        evograd(case.problem(), temperature=1).grads[0], evograd(case.problem(), temperature=1.0).grads[0]
    )


# An inner step takes sigma and the temperature out.


@pytest.mark.parametrize("noise", ["sign", "normal", "guided"])
@pytest.mark.parametrize("num_candidates", [2, 5])
def test_with_an_inner_step_neither_sigma_nor_the_temperature_matters_to_first_order(noise, num_candidates):
    case = ZOO["dropout"](torch.float64)
    step = GradientDescent(0.1)
    found = [
        evograd(case.problem(), num_candidates, sigma, temperature, noise, 3, inner_step=step).grads
        for sigma, temperature in [(1e-5, 1.0), (1e-6, 1.0), (1e-5, 0.05), (1e-5, 1e6)]
    ]

    assert relative_error(found[0], unrolled_sgd(case, 0.1)) < (0.2 if noise == "guided" else torch.inf)
    for other in found[1:]:
        assert relative_error(other, found[0]) < 2e-3


@pytest.mark.parametrize("num_candidates", [2, 3, 4, 5])
def test_at_the_automatic_temperature_an_inner_step_keeps_its_scale(num_candidates):
    """There the weights are never flat, however near the candidates."""
    case = ZOO["linear"](torch.float64)
    step = GradientDescent(1e-3)
    exact = t1t2(case.problem(), inner_step=step).grads

    found = evograd(case.problem(), num_candidates, 1e-4, "auto", "guided", inner_step=step).grads

    assert relative_error(found, exact) < 0.01


def test_an_inner_step_is_proportional_to_its_rate():
    case = ZOO["linear"](torch.float64)
    for noise in ("sign", "guided"):
        one, ten = (evograd(case.problem(), 3, 0.01, noise=noise, inner_step=GradientDescent(lr)) for lr in (0.1, 1.0))
        assert relative_error([10 * g for g in one.grads], ten.grads) < 1e-12
        assert_close(10 * one.val_loss_change, ten.val_loss_change)
        assert torch.equal(one.weights, ten.weights)


@pytest.mark.parametrize("num_candidates", [2, 4])
def test_the_reported_change_of_the_validation_loss_is_that_of_the_inner_step(num_candidates):
    case = ZOO["linear"](torch.float64)
    g_train = as_vector(torch.autograd.grad(case.train(case.model, case.meta_params), case.theta))
    g_val = as_vector(torch.autograd.grad(case.val(case.model, case.meta_params), case.theta))
    expected = -0.1 * g_train @ g_val

    guided = evograd(case.problem(), num_candidates, 1e-4, 10.0, "guided", inner_step=GradientDescent(0.1))

    assert_close(guided.val_loss_change, expected, rtol=1e-3, atol=0)
    assert_close(finite_difference(case.problem(), 0.1).val_loss_change, expected, rtol=1e-3, atol=0)
    assert_close(t1t2(case.problem(), 1e-5).val_loss_change * 1e4, expected, rtol=1e-3, atol=0)


# Relative sigma.


def several(dtype=torch.float32):
    """Tensors of very different sizes, one of zeros, one empty, one scalar, one without a flat view."""
    generator = torch.Generator().manual_seed(8)
    random = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    tensors = [10 * random(6, 5), 0.01 * random(40), torch.zeros(7, dtype=dtype), torch.empty(0, 2, dtype=dtype)]
    tensors += [torch.tensor(-0.5, dtype=dtype), random(4, 9).t()]
    return [t.requires_grad_() for t in tensors]


def problem_of(theta):
    meta = torch.ones(3, requires_grad=True)
    return lambda: BilevelProblem(
        theta,
        [meta],
        lambda: meta.sum() * sum((t.float() ** 2).sum() for t in theta),
        lambda: sum(t.float().sum() for t in theta),
    )


@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_relative_sigma_is_in_units_of_each_tensors_root_mean_square(dtype, size, monkeypatch):
    if size is not None:
        monkeypatch.setattr(flat_blocks, "CPU_BLOCK_SIZE", size)
    theta = several(dtype)
    overall = as_vector([t.double() for t in theta]).square().mean().sqrt()

    displacements = candidates_of(problem_of(theta), theta, num_candidates=3, sigma=0.25, relative_sigma=True)

    for epsilon in displacements:
        for step, t in zip(epsilon, theta, strict=True):
            own = t.detach().double().square().mean().sqrt()
            expected = 0.25 * (own if own > 0 else overall)
            tolerance = 4 * torch.finfo(dtype).eps * float(t.detach().abs().max() + expected if t.numel() else 1.0)
            assert_close(step.double().abs(), expected.expand(step.shape), rtol=1e-5, atol=tolerance)
    signs = torch.cat([torch.cat([s.flatten() for s in epsilon]).sign() for epsilon in displacements])
    assert abs(signs.mean()) < 4 / len(signs) ** 0.5


@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_relative_sigma_equals_the_literal_formula(noise):
    case = ZOO["convolution"](torch.float64)
    scales = torch.cat([t.detach().square().mean().sqrt().expand(t.numel()) for t in case.theta])
    rows = matrix(noise, case.theta, 3, 0.1, seed=4) * torch.where(
        scales > 0, scales, as_vector(case.theta).square().mean().sqrt()
    )
    expected = literal_evograd(case, [shaped(row, case.theta) for row in rows], temperature=0.1)

    found = evograd(case.problem(), 3, 0.1, 0.1, noise, 4, relative_sigma=True)

    assert relative_error(found.grads, expected["grads"]) < 1e-9
    assert_close(found.train_losses, expected["losses"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", ["sign", "normal", "guided"])
def test_relative_sigma_makes_the_unit_of_the_parameters_irrelevant(noise):
    start, meta = torch.randn(6).double(), torch.ones(6).double().requires_grad_()

    def estimate(unit):
        theta = (start * unit).requires_grad_()
        problem = BilevelProblem(
            [theta], [meta], lambda: (meta * theta / unit).sin().sum(), lambda: (theta / unit).exp().sum()
        )
        return evograd(problem, 4, 0.1, noise=noise, relative_sigma=True)

    plain = estimate(1.0)
    for unit in (1e-5, 1e5):
        found = estimate(unit)
        assert_close(found.weights, plain.weights, rtol=1e-9, atol=0)
        assert relative_error(found.grads, plain.grads) < 1e-8


@pytest.mark.parametrize("noise", ["sign", "guided"])
@pytest.mark.parametrize("settings", [{}, {"inner_step": GradientDescent(0.1)}, {"temperature": "auto"}])
def test_relative_sigma_of_nothing_but_zeros_stays_finite(noise, settings):
    theta, meta = torch.zeros(4, requires_grad=True), torch.ones(4, requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: ((theta - meta) ** 2).sum(), lambda: ((theta - 2) ** 2).sum())

    found = evograd(problem, noise=noise, relative_sigma=True, **settings)

    assert found.grads[0].isfinite().all()
    assert found.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("size", [1, 4, 10, None])
def test_spreading_lets_a_scalar_stand_for_all_elements_of_its_tensor(size):
    theta = [t.detach() for t in several()]
    values = [torch.randn(()) if i % 2 else torch.randn_like(t) for i, t in enumerate(theta)]
    blocks = FlatBlocks(theta, size)
    expected = torch.cat([v.expand(t.shape).flatten() for v, t in zip(values, theta, strict=True)])

    found = list(blocks.spread(values))

    assert_close(torch.cat(found), expected, rtol=0, atol=0)
    assert [len(flat) for flat in found] == [block.numel for block in blocks]


def test_spreading_has_the_dtype_of_arithmetic():
    theta = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)]
    assert [f.dtype for f in FlatBlocks(theta).spread([torch.tensor(1.0), torch.tensor(2.0)])] == [
        torch.float32,
        torch.float64,
    ]


# Defaults.


@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_blind_noise_has_the_papers_sigma_by_default(noise):
    case = ZOO["linear"](torch.float64)
    assert DEFAULT_SIGMA == 1e-3
    assert torch.equal(
        evograd(case.problem(), noise=noise).grads[0], evograd(case.problem(), 2, 1e-3, noise=noise).grads[0]
    )


@pytest.mark.parametrize("name", ["linear", "convolution"])
@pytest.mark.parametrize("settings", [{}, {"inner_step": GradientDescent(0.1)}])
def test_guided_noise_changes_the_validation_loss_by_a_thousandth_by_default(name, settings):
    case = ZOO[name](torch.float64)
    found = evograd(case.problem(), 2, noise="guided", **settings)

    assert_close(found.scores, 1e-3 * found.val_loss * torch.tensor([1.0, -1.0]).double())
    sigma = candidates_of(case.problem, case.theta, num_candidates=2, noise="guided")[0]
    assert 1e-6 < as_vector(sigma).norm() < 1e-2


def test_a_central_difference_changes_the_validation_loss_by_a_thousandth_by_default():
    case = ZOO["linear"](torch.float64)
    found = finite_difference(case.problem())

    assert_close(found.scores, 1e-3 * found.val_loss * torch.tensor([1.0, -1.0]).double())


@pytest.mark.parametrize(
    ("slope", "offset", "length"),
    [(1e-6, 5.0, 1e-2), (1e6, 5.0, 1e-6), (1.0, 0.0, 1e-6), (1.0, -2.0, 2e-3), (0.0, 5.0, 0.0)],
    ids=["flat", "steep", "no_loss", "negative_loss", "no_slope"],
)
@pytest.mark.parametrize("estimator", [evograd, finite_difference])
def test_the_default_length_has_bounds(estimator, slope, offset, length):
    theta, meta = torch.zeros(4).double().requires_grad_(), torch.ones(4).double().requires_grad_()
    seen = []

    def train_loss():
        seen.append(theta.detach().norm())
        return (meta * theta).sum()

    problem = BilevelProblem([theta], [meta], train_loss, lambda: offset + slope * theta.sum() / 2)

    found = estimator(problem, **({"noise": "guided"} if estimator is evograd else {}))

    assert_close(seen, [torch.tensor(length).double()] * 2, rtol=1e-6, atol=0)
    assert found.grads[0].isfinite().all()


def test_a_given_sigma_is_taken_for_guided_noise():
    case = ZOO["linear"](torch.float64)
    (first, second) = candidates_of(case.problem, case.theta, num_candidates=2, sigma=0.3, noise="guided")

    assert_close(as_vector(first).norm(), torch.tensor(0.3).double())
    assert_close(as_vector(first), -as_vector(second), rtol=0, atol=1e-15)


@pytest.mark.parametrize("guidance", [1.0, 0.5])
def test_default_and_given_lengths_of_the_same_size_agree(guidance):
    """One is a tensor, the other a number."""
    case = ZOO["linear"](torch.float64)
    default = evograd(case.problem(), 4, noise="guided", guidance=guidance)
    sigma = 1e-3 * default.val_loss / as_vector(torch.autograd.grad(case.val(case.model, []), case.theta)).norm()

    given = evograd(case.problem(), 4, sigma.item(), noise="guided", guidance=guidance)

    assert_close(given.train_losses, default.train_losses, rtol=1e-13, atol=0)
    assert relative_error(given.grads, default.grads) < 1e-8
