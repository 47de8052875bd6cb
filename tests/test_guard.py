"""Guards and the trust region of an update of the meta module."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from meta_trainer.guard import guarded, shorten_step


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, generator=generator), torch.randn(2, 2, generator=generator)]


def product(left, right):
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))


def test_a_guarded_step_does_not_change_the_objective_to_first_order():
    grads, train_grads = random_tensors(0), random_tensors(1)
    found = guarded(grads, train_grads, ascent_only=False)

    assert product(found, train_grads) == pytest.approx(0, abs=1e-6)
    removed = [g - f for g, f in zip(grads, found, strict=True)]
    assert product(removed, found) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_guard_against_ascent_leaves_descent_alone(sign):
    grads, train_grads = random_tensors(0), random_tensors(1)
    grads = [sign * g for g in grads]
    found = guarded(grads, train_grads, ascent_only=True)

    if product(grads, train_grads) > 0:  # the step along -h lowers the objective
        assert_close(found, tuple(grads), rtol=0, atol=0)
    else:
        assert product(found, train_grads) == pytest.approx(0, abs=1e-6)


def test_a_guard_takes_everything_where_the_objective_is_all_that_changes():
    train_grads = random_tensors(1)
    found = guarded([-2 * u for u in train_grads], train_grads, ascent_only=True)
    assert_close(found, tuple(torch.zeros_like(u) for u in train_grads), rtol=0, atol=1e-6)


def test_where_the_objective_does_not_depend_on_the_meta_module_a_guard_does_nothing():
    grads = random_tensors(0)
    for ascent_only in (True, False):
        assert_close(guarded(grads, [torch.zeros_like(g) for g in grads], ascent_only), tuple(grads), rtol=0, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_that_changes_the_objective_too_much_is_shortened_to_the_radius(sign):
    before, step, train_grads = random_tensors(0), [sign * t for t in random_tensors(1)], random_tensors(2)
    parameters = [nn.Parameter(b + s) for b, s in zip(before, step, strict=True)]
    change = abs(product(step, train_grads))

    share = shorten_step(parameters, before, train_grads, torch.tensor(change / 4))

    assert float(share) == pytest.approx(0.25, rel=1e-5)
    assert_close([p.data for p in parameters], [b + s / 4 for b, s in zip(before, step, strict=True)])


def test_a_step_inside_the_radius_stays_as_it_is_bit_for_bit():
    before, step, train_grads = random_tensors(0), random_tensors(1), random_tensors(2)
    parameters = [nn.Parameter(b + s) for b, s in zip(before, step, strict=True)]
    copies = [p.detach().clone() for p in parameters]

    share = shorten_step(parameters, before, train_grads, torch.tensor(2 * abs(product(step, train_grads))))

    assert float(share) == 1
    assert_close([p.data for p in parameters], copies, rtol=0, atol=0)


def test_an_objective_that_does_not_change_sets_no_limit():
    before, step = random_tensors(0), random_tensors(1)
    parameters = [nn.Parameter(b + s) for b, s in zip(before, step, strict=True)]
    assert float(shorten_step(parameters, before, [torch.zeros_like(b) for b in before], torch.tensor(1e-3))) == 1
