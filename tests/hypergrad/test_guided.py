"""Candidates along the validation gradient: a central difference, and the mean of blind noise."""

import threading

import pytest
import torch
from problem_zoo import ZOO, relative_error, unrolled_sgd
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, GradientDescent, evograd, finite_difference, flat_blocks, t1t2
from meta_trainer.hypergrad.noise import Layout, Perturbations

DISTANCES = {
    2: [1, -1],
    3: [1.5**0.5, -(1.5**0.5), 0],
    4: [3 / 5**0.5, -3 / 5**0.5, 1 / 5**0.5, -1 / 5**0.5],
    5: [2**0.5, -(2**0.5), 0.5**0.5, -(0.5**0.5), 0],
}
"""How far each candidate goes: evenly spaced, of mean zero and mean square 1."""


def as_vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def shaped(vector, theta):
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in theta]), theta, strict=True)]


def validation_gradient(case):
    """Loss and gradients by theta and by the meta-parameters."""
    with torch.random.fork_rng():
        loss = case.val(case.call_at(case.theta, torch.get_rng_state()), case.meta_params)
        inputs = [*case.theta, *case.meta_params]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[: len(case.theta)], grads[len(case.theta) :]


def literal_guided(case, rows, temperature):
    """Autograd through the softmax to <g, theta*>, with g at theta."""
    loss, grads, direct = validation_gradient(case)
    with torch.random.fork_rng():
        random_state = torch.get_rng_state()
        candidates = [
            [t.detach() + e for t, e in zip(case.theta, shaped(row, case.theta), strict=True)] for row in rows
        ]
        losses = torch.stack([case.train(case.call_at(theta, random_state), case.meta_params) for theta in candidates])
    weights, scores = torch.softmax(-losses / temperature, dim=0), rows @ as_vector(grads)
    indirect = torch.autograd.grad(weights @ scores, case.meta_params, allow_unused=True, materialize_grads=True)
    return {
        "grads": [a + b for a, b in zip(direct, indirect, strict=True)],
        "train_losses": losses.detach(),
        "weights": weights.detach(),
        "scores": scores,
        "val_loss": loss,
    }


def guided_rows(case, num_candidates, sigma):
    """The perturbations ``[K, P]``, in the words of the docstring."""
    g = as_vector(validation_gradient(case)[1])
    return torch.tensor(DISTANCES[num_candidates], dtype=g.dtype)[:, None] * sigma * g / g.norm()


