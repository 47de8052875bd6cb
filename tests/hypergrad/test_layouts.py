"""How the candidates lie about theta: in pairs, orthogonal, with theta itself among them."""

from itertools import product

import pytest
import torch
from problem_zoo import ZOO, literal_evograd, relative_error
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, GradientDescent, Layout, OptimizerStep, evograd, flat_blocks
from meta_trainer.hypergrad.noise import Perturbations

LAYOUTS = [Layout(*flags) for flags in product([False, True], repeat=3)]
NAMES = ("antithetic", "orthogonal", "include_unperturbed")


def name_of(layout):
    return "_".join(name for name in NAMES if getattr(layout, name)) or "independent"


def settings_of(layout):
    return {name: getattr(layout, name) for name in NAMES}


def as_vector(perturbation):
    return torch.cat([block.clone() for block in perturbation])


def matrix(noise, theta, num_candidates, layout, sigma=0.25, seed=3):
    """All perturbations, ``[K, P]``."""
    draw = Perturbations(noise, theta, num_candidates, sigma, seed, layout)
    return torch.stack([as_vector(epsilon) for epsilon in draw])


def shaped(vector, theta):
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in theta]), theta, strict=True)]


def awkward():
    """Odd sizes, a scalar, a tensor without a flat view."""
    return [torch.zeros(13, 7), torch.zeros(()), torch.zeros(4, 9).t(), torch.zeros(9), torch.zeros(1)]


