"""A learned rotation: its direction, its derivative, and what each estimator sees of it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer import MetaModule
from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2
from meta_trainer.modules import InputRotation
from meta_trainer.modules.input_rotation import rotate


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def degrees(value: float) -> torch.Tensor:
    return torch.tensor(math.radians(value), dtype=torch.float64)


@pytest.mark.parametrize("quarters", [-1, 1, 2, 3])
def test_a_quarter_turn_is_that_of_torch_counter_clockwise(quarters):
    x = images(2, 3, 8, 8)
    assert_close(rotate(x, degrees(90 * quarters)), torch.rot90(x, quarters, (2, 3)))


def test_a_spot_on_the_right_goes_up():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 7] = 1  # right of the centre
    turned = rotate(x, degrees(45))
    row, column = divmod(int(turned.argmax()), 9)
    assert row < 4 < column


def test_half_a_turn_of_an_image_that_is_no_square_keeps_its_shape():
    x = images(2, 1, 6, 10)
    assert_close(rotate(x, degrees(180)), torch.rot90(x, 2, (2, 3)))


def test_an_image_that_is_no_square_is_turned_and_not_sheared():
    """Two spots at one distance from the centre, a quarter turn apart, change places."""
    x = torch.zeros(1, 1, 7, 13, dtype=torch.float64)
    x[0, 0, 3, 8] = 1  # two pixels to the right of the centre (3, 6)
    assert_close(rotate(x, degrees(90))[0, 0, 1, 6], torch.tensor(1.0, dtype=torch.float64))


def test_no_turn_leaves_the_images():
    x = images(2, 1, 5, 5)
    assert_close(InputRotation().double().transform_batch({"pixel_values": x})["pixel_values"], x)


def test_beyond_the_border_its_pixels_go_on_so_that_normalisation_commutes():
    x = images(2, 1, 8, 8)
    assert_close(rotate((x - 0.3) / 2, degrees(30)), (rotate(x, degrees(30)) - 0.3) / 2)
    assert rotate(torch.ones(1, 1, 8, 8), torch.tensor(0.5), "zeros").min() < 1


def test_the_derivative_in_the_angle_is_that_of_finite_differences():
    x, weights, angle = images(2, 2, 8, 8), images(2, 2, 8, 8), degrees(17.3).requires_grad_()
    (grad,) = torch.autograd.grad((rotate(x, angle) * weights).sum(), angle)
    step = 1e-6
    ahead, behind = (((rotate(x, angle.detach() + s) * weights).sum()) for s in (step, -step))
    assert_close(grad, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


class TurnedPatterns:
    """A network that classifies patterns turned by another angle than those it trains on, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
        self.module = InputRotation(initial_degrees=10).double()
        self.patterns = F.avg_pool2d(images(12, 1, 10, 10), 3, stride=1)  # smooth, [12, 1, 8, 8]
        self.meta, self.labels = rotate(self.patterns, degrees(40)), torch.arange(12) % 3

    def train_loss(self) -> torch.Tensor:
        batch = self.module.transform_batch({"pixel_values": self.patterns})
        return F.cross_entropy(self.model(batch["pixel_values"]), self.labels)

    def meta_loss(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.meta), self.labels)

    def meta_loss_after_a_step(self, angle: float, lr: float) -> float:
        with torch.no_grad():
            self.module.angle.fill_(angle)
        theta = list(self.model.parameters())
        grads = torch.autograd.grad(self.train_loss(), theta)
        with torch.no_grad():
            torch._foreach_sub_(theta, [lr * grad for grad in grads])
            loss = self.meta_loss().item()
            torch._foreach_add_(theta, [lr * grad for grad in grads])
        return loss

    def estimate(self, estimator, **settings) -> float:
        theta, meta = list(self.model.parameters()), [self.module.angle]
        return estimator(BilevelProblem(theta, meta, self.train_loss, self.meta_loss), **settings).grads[0].item()


def test_the_hypergradient_is_the_derivative_of_the_meta_loss_one_step_ahead():
    case, lr, step = TurnedPatterns(), 1e-3, 1e-4
    angle = case.module.angle.item()
    ahead, behind = (case.meta_loss_after_a_step(angle + s, lr) for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    with torch.no_grad():
        case.module.angle.fill_(angle)

    assert case.estimate(t1t2, lr=lr) == pytest.approx(expected, rel=1e-2)
    assert case.estimate(finite_difference, lr=lr, step_size=1e-4) == pytest.approx(expected, rel=1e-2)


def test_evograd_turns_the_training_images_in_the_same_direction():
    case = TurnedPatterns()
    estimates = [case.estimate(evograd, num_candidates=8, seed=seed) for seed in range(60)]
    assert sum(estimates) * case.estimate(t1t2, lr=1e-3) > 0


def test_the_summary_is_the_angle_in_degrees():
    assert_close(InputRotation(initial_degrees=-12.5).summary(), {"angle": torch.tensor(-12.5)})


def test_images_keep_their_type_and_the_batch_its_other_columns():
    batch = {"pixel_values": torch.randn(2, 1, 5, 5).bfloat16(), "labels": torch.tensor([0, 1])}
    turned = InputRotation(20).transform_batch(batch)
    assert turned["pixel_values"].dtype == torch.bfloat16
    assert turned["labels"] is batch["labels"]
    assert not torch.equal(turned["pixel_values"], batch["pixel_values"])


def test_it_is_saved_and_loaded_with_its_angle(tmp_path):
    InputRotation(25, padding="zeros").save_pretrained(tmp_path)
    loaded = MetaModule.from_pretrained(tmp_path)
    assert isinstance(loaded, InputRotation)
    assert loaded.padding == "zeros"
    assert_close(loaded.summary()["angle"], torch.tensor(25.0))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(2, 3)}, r"expects a column `pixel_values` .* got None, and the columns .*input_ids"),
        ({"pixel_values": torch.zeros(2, 3, 3)}, r"torch.float32 of shape \[2, 3, 3\]"),
        ({"pixel_values": torch.zeros(2, 1, 3, 3, dtype=torch.uint8)}, "torch.uint8 of shape"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        InputRotation().transform_batch(batch)


@pytest.mark.parametrize("angle", ["30", None, True, math.inf, math.nan])
def test_its_angle_should_be_a_finite_number(angle):
    with pytest.raises(ValueError, match="`initial_degrees` should be a finite number"):
        InputRotation(angle)


def test_an_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="`padding` should be one of border, zeros, reflection, got 'wrap'"):
        InputRotation(padding="wrap")