def check(found, expected):
    assert relative_error(found.grads, expected["grads"]) < 1e-9
    for name in ("train_losses", "weights", "scores", "val_loss"):
        assert_close(getattr(found, name), expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("num_candidates", DISTANCES)
def test_guided_noise_equals_the_literal_formula_with_the_gradient_at_theta(name, num_candidates):
    case = ZOO[name](torch.float64)
    expected = literal_guided(case, guided_rows(case, num_candidates, 0.3), 0.05)

    found = evograd(case.problem(), num_candidates, 0.3, 0.05, "guided")

    assert (expected["weights"] - 1 / num_candidates).abs().max() > 1e-3
    check(found, expected)


@pytest.mark.parametrize("num_candidates", [3, 4])
def test_with_theta_itself_among_the_candidates(num_candidates):
    case = ZOO["direct_term"](torch.float64)
    rows = guided_rows(case, num_candidates - 1, 0.3)
    expected = literal_guided(case, torch.cat([torch.zeros_like(rows[:1]), rows]), 0.05)

    check(evograd(case.problem(), num_candidates, 0.3, 0.05, "guided", include_unperturbed=True), expected)


@pytest.mark.parametrize("layout", [Layout(), Layout(antithetic=True), Layout(orthogonal=True), Layout(True, True)])
@pytest.mark.parametrize("guidance", [0.9, 0.2])
def test_a_mixture_adds_random_signs_of_the_rest_of_the_variance(guidance, layout):
    case = ZOO["convolution"](torch.float64)
    draw = Perturbations("sign", case.theta, 4, 0.3 * (1 - guidance) ** 0.5, 7, layout)
    signs = torch.stack([torch.cat([block.clone() for block in epsilon]) for epsilon in draw])
    expected = literal_guided(case, guidance**0.5 * guided_rows(case, 4, 0.3) + signs, 0.05)

    found = evograd(
        case.problem(),
        4,
        0.3,
        0.05,
        "guided",
        7,
        guidance=guidance,
        antithetic=layout.antithetic,
        orthogonal=layout.orthogonal,
    )

    check(found, expected)


@pytest.mark.parametrize("name", ["linear", "dropout", "in_the_forward_pass", "direct_term"])
def test_two_candidates_are_darts_central_difference(name):
    """With a flat softmax, w1 w2 = 1/4: the same points, scores and derivatives."""
    case = ZOO[name](torch.float64)
    central = finite_difference(case.problem(), 0.7, 0.02)

    found = evograd(case.problem(), 2, 0.02, 100.0, "guided", inner_step=GradientDescent(0.7))

    assert relative_error(found.grads, central.grads) < 1e-6
    assert_close(found.weights, central.weights, rtol=1e-3, atol=0)
    assert_close(found.train_losses, central.train_losses, rtol=1e-12, atol=0)
    assert_close(found.scores, central.scores, rtol=1e-11, atol=0)
    assert_close(found.val_loss, central.val_loss, rtol=0, atol=0)
    assert_close(found.val_loss_change, central.val_loss_change, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "dropout", "direct_term"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_two_candidates_see_the_central_difference_times_the_slope_of_the_softmax(name, temperature):
    """By hand: c = -+ w1 w2 (s1 - s2) / tau, where the central difference has eta |g| / (2 r)."""
    case = ZOO[name](torch.float64)
    lr, sigma = 0.7, 0.05
    _, _, direct = validation_gradient(case)
    central = finite_difference(case.problem(), lr, sigma)

    found = evograd(case.problem(), 2, sigma, temperature, "guided")

    product = 4 * found.weights.prod()
    assert temperature > 0.05 or product < 0.99
    rate = sigma**2 / temperature * product
    expected = [rate / lr * (g - d) for g, d in zip(central.grads, direct, strict=True)]
    assert relative_error([g - d for g, d in zip(found.grads, direct, strict=True)], expected) < 1e-9


@pytest.mark.parametrize("num_candidates", DISTANCES)
def test_with_an_inner_step_the_scale_is_that_of_the_unroll(num_candidates):
    case = ZOO["dropout"](torch.float64)
    expected = unrolled_sgd(case, 1e-5)

    found = evograd(case.problem(), num_candidates, 1e-3, 10.0, "guided", inner_step=GradientDescent(1e-5))

    assert relative_error(found.grads, expected) < 1e-4


@pytest.mark.parametrize("num_candidates", [2, 3, 4])
def test_theta_among_the_candidates_changes_no_scale(num_candidates):
    case = ZOO["linear"](torch.float64)
    expected = unrolled_sgd(case, 1e-5)

    found = evograd(
        case.problem(), num_candidates, 1e-4, 10.0, "guided", inner_step=GradientDescent(1e-5), include_unperturbed=True
    )

    assert relative_error(found.grads, expected) < 1e-3


@pytest.mark.parametrize("num_candidates", DISTANCES)
def test_the_scores_vary_as_those_of_blind_noise(num_candidates):
    case = ZOO["convolution"](torch.float64)
    g = as_vector(validation_gradient(case)[1])

    scores = evograd(case.problem(), num_candidates, 1e-3, noise="guided").scores

    assert abs(scores.mean()) < 1e-12 * scores.abs().max()
    assert_close(scores.square().mean().sqrt(), 1e-3 * g.norm(), rtol=1e-12, atol=0)


def test_the_mean_over_many_draws_of_signs_is_guided_without_the_scatter():
    """Component by component, within four standard errors; pairs, since their mean is theta in each draw."""
    case = ZOO["linear"](torch.float64)
    settings = {"sigma": 1e-5, "temperature": 1.0}
    estimates = torch.stack(
        [as_vector(evograd(case.problem(), 6, **settings, seed=seed, antithetic=True).grads) for seed in range(150)]
    )  # [N, L]
    guided = as_vector(evograd(case.problem(), 6, **settings, noise="guided").grads)

    errors = estimates.std(dim=0) / 150**0.5
    assert ((estimates.mean(dim=0) - guided).abs() < 4 * errors).all()
    assert (guided.abs() > 6 * errors).any()


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_the_variance_of_a_mixture_is_shared_as_documented(share):
    """Along g all of sigma^2 |g|^2 is left; across, the signs' share of sigma^2."""
    case = ZOO["linear"](torch.float64)
    g = as_vector(validation_gradient(case)[1])
    along, seen = g / g.norm(), []

    def train_loss():
        seen.append(as_vector(case.theta))
        return case.train(case.model, case.meta_params)

    for seed in range(120):
        evograd(case.problem(train_loss=train_loss), 4, 0.1, noise="guided", guidance=share, seed=seed)
    rows = (torch.stack(seen) - as_vector(case.theta)) / 0.1  # [N K, P]

    parallel = (rows @ along).square()
    across = rows.square().sum(dim=1) - parallel
    for values, expected in ((parallel, 1.0), (across, (1 - share) * (len(g) - 1))):
        assert abs(values.mean() - expected) < 4 * values.std() / (len(values) / 4) ** 0.5
    assert rows.mean(dim=0).abs().max() < 4.5 / len(rows) ** 0.5


def test_a_mixture_estimates_the_same_inner_step_as_guided_noise_alone():
    case = ZOO["linear"](torch.float64)
    settings = {"num_candidates": 4, "sigma": 1e-5, "noise": "guided", "inner_step": GradientDescent(0.1)}
    guided = as_vector(evograd(case.problem(), **settings).grads)
    estimates = torch.stack(
        [
            as_vector(evograd(case.problem(), **settings, guidance=0.7, antithetic=True, seed=seed).grads)
            for seed in range(150)
        ]
    )

    errors = estimates.std(dim=0) / 150**0.5
    assert ((estimates.mean(dim=0) - guided).abs() < 4 * errors).all()
    assert (guided.abs() > 6 * errors).any()


def vanishing(theta_dtype=torch.float64):
    """The validation loss knows the meta-parameter alone."""
    theta, meta = torch.randn(5, dtype=theta_dtype).requires_grad_(), torch.tensor([3.0], requires_grad=True)
    return BilevelProblem([theta], [meta], lambda: (meta * theta**2).sum().float(), lambda: (meta**2).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, "auto"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sigma": 0.1}, {"inner_step": GradientDescent(0.1)}, {"relative_sigma": True}, {"include_unperturbed": True}],
)
def test_a_vanishing_validation_gradient_leaves_the_direct_term(settings, temperature, dtype):
    found = evograd(vanishing(dtype), 3, temperature=temperature, noise="guided", **settings)

    assert found.grads[0].tolist() == [6.0]
    assert found.scores.tolist() == [0, 0, 0]
    assert found.train_losses.unique().numel() == 1
    assert found.val_loss_change == 0


def test_a_vanishing_validation_gradient_leaves_a_mixture_its_signs():
    problem = vanishing()
    found = evograd(problem, 4, 0.1, noise="guided", guidance=0.5)

    assert found.grads[0].tolist() == [6.0]
    assert found.train_losses.unique().numel() > 1
    assert torch.equal(found.scores, torch.zeros(4))


def test_a_validation_loss_without_any_graph():
    theta, meta = torch.randn(5, requires_grad=True), torch.ones((), requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: (meta * theta**2).sum(), lambda: torch.tensor(2.0))

    assert evograd(problem, noise="guided").grads[0] == 0


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_guided_perturbations_do_not_depend_on_the_size_of_the_validation_loss(factor):
    case = ZOO["linear"](torch.float32)
    plain = evograd(case.problem(), 4, 1e-2, noise="guided")
    scaled = evograd(
        case.problem(val_loss=lambda: factor * case.val(case.model, case.meta_params)), 4, 1e-2, noise="guided"
    )

    assert_close(scaled.train_losses, plain.train_losses, rtol=1e-5, atol=0)
    assert relative_error(scaled.grads, [g * factor for g in plain.grads]) < 1e-3


@pytest.mark.parametrize("size", [1, 3, 20])
def test_guided_noise_does_not_depend_on_the_blocks(size, monkeypatch):
    case = ZOO["convolution"](torch.float64)
    settings = {"num_candidates": 4, "sigma": 0.1, "noise": "guided", "relative_sigma": True}
    expected = evograd(case.problem(), **settings)
    monkeypatch.setattr(flat_blocks, "CPU_BLOCK_SIZE", size)

    found = evograd(case.problem(), **settings)

    assert relative_error(found.grads, expected.grads) < 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_random_share_the_seed_does_not_matter(seed):
    case = ZOO["dropout"](torch.float64)
    assert torch.equal(
        evograd(case.problem(), 3, noise="guided", seed=seed).grads[0],
        evograd(case.problem(), 3, noise="guided").grads[0],
    )


def test_relative_sigma_turns_the_direction_towards_larger_tensors():
    """With V the mean squares of the tensors: epsilon along V g, and <g, epsilon> as for blind noise of variance V."""
    case = ZOO["linear"](torch.float64)
    g, theta = validation_gradient(case)[1], case.theta
    direction = as_vector([part * t.detach().square().mean() for part, t in zip(g, theta, strict=True)])
    length = (direction @ as_vector(g)).sqrt()
    rows = torch.tensor(DISTANCES[4], dtype=torch.float64)[:, None] * 0.3 * direction / length
    expected = literal_guided(case, rows, 0.05)

    check(evograd(case.problem(), 4, 0.3, 0.05, "guided", relative_sigma=True), expected)


def test_relative_sigma_of_equal_tensors_keeps_the_scale_of_the_inner_step():
    """Relative to one common size, noise is the same up to sigma, which an inner step takes out."""
    theta = [
        torch.tensor([0.3, -0.3]).double().requires_grad_(),
        torch.tensor([[0.3], [0.3]]).double().requires_grad_(),
    ]
    meta = torch.ones(2).double().requires_grad_()
    problem = BilevelProblem(
        theta,
        [meta],
        lambda: meta[0] * theta[0].square().sum() + meta[1] * theta[1].sum().sin(),
        lambda: theta[0].exp().sum() + theta[1].square().sum(),
    )
    step = GradientDescent(0.01)

    absolute = evograd(problem, 2, 3e-5, noise="guided", inner_step=step).grads
    relative = evograd(problem, 2, 1e-4, noise="guided", inner_step=step, relative_sigma=True).grads

    assert relative_error(absolute, finite_difference(problem, inner_step=step).grads) < 1e-4
    assert relative_error(relative, absolute) < 1e-4


def test_relative_sigma_estimates_the_same_inner_step_guided_and_blind():
    case = ZOO["linear"](torch.float64)
    settings = {"num_candidates": 6, "sigma": 1e-4, "inner_step": GradientDescent(0.1), "relative_sigma": True}
    guided = as_vector(evograd(case.problem(), noise="guided", **settings).grads)
    estimates = torch.stack(
        [as_vector(evograd(case.problem(), **settings, antithetic=True, seed=seed).grads) for seed in range(120)]
    )

    errors = estimates.std(dim=0) / 120**0.5
    assert ((estimates.mean(dim=0) - guided).abs() < 4 * errors).all()


@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 0.4}, {"temperature": "auto"}, {"inner_step": GradientDescent(0.1)}]
)
def test_replicas_agree_on_one_direction_and_one_result(settings):
    """Three threads stand for three processes, each with examples of its own; one with all of them is the oracle."""
    inputs, targets = torch.randn(6, 4).double(), torch.randn(6).double()
    barrier, slots, results = threading.Barrier(3, timeout=20), [None] * 3, [None] * 3
    start = torch.randn(4).double()

    def problem(part, mean=None):
        theta, meta = start.clone().requires_grad_(), torch.ones(4).double().requires_grad_()

        def loss(rows):
            return ((inputs[rows] @ theta - targets[rows]).square()).mean()

        changes = {} if mean is None else {"mean": mean}
        return BilevelProblem(
            [theta],
            [meta],
            lambda: loss(part) + (meta * inputs[part].mean(dim=0)) @ theta.tanh(),
            lambda: loss([(p + 2) % 6 for p in part]) + meta.square().sum() * inputs[part].mean(),
            **changes,
        )

    def replica(rank):
        def mean(tensor):
            slots[rank] = tensor
            barrier.wait()
            average = sum(slots) / 3
            barrier.wait()
            return average

        part = [2 * rank, 2 * rank + 1]
        results[rank] = evograd(
            problem(part, mean), 4, 0.1, noise="guided", seed=5, **{"temperature": 0.05, **settings}
        )

    threads = [threading.Thread(target=replica, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    expected = evograd(problem(list(range(6))), 4, 0.1, noise="guided", seed=5, **{"temperature": 0.05, **settings})
    assert (expected.weights - 0.25).abs().max() > 1e-3
    for found in results:
        for name in ("grads", "val_loss", "train_losses", "weights", "scores", "val_loss_change"):
            assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


def test_a_guided_estimate_in_single_precision():
    """At the default sigma, against float64."""
    torch.manual_seed(3)
    single = ZOO["convolution"](torch.float32)
    torch.manual_seed(3)
    double = ZOO["convolution"](torch.float64)
    exact = t1t2(double.problem(), 1e-4).grads

    for num_candidates in DISTANCES:
        found = evograd(single.problem(), num_candidates, noise="guided", inner_step=GradientDescent(1e-4)).grads
        assert found[0].dtype == torch.float32
        assert relative_error(found, exact) < 0.02


def test_a_guided_estimate_of_parameters_in_bfloat16():
    """The length has to be well above the spacing of bfloat16."""
    torch.manual_seed(3)
    theta = torch.randn(400).bfloat16().requires_grad_()
    meta = torch.zeros(400, requires_grad=True)
    problem = BilevelProblem(
        [theta],
        [meta],
        lambda: (torch.sigmoid(meta) * theta.float() ** 2).mean(),
        lambda: ((theta.float() - 1) ** 2).mean(),
    )

    found = evograd(problem, 2, 2.0, 10.0, "guided", inner_step=GradientDescent(0.1))

    assert found.grads[0].dtype == torch.float32
    assert torch.cosine_similarity(found.grads[0], t1t2(problem, 0.1).grads[0], dim=0) > 0.98
    assert relative_error(found.grads, t1t2(problem, 0.1).grads) < 0.2