@pytest.fixture(params=[20, None], ids=lambda size: f"blocks_of_{size}")
def block_size(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(flat_blocks, "CPU_BLOCK_SIZE", request.param)
    return request.param


@pytest.mark.parametrize("noise", ["sign", "normal"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_pair_sums_to_zero(noise, first, block_size):
    rows = matrix(noise, awkward(), 4 + first, Layout(antithetic=True, include_unperturbed=bool(first)))

    for k in (first, first + 2):
        assert rows[k].abs().min() > 0
        assert torch.equal(rows[k], -rows[k + 1])
    assert not torch.equal(rows[first], rows[first + 2])


def test_the_last_of_an_odd_number_has_no_partner():
    rows = matrix("normal", awkward(), 5, Layout(antithetic=True))
    independent = matrix("normal", awkward(), 5, Layout())

    assert torch.equal(rows[[0, 2, 4]], independent[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_candidates", [2, 3, 4, 5, 8, 9])
def test_orthogonal_directions_have_no_inner_product(num_candidates, dtype):
    period = 2 ** (num_candidates - 1).bit_length()
    rows = matrix(
        "sign",
        [torch.zeros(5, 2 * period).to(dtype), torch.zeros(period).to(dtype)],
        num_candidates,
        Layout(orthogonal=True),
    )

    gram = rows @ rows.T
    assert_close(gram, torch.eye(num_candidates).to(gram) * rows.shape[1] * 0.25**2, rtol=0, atol=0)


@pytest.mark.parametrize("num_candidates", [2, 4, 7])
def test_what_is_left_of_inner_products_is_an_incomplete_group_in_each_block(num_candidates, block_size):
    theta = awkward()
    num_blocks = len(Perturbations("sign", theta, 2, 1.0, 0).blocks)
    rows = matrix("sign", theta, num_candidates, Layout(orthogonal=True), sigma=1.0)

    gram = rows @ rows.T - torch.eye(num_candidates) * rows.shape[1]
    period = 2 ** (num_candidates - 1).bit_length()
    assert gram.abs().max() <= (period - 1) * num_blocks
    assert block_size is not None or gram.abs().max() < period


def test_more_orthogonal_directions_than_a_small_block_has_elements():
    """The period of the Hadamard matrix is then longer than the block."""
    rows = matrix("sign", [torch.zeros(3), torch.zeros(256).double()], 200, Layout(orthogonal=True), sigma=1.0)

    gram = rows[:, 3:] @ rows[:, 3:].T
    assert_close(gram, 256 * torch.eye(200).double(), rtol=0, atol=0)
    assert set(rows.flatten().tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_perturbed_candidate_is_balanced_on_its_own(layout):
    rows = matrix("sign", [torch.zeros(99, 101)], 7, layout, sigma=1.0)[layout.include_unperturbed :]

    assert set(rows.flatten().tolist()) == {1.0, -1.0}
    assert rows.mean(dim=1).abs().max() < 4.5 / rows.shape[1] ** 0.5
    # Neighbours are independent, whatever the signs of the layout.
    assert (rows[:, 1:] * rows[:, :-1]).mean(dim=1).abs().max() < 4.5 / rows.shape[1] ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("num_candidates", [2, 4])
def test_no_parameter_is_left_out_by_the_differences_between_candidates(num_candidates, layout):
    """What all candidates share moves no weight: the covariance over the candidates is what the inner step sees."""
    num_draws, total = 100, torch.zeros(16)
    for seed in range(num_draws):
        rows = matrix("sign", [torch.zeros(16)], num_candidates, layout, sigma=1.0, seed=seed)
        total += (rows - rows.mean(dim=0)).square().mean(dim=0)

    variances = total / num_draws
    assert variances.mean() > 0.2
    assert variances.min() > 0.5 * variances.mean()
    assert variances.max() < 1.5 * variances.mean()


@pytest.mark.parametrize(
    ("noise", "settings"),
    [
        ("sign", {}),
        ("sign", {"orthogonal": True, "antithetic": True}),
        ("sign", {"relative_sigma": True}),
        ("normal", {"antithetic": True}),
        ("optimizer", {"orthogonal": True}),
        ("guided", {}),
        ("guided", {"guidance": 0.5, "antithetic": True}),
    ],
)
def test_the_first_candidate_is_theta_itself(noise, settings):
    case = ZOO["dropout"](torch.float32)
    inner_step = trained_optimizer_step(case) if noise == "optimizer" else None
    with torch.random.fork_rng():
        expected = case.train(case.model, case.meta_params).detach()

    found = evograd(case.problem(), 4, 0.1, noise=noise, inner_step=inner_step, include_unperturbed=True, **settings)

    assert torch.equal(found.train_losses[0], expected)
    assert found.scores[0] == 0
    assert (found.train_losses[1:] != expected).any()


def trained_optimizer_step(case):
    """AdamW's next step, after five."""
    optimizer = torch.optim.AdamW(case.theta, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        case.train(case.model, case.meta_params).backward()
        optimizer.step()
    optimizer.zero_grad()
    for meta in case.meta_params:
        meta.grad = None
    return OptimizerStep(optimizer, case.theta)


def test_all_layouts_together():
    rows = matrix("sign", [torch.zeros(64)], 7, Layout(True, True, True), sigma=1.0)

    assert torch.equal(rows[0], torch.zeros(64))
    assert torch.equal(rows[[1, 3, 5]], -rows[[2, 4, 6]])
    assert_close(rows[[1, 3, 5]] @ rows[[1, 3, 5]].T, 64 * torch.eye(3), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_candidate_is_the_same_at_every_access(layout, block_size):
    draw = Perturbations("sign", awkward(), 5, 0.1, 4, layout)
    backwards = {k: as_vector(draw[k]) for k in reversed(range(5))}

    assert all(torch.equal(as_vector(epsilon), backwards[k]) for k, epsilon in enumerate(draw))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_combinations_and_scores_are_those_of_the_vectors(layout, block_size):
    theta = [t.double() for t in awkward()]
    draw, rows = Perturbations("sign", theta, 5, 0.25, 3, layout), matrix("sign", theta, 5, layout)
    weights, vector = torch.randn(5).double(), torch.randn(rows.shape[1]).double()
    offset = torch.randn(rows.shape[1]).double()
    moved = Perturbations("sign", theta, 5, 0.25, 3, layout, offset=lambda: draw.blocks.flatten(shaped(offset, theta)))

    assert_close(as_vector(draw.combination(weights)), weights @ rows)
    assert_close(as_vector(moved.combination(weights)), weights @ rows + offset)
    assert_close(draw.scores(shaped(vector, theta)), rows @ vector)


@pytest.mark.parametrize("name", ["dropout", "convolution", "direct_term"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=name_of)
def test_every_layout_equals_the_literal_formula(name, layout):
    case = ZOO[name](torch.float64)
    rows = matrix("sign", case.theta, 5, layout, sigma=0.05)
    expected = literal_evograd(case, [shaped(row, case.theta) for row in rows], temperature=0.1)

    found = evograd(case.problem(), 5, 0.05, 0.1, seed=3, **settings_of(layout))

    assert relative_error(found.grads, expected["grads"]) < 1e-9
    assert_close(found.train_losses, expected["losses"], rtol=1e-12, atol=1e-12)
    assert_close(found.weights, expected["weights"], rtol=1e-12, atol=1e-12)
    assert_close(found.val_loss, expected["val_loss"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if not x.orthogonal][1:], ids=name_of)
def test_layouts_of_normal_noise_equal_the_literal_formula(layout):
    case = ZOO["dropout"](torch.float64)
    rows = matrix("normal", case.theta, 4, layout, sigma=0.05)
    expected = literal_evograd(case, [shaped(row, case.theta) for row in rows], temperature=0.1)

    found = evograd(case.problem(), 4, 0.05, 0.1, "normal", seed=3, **settings_of(layout))

    assert relative_error(found.grads, expected["grads"]) < 1e-9


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_the_change_of_the_validation_loss_is_that_between_the_mean_candidate_and_theta_star(layout):
    case = ZOO["linear"](torch.float64)
    rows = matrix("sign", case.theta, 5, layout, sigma=1e-4)

    found = evograd(case.problem(), 5, 1e-4, 1e-5, seed=3, **settings_of(layout))

    def val_at(weights):
        star = [t.detach() + e for t, e in zip(case.theta, shaped(weights @ rows, case.theta), strict=True)]
        return case.val(case.call_at(star, torch.get_rng_state()), case.meta_params).detach()

    assert (found.weights - 0.2).abs().max() > 0.05
    change = val_at(found.weights) - val_at(torch.full_like(found.weights, 0.2))
    assert_close(found.val_loss_change, change, rtol=1e-2, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("num_candidates", [2, 5])
def test_the_inner_step_sets_the_scale_whatever_the_layout(num_candidates, layout):
    """The losses are linear in theta, so that nothing but the draws keeps an estimate from the exact step."""
    theta, meta = torch.zeros(4).double().requires_grad_(), torch.ones(()).double().requires_grad_()
    problem = BilevelProblem([theta], [meta], lambda: 1e-3 * meta * theta[1], lambda: theta[1])

    scales = (
        torch.stack(
            [
                evograd(
                    problem, num_candidates, seed=seed, inner_step=GradientDescent(0.1), **settings_of(layout)
                ).grads[0]
                for seed in range(40)
            ]
        )
        / -1e-4
    )

    error = scales.std() / 40**0.5
    assert error < 0.2
    assert abs(scales.mean() - 1) < 4 * error + 1e-3
