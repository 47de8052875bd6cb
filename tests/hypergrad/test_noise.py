"""The perturbations of the candidates, and the random numbers that candidates share."""

import pytest
import torch
from problem_zoo import ZOO
from torch.testing import assert_close

from meta_trainer.hypergrad import evograd
from meta_trainer.hypergrad.flat_blocks import CPU_BLOCK_SIZE
from meta_trainer.hypergrad.noise import Perturbations

THETA = [torch.zeros(100, 200), torch.zeros(3000)]


def as_vector(perturbation):
    return torch.cat([block.clone() for block in perturbation])


def no_perturbation(k, theta):
    return [torch.zeros_like(t) for t in theta]


def test_sign_noise_is_plus_or_minus_sigma_and_balanced():
    values = as_vector(Perturbations("sign", THETA, 2, sigma=0.25, seed=0)[0])

    assert set(values.tolist()) == {0.25, -0.25}
    assert abs(values.mean()) < 4 * 0.25 / len(values) ** 0.5


def test_normal_noise_has_the_moments_of_a_gaussian():
    values = as_vector(Perturbations("normal", THETA, 2, sigma=0.25, seed=0)[0]) / 0.25

    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / len(values)) ** 0.5


@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_a_perturbation_is_the_same_at_every_access_and_for_any_number_of_candidates(noise):
    few, many = (Perturbations(noise, THETA, count, sigma=0.1, seed=5) for count in (2, 7))

    assert torch.equal(as_vector(few[1]), as_vector(few[1]))
    for k in range(2):
        assert torch.equal(as_vector(few[k]), as_vector(many[k]))
        assert torch.equal(as_vector(list(many)[k]), as_vector(many[k]))


@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_candidates_seeds_and_elements_are_independent(noise):
    draw, other = (Perturbations(noise, [torch.zeros(3000)], 3, sigma=1.0, seed=seed) for seed in (5, 6))
    first = as_vector(draw[0])

    partners = [as_vector(draw[1]), as_vector(draw[2]), as_vector(other[0])]
    # A word of random bits gives one sign to each of 32 stretches: neighbours in a word are far apart in the vector.
    partners += [first.roll(shift) for shift in (1, 2, 3000 // 32, 94, 1500)]
    for partner in partners:
        assert abs((first * partner).mean()) < 4 / 3000**0.5


@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_blocks_are_independent(noise):
    draw = Perturbations(noise, [torch.zeros(2 * CPU_BLOCK_SIZE)], 2, sigma=1.0, seed=5)
    blocks = [block.clone() for block in draw[0]]

    assert [len(block) for block in blocks] == [CPU_BLOCK_SIZE] * 2
    assert abs((blocks[0] * blocks[1]).mean()) < 4 / CPU_BLOCK_SIZE**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_perturbations_are_at_least_single_precision(dtype):
    (epsilon,) = Perturbations("sign", [torch.zeros(4, dtype=dtype)], 2, sigma=0.5, seed=0)[1]
    assert epsilon.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert set(epsilon.abs().tolist()) == {0.5}


@pytest.mark.parametrize("noise", ["sign", "normal", lambda k, theta: [torch.full_like(t, k + 1) for t in theta]])
def test_combinations_are_those_of_the_vectors_and_show_their_parts(noise):
    theta = [torch.zeros(100, 7).double(), torch.zeros(5).double()]
    draw = Perturbations(noise, theta, 3, sigma=0.1, seed=5)
    vectors = torch.stack([as_vector(epsilon) for epsilon in draw])  # [K, P]
    weights, seen = torch.randn(3).double(), []

    found = as_vector(draw.combination(weights, lambda parts: seen.append(torch.stack(list(parts)))))

    assert_close(found, weights @ vectors)
    assert_close(torch.cat(seen, dim=1), vectors, rtol=0, atol=0)


def test_a_function_is_called_once_per_candidate_with_the_unperturbed_parameters():
    case, calls = ZOO["linear"](torch.float64), []

    def noise(k, theta):
        calls.append((k, [t.clone() for t in theta]))
        return [torch.full_like(t, 0.1 * (k + 1)) for t in theta]

    evograd(case.problem(), 3, noise=noise)

    assert [k for k, _ in calls] == [0, 1, 2]
    for _, theta in calls:
        assert_close(theta, [t.detach() for t in case.theta], rtol=0, atol=0)


def test_the_tensors_of_a_function_are_not_scaled():
    case = ZOO["linear"](torch.float64)
    noise = lambda k, theta: [torch.full_like(t, 0.1 * (k + 1)) for t in theta]  # noqa: E731

    found = [evograd(case.problem(), 2, sigma=sigma, noise=noise) for sigma in (1e-3, 5.0)]

    assert torch.equal(found[0].grads[0], found[1].grads[0])


def test_the_seed_decides_the_result_and_the_global_random_state_does_not():
    case = ZOO["linear"](torch.float64)
    first = evograd(case.problem(), 3, seed=1).grads[0]
    torch.rand(10)

    assert torch.equal(evograd(case.problem(), 3, seed=1).grads[0], first)
    assert not torch.equal(evograd(case.problem(), 3, seed=2).grads[0], first)


@pytest.mark.parametrize("name", ["dropout", "in_the_forward_pass"])
def test_candidates_that_stand_on_one_point_see_the_same_dropout_masks(name):
    case = ZOO[name](torch.float64)
    assert case.train(case.model, case.meta_params) != case.train(case.model, case.meta_params)

    losses = evograd(case.problem(), 5, noise=no_perturbation).train_losses

    assert len(set(losses.tolist())) == 1


def test_the_shared_dropout_masks_are_those_of_the_next_forward_pass():
    case = ZOO["dropout"](torch.float64)
    losses = evograd(case.problem(), 2, noise=no_perturbation).train_losses

    assert_close(losses[0], case.train(case.model, case.meta_params).detach(), rtol=0, atol=0)
