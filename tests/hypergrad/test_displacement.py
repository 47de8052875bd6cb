"""The way back from a displacement: bit for bit, for numbers of every size and kind."""

import pytest
import torch
from problem_zoo import ZOO
from torch import nn
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, evograd, flat_blocks
from meta_trainer.hypergrad.displacement import Displacement
from meta_trainer.hypergrad.flat_blocks import FlatBlocks
from meta_trainer.hypergrad.noise import Perturbations
from meta_trainer.meter import LiveBytes


def awkward(dtype):
    """Zeros of both signs, subnormal and huge numbers, infinities, NaN, and one power of ten after another."""
    powers = torch.cat([sign * 10.0 ** torch.arange(-12, 5) for sign in (1, -1)])
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38, torch.inf, -torch.inf, torch.nan])
    return torch.cat([special, powers, torch.randn(500), torch.randn(500) * 1e-4]).to(dtype)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-8, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("noise", ["sign", "normal"])
def test_undoing_gives_every_bit_back(noise, sigma, dtype):
    theta = [awkward(dtype), awkward(dtype)[:1000].view(50, 20).t(), torch.randn(7, 3, dtype=torch.float32)]
    before = [bits(t).clone() for t in theta]
    blocks = FlatBlocks(theta)
    draw = Perturbations(noise, theta, 2, sigma, seed=0)

    origin = [t.clone() for t in theta]
    steps = lambda: draw.combination(torch.tensor([0.3, 0.7]))  # noqa: E731
    move = Displacement(blocks, theta, origin, steps())
    assert sigma < 1e-6 or any(not torch.equal(bits(t), b) for t, b in zip(theta, before, strict=True))
    move.undo(steps())

    assert all(torch.equal(bits(t), b) for t, b in zip(theta, before, strict=True))


def test_a_displacement_adds_its_steps():
    theta, step = [torch.randn(4, 5), torch.randn(3)], torch.randn(23)
    before = torch.cat([t.flatten() for t in theta])

    Displacement(FlatBlocks(theta), theta, [t.clone() for t in theta], [step.clone()])

    assert_close(torch.cat([t.flatten() for t in theta]), before + step, rtol=0, atol=0)


def test_the_way_back_takes_a_byte_an_element():
    theta = [torch.randn(1_000_000) * 0.02]
    draw = Perturbations("sign", theta, 2, 1e-3, seed=0)

    origin = [theta[0].clone()]

    with LiveBytes() as meter:
        move = Displacement(FlatBlocks(theta), theta, origin, draw.combination(torch.tensor([0.5, 0.5])))

    assert 1.0 <= meter.live / theta[0].numel() < 1.05
    del move


def test_an_undoing_that_was_broken_off_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr(flat_blocks, "CPU_BLOCK_SIZE", 64)
    theta = [torch.randn(300)]
    before, origin = theta[0].clone(), [theta[0].clone()]
    draw = Perturbations("normal", theta, 2, 0.1, seed=0)
    steps = lambda: draw.combination(torch.tensor([0.5, 0.5]))  # noqa: E731
    move = Displacement(draw.blocks, theta, origin, steps())

    def breaking_off():
        for number, step in enumerate(steps()):
            if number == 2:
                raise FloatingPointError("in the middle")
            yield step

    with pytest.raises(FloatingPointError, match="in the middle"):
        move.undo(breaking_off())
    assert not torch.equal(theta[0], before)
    move.undo(steps())

    assert torch.equal(theta[0], before)


def test_the_validation_pass_keeps_no_copy_of_the_parameters():
    theta = (torch.randn(1_000_000) * 0.02).requires_grad_()
    meta, meter, held = torch.ones(()).requires_grad_(), LiveBytes(), []
    size = 4 * theta.numel()

    def val_loss():
        held.append(meter.live / size)
        return theta.sum() * 1e-3

    problem = BilevelProblem([theta], [meta], lambda: theta.dot(theta) * meta * 1e-3, val_loss)
    with meter:
        evograd(problem)

    assert held[0] < 0.3


class Renormed(nn.Module):
    """An embedding that writes into its own weight in every forward pass."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, max_norm=0.5)

    def forward(self, indices):
        return self.embedding(indices)


def test_parameters_that_a_forward_pass_writes_into_come_back():
    model, meta = Renormed(), torch.ones(3, requires_grad=True)
    before = model.embedding.weight.detach().clone()
    train, val = (
        lambda: (model(torch.arange(4)) * meta).square().sum(),
        lambda: model(torch.arange(1, 5)).sum(),
    )

    evograd(BilevelProblem(list(model.parameters()), [meta], train, val), sigma=0.1)

    assert torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("failing", ["train_loss", "val_loss"])
def test_an_exception_after_the_last_move_gives_every_bit_back(failing):
    case = ZOO["dropout"](torch.float32)
    before = [t.detach().clone() for t in case.theta]

    def fail():
        raise FloatingPointError("in the middle")

    with pytest.raises(FloatingPointError, match="in the middle"):
        evograd(case.problem(**{failing: fail}))

    assert all(torch.equal(t, b) for t, b in zip(case.theta, before, strict=True))
