"""The base optimizer's own next step, against the optimizers of torch themselves."""

import copy

import pytest
import torch
from problem_zoo import ZOO, Case, relative_error, unrolled_sgd
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, GradientDescent, OptimizerStep, evograd, finite_difference, t1t2
from meta_trainer.hypergrad.noise import Perturbations

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": (SGD, {}),
    "sgd_decay": (SGD, {"weight_decay": 0.3}),
    "momentum": (SGD, {"momentum": 0.9}),
    "momentum_decay": (SGD, {"momentum": 0.9, "weight_decay": 0.3}),
    "dampening": (SGD, {"momentum": 0.8, "dampening": 0.6, "weight_decay": 0.1}),
    "nesterov": (SGD, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam, {}),
    "adam_decay": (Adam, {"weight_decay": 0.3}),
    "adam_without_memory": (Adam, {"betas": (0.0, 0.5), "eps": 1e-2}),
    "adamw": (AdamW, {}),
    "adamw_decay": (AdamW, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}),
}
ADAMS = ["adam", "adam_decay", "adam_without_memory", "adamw", "adamw_decay"]
LONG = ["dampening", "adamw_decay"]
HISTORIES = [(name, count) for name in OPTIMIZERS for count in (0, 1, 5, *([200] if name in LONG else []))]
SOME = ["momentum_decay", "nesterov", "adam_decay", "adamw_decay"]


def parameters(dtype=torch.float64):
    """Of several shapes; the gradients of one are far larger than those of the others."""
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in [(4, 3), (5,), (), (2, 1, 2)]]


def gradients_like(tensors):
    return [torch.randn_like(t) * scale for t, scale in zip(tensors, (1.0, 30.0, 0.1, 1e-3), strict=True)]


def stepped(name, count, dtype=torch.float64, **settings):
    """An optimizer with two groups after `count` steps of random gradients, and its parameters."""
    kind, own = OPTIMIZERS[name]
    theta = parameters(dtype)
    optimizer = kind([{"params": theta[:2], "lr": 0.02}, {"params": theta[2:]}], lr=1e-3, **own, **settings)
    for _ in range(count):
        set_gradients(theta, gradients_like(theta))
        optimizer.step()
    optimizer.zero_grad()
    return optimizer, theta


def set_gradients(tensors, gradients):
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient.clone()


def twin(optimizer, theta, points=None, **settings):
    """An optimizer in the same state on copies of the parameters."""
    points = [t.detach().clone().requires_grad_() for t in theta] if points is None else points
    places = {id(t): point for t, point in zip(theta, points, strict=True)}
    groups = [{**g, "params": [places[id(p)] for p in g["params"]], **settings} for g in optimizer.param_groups]
    other = type(optimizer)(groups, lr=1.0, **settings)
    for t, point in zip(theta, points, strict=True):
        if t in optimizer.state:
            other.state[point] = copy.deepcopy(optimizer.state[t])
    return other, points


def differentiable_twin(optimizer, theta, points):
    """As above, for autograd through its step; it would count the steps in single precision."""
    other, _ = twin(optimizer, theta, points, differentiable=True, foreach=False, fused=False)
    if isinstance(other, Adam):
        for point in points:
            fresh = {name: torch.zeros_like(point.detach()) for name in ("exp_avg", "exp_avg_sq")}
            state = {"step": torch.tensor(0.0), **fresh, **other.state.get(point, {})}
            other.state[point] = {**state, "step": state["step"].double()}
    return other


def real_displacement(optimizer, theta, gradients, max_grad_norm=0.0):
    other, points = twin(optimizer, theta)
    set_gradients(points, gradients)
    if max_grad_norm:
        nn.utils.clip_grad_norm_(points, max_grad_norm)
    other.step()
    return [(point - t).detach() for point, t in zip(points, theta, strict=True)]


def real_rates(optimizer, theta, gradients, vector):
    """The vector times minus the derivative of the real update, by autograd through the real optimizer."""
    points = [t.detach().clone() for t in theta]
    other = differentiable_twin(optimizer, theta, points)
    leaves = [g.clone().requires_grad_() for g in gradients]
    for point, leaf in zip(points, leaves, strict=True):
        point.grad = leaf
    other.step()
    products = sum((point * part).sum() for point, part in zip(points, vector, strict=True))
    return [-g for g in torch.autograd.grad(products, leaves)]


def clip_factor(gradients, max_grad_norm):
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return min(1.0, max_grad_norm / (norm.item() + 1e-6)) if max_grad_norm else 1.0


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize(("name", "count"), HISTORIES)
def test_the_displacement_is_that_of_the_real_step(name, count, max_grad_norm):
    optimizer, theta = stepped(name, count)
    gradients = gradients_like(theta)

    found = OptimizerStep(optimizer, theta, max_grad_norm).displacement(gradients)

    assert_close(found, real_displacement(optimizer, theta, gradients, max_grad_norm), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("name", "count"), HISTORIES)
def test_the_drift_is_what_the_real_step_does_without_a_gradient(name, count):
    optimizer, theta = stepped(name, count)

    found = OptimizerStep(optimizer, theta, 1.0).drift()

    assert_close(
        found, real_displacement(optimizer, theta, [torch.zeros_like(t) for t in theta]), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "count"),
    # The first step of torch's SGD with momentum lets no derivative through.
    [(n, c) for n, c in HISTORIES if c or n in ("sgd", "sgd_decay", *ADAMS)],
)
def test_the_rates_are_autograds_through_the_real_step(name, count, max_grad_norm):
    optimizer, theta = stepped(name, count)
    gradients, vector = gradients_like(theta), [torch.randn_like(t) for t in theta]
    factor = clip_factor(gradients, max_grad_norm)

    found = OptimizerStep(optimizer, theta, max_grad_norm).precondition(vector, gradients)

    expected = real_rates(optimizer, theta, [g * factor for g in gradients], vector)
    assert_close(found, [part * factor for part in expected], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("name", ["momentum", "momentum_decay", "dampening", "nesterov"])
def test_the_rates_of_a_first_step_with_momentum_are_slopes_of_the_real_step(name):
    optimizer, theta = stepped(name, 0)
    gradients, ones = gradients_like(theta), [torch.ones_like(t) for t in theta]
    there, back = (real_displacement(optimizer, theta, [g + shift for g in gradients]) for shift in (0.5, -0.5))

    found = OptimizerStep(optimizer, theta).precondition(ones, gradients)

    assert_close(found, [b - t for t, b in zip(there, back, strict=True)], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["sgd_decay", "nesterov", "adam_decay", "adamw_decay"])
@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_all_implementations_of_an_optimizer_have_the_same_state(name, settings):
    optimizer, theta = stepped(name, 3, **settings)
    gradients = gradients_like(theta)

    found = OptimizerStep(optimizer, theta, 1.0).displacement(gradients)

    assert_close(found, real_displacement(optimizer, theta, gradients, 1.0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("name", ["momentum_decay", "adam_decay", "adamw_decay"])
def test_the_displacement_in_lower_precision(name, count, dtype):
    optimizer, theta = stepped(name, count, dtype)
    for t in theta:  # so that the difference is not rounded away
        t.data.mul_(1e-3)
    gradients = gradients_like(theta)

    found = OptimizerStep(optimizer, theta, 1.0).displacement(gradients)

    expected = real_displacement(optimizer, theta, gradients, 1.0)
    eps = torch.finfo(dtype).eps
    assert_close(found, expected, rtol=16 * eps, atol=0.2 * eps, check_dtype=False)


def test_a_learning_rate_that_is_a_tensor():
    theta = parameters()
    optimizer = SGD(theta, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9)
    gradients = gradients_like(theta)
    step = OptimizerStep(optimizer, theta)

    assert_close(step.displacement(gradients), [-0.1 * g for g in gradients])
    assert_close(step.precondition(gradients), [0.1 * g for g in gradients])
    assert_close(step.typical_rate(), torch.tensor(0.1).double())


def test_the_live_state_is_read():
    """A schedule changes the learning rate, a checkpoint the state."""
    optimizer, theta = stepped("adamw_decay", 5)
    optimizer.param_groups[0]["lr"] = 0.3
    other, points = twin(optimizer, theta)
    other.load_state_dict(optimizer.state_dict())
    gradients = gradients_like(theta)

    expected = real_displacement(optimizer, theta, gradients)
    assert_close(OptimizerStep(optimizer, theta).displacement(gradients), expected, rtol=1e-9, atol=1e-15)
    assert_close(OptimizerStep(other, points).displacement(gradients), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_state_among_others_takes_its_first_step(name):
    optimizer, theta = stepped(name, 3)
    optimizer.state.pop(theta[1], None)
    gradients, vector = gradients_like(theta), [torch.randn_like(t) for t in theta]
    step = OptimizerStep(optimizer, theta)

    assert_close(step.displacement(gradients), real_displacement(optimizer, theta, gradients), rtol=1e-9, atol=1e-15)
    expected = step.precondition(vector)
    assert all(part.isfinite().all() for part in (*expected, *step.drift(), *step.noise_variances()))
    assert (expected[1] == 0).all() == (name in ADAMS)
    assert (expected[0] != 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_narrower_scope_has_the_steps_of_its_tensors(name):
    optimizer, theta = stepped(name, 4)
    gradients = gradients_like(theta)
    expected = real_displacement(optimizer, theta, gradients)

    found = OptimizerStep(optimizer, [theta[3], theta[0]]).displacement([gradients[3], gradients[0]])

    assert_close(found, [expected[3], expected[0]], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["sgd", "momentum_decay", "dampening", "nesterov"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_rates_of_sgd_are_known_before_the_gradient(name, count):
    optimizer, theta = stepped(name, count)
    step, vector = OptimizerStep(optimizer, theta), gradients_like(theta)

    assert_close(step.precondition(vector), step.precondition(vector, gradients_like(theta)))


@pytest.mark.parametrize(("name", "count"), [(n, c) for n, c in HISTORIES if c and n in ADAMS])
def test_the_expected_rates_of_adam_are_those_of_a_gradient_as_large_as_in_the_past(name, count):
    """Then the next second moment, without its bias, is the past one; the derivative through it is left out."""
    optimizer, theta = stepped(name, count)
    vector = [torch.randn_like(t) * 1e-9 for t in theta]
    (beta1, beta2), eps = (optimizer.param_groups[0][key] for key in ("betas", "eps"))

    found = OptimizerStep(optimizer, theta).precondition(vector)

    expected = []
    for group in optimizer.param_groups:
        for t in group["params"]:
            root = (optimizer.state[t]["exp_avg_sq"] / (1 - beta2**count)).sqrt()
            expected.append(group["lr"] * (1 - beta1) / (1 - beta1 ** (count + 1)) / (root + eps))
    assert_close(found, [v * rate for v, rate in zip(vector, expected, strict=True)], rtol=1e-9, atol=0)


def test_the_expected_rates_of_adam_fall_where_the_vector_is_larger_than_the_past():
    optimizer, theta = stepped("adam", 200)
    step = OptimizerStep(optimizer, theta)
    ones = [torch.ones_like(t) for t in theta]

    rates = [step.precondition([factor * part for part in ones]) for factor in (1e-9, 1e3, 1e4)]

    for small, large, larger in zip(*rates, strict=True):
        assert (large < 1e12 * small).all()
        assert (larger < 10 * large).all()


@pytest.mark.parametrize(("name", "count"), [(n, c) for n, c in HISTORIES if c])
def test_noise_variances_are_expected_rates_of_weighted_mean_one(name, count):
    optimizer, theta = stepped(name, count)
    step = OptimizerStep(optimizer, theta)
    variances, typical = step.noise_variances(), step.typical_rate()
    tiny = [torch.full_like(t, 1e-9) for t in theta]
    past = [
        optimizer.state[t].get("exp_avg_sq", torch.ones_like(t)) if optimizer.state.get(t) else torch.ones_like(t)
        for t in theta
    ]

    assert_close([v * typical * 1e-9 for v in variances], step.precondition(tiny), rtol=1e-6, atol=0)
    weighted = sum((v * p).sum() for v, p in zip(variances, past, strict=True)) / sum(p.sum() for p in past)
    assert_close(weighted, torch.ones(()).double(), rtol=1e-6, atol=0)


# Through a whole step.


def two_layer(num_examples=12, idle=False):
    """A model with dropout, learned weights of the examples, and a meta-parameter inside the loss."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    if idle:
        model.register_parameter("spare", nn.Parameter(torch.ones(3).double()))
    meta = [torch.randn(num_examples).double().requires_grad_(), torch.zeros(()).double().requires_grad_()]
    inputs, labels = torch.randn(num_examples, 3).double(), torch.randint(3, (num_examples,))
    held_out = torch.randn(num_examples, 3).double()

    def train(call, values):
        losses = F.cross_entropy(call(inputs) * values[1].exp(), labels, reduction="none")
        return (torch.sigmoid(values[0]) * losses).mean()

    def val(call, values):
        return F.cross_entropy(call(held_out), labels.flip(0)) + 0.1 * values[1] ** 2

    return Case(model, meta, train, val)


def trained(case, name, count, seed=1):
    """The case's optimizer after training on noisy gradients; two groups."""
    kind, own = OPTIMIZERS[name]
    theta = case.theta
    optimizer = kind([{"params": theta[:2], "lr": 0.02}, {"params": theta[2:]}], lr=0.005, **own)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        loss = case.train(case.model, [m.detach() for m in case.meta_params])
        slopes = torch.autograd.grad(loss, theta, allow_unused=True)
        for t, slope in zip(theta, slopes, strict=True):
            noise = 0.03 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
            t.grad = None if slope is None else slope + noise
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def unrolled(case, optimizer, max_grad_norm=0.0):
    """Autograd through one real step of the optimizer; the factor of the clipping is a constant."""
    with torch.random.fork_rng():
        random_state = torch.get_rng_state()
        theta = [t.detach().clone().requires_grad_() for t in case.theta]
        loss = case.train(case.call_at(theta, random_state), case.meta_params)
        slopes = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True, materialize_grads=True)
        factor = clip_factor([s.detach() for s in slopes], max_grad_norm)
        points = [t.detach().clone() for t in theta]
        other = differentiable_twin(optimizer, case.theta, points)
        for point, slope in zip(points, slopes, strict=True):
            point.grad = slope * factor
        other.step()
        val_loss = case.val(case.call_at(points, random_state), case.meta_params)
        return torch.autograd.grad(val_loss, case.meta_params, allow_unused=True, materialize_grads=True)


def cosine(found, expected):
    a, b = (torch.cat([g.flatten() for g in group]) for group in (found, expected))
    return torch.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "count"),
    [(n, c) for n, c in HISTORIES if c or n in ("sgd", "sgd_decay", "adam_without_memory")],
)
def test_t1t2_equals_autograd_through_the_real_step(name, count, max_grad_norm):
    case = two_layer()
    optimizer = trained(case, name, count)
    expected = unrolled(case, optimizer, max_grad_norm)

    found = t1t2(case.problem(), inner_step=OptimizerStep(optimizer, case.theta, max_grad_norm)).grads

    assert max(g.abs().max() for g in expected) > 1e-6
    assert cosine(found, expected) > 1 - 1e-9
    assert relative_error(found, expected) < 1e-8


def test_t1t2_through_the_first_step_of_adam():
    """It is the sign of the gradient: nearly no derivative is left, so that rounding shows."""
    case = two_layer()
    optimizer = trained(case, "adamw", 0)
    expected = unrolled(case, optimizer)

    found = t1t2(case.problem(), inner_step=OptimizerStep(optimizer, case.theta)).grads

    assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_plain_sgd_is_gradient_descent():
    case = ZOO["dropout"](torch.float64)
    step = OptimizerStep(SGD(case.theta, lr=0.3), case.theta)
    expected = unrolled_sgd(case, 0.3)

    for inner_step in (step, GradientDescent(0.3)):
        assert relative_error(t1t2(case.problem(), inner_step=inner_step).grads, expected) < 1e-9
    settings = {"sigma": 1e-3, "noise": "guided"}
    assert (
        relative_error(
            evograd(case.problem(), inner_step=step, **settings).grads,
            evograd(case.problem(), inner_step=GradientDescent(0.3), **settings).grads,
        )
        < 1e-9
    )
    assert (
        relative_error(
            finite_difference(case.problem(), inner_step=step).grads, finite_difference(case.problem(), 0.3).grads
        )
        < 1e-9
    )


@pytest.mark.parametrize(
    # Without memory, the derivative through the second moment, which the expected rates leave out, is half of it all.
    "name",
    ["sgd", "dampening", "nesterov", "adam_decay", "adamw", "adamw_decay"],
)
@pytest.mark.parametrize(
    "estimate",
    [
        finite_difference,
        lambda problem, **settings: evograd(problem, 2, noise="guided", **settings),
        lambda problem, **settings: evograd(problem, 5, noise="guided", **settings),
    ],
    ids=["finite_difference", "guided_2", "guided_5"],
)
def test_estimates_without_second_derivatives_point_along_the_unroll(name, estimate):
    case = two_layer(24)
    optimizer = trained(case, name, 60)
    expected = unrolled(case, optimizer)

    found = estimate(case.problem(), inner_step=OptimizerStep(optimizer, case.theta)).grads

    assert cosine(found, expected) >= 0.9
    ratio = torch.cat([g.flatten() for g in found]).norm() / torch.cat([g.flatten() for g in expected]).norm()
    assert 0.4 < ratio < 2.5


@pytest.mark.parametrize("name", ["sgd", "momentum_decay", "nesterov", "dampening"])
def test_estimates_for_sgd_are_exact_but_for_the_point_of_the_validation_gradient(name):
    """The learning rate is so small that the gradient's own part of the step leads nowhere; its momentum does."""
    case = two_layer()
    optimizer = trained(case, name, 20)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for buffer in (state["momentum_buffer"] for state in optimizer.state.values()):
        if buffer is not None:
            buffer.mul_(30)
    step = OptimizerStep(optimizer, case.theta)
    expected = unrolled(case, optimizer)

    assert relative_error(finite_difference(case.problem(), inner_step=step).grads, expected) < 5e-3
    assert relative_error(evograd(case.problem(), 2, 1e-3, noise="guided", inner_step=step).grads, expected) < 5e-3


@pytest.mark.parametrize("name", ["momentum_decay", "adamw_decay"])
def test_guided_is_the_central_difference_for_real_optimizers_too(name):
    case = two_layer()
    step = OptimizerStep(trained(case, name, 20), case.theta, 0.1)
    difference = finite_difference(case.problem(), step_size=1e-4, inner_step=step)

    guided = evograd(case.problem(), 2, 1e-4, 100.0, "guided", inner_step=step)

    assert relative_error(guided.grads, difference.grads) < 1e-5
    assert_close(guided.val_loss, difference.val_loss, rtol=0, atol=0)
    assert_close(guided.val_loss_change, difference.val_loss_change, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["momentum_decay", "adam"])
def test_noise_of_the_optimizers_shape_points_along_the_unroll_in_the_mean(name):
    case = two_layer(24)
    optimizer = trained(case, name, 60)
    expected, step = unrolled(case, optimizer), OptimizerStep(optimizer, case.theta)

    estimates = [
        evograd(case.problem(), 8, 1e-4, noise="optimizer", inner_step=step, antithetic=True, seed=seed).grads
        for seed in range(60)
    ]

    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*estimates, strict=True)]
    assert cosine(mean, expected) > 0.9
    assert cosine(mean, expected) > sum(cosine(e, expected) for e in estimates) / 60 + 0.2
    parts, exact = (torch.cat([g.flatten() for g in group]) for group in (mean, expected))
    assert 0.6 < parts @ exact / (exact @ exact) < 1.4


@pytest.mark.parametrize("name", ["momentum_decay", "nesterov"])
def test_noise_of_an_optimizer_with_one_rate_is_blind_noise_of_that_rate(name):
    case = two_layer()
    optimizer = trained(case, name, 10)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    step = OptimizerStep(optimizer, case.theta)
    drift = step.drift()

    found = evograd(case.problem(), 4, 1e-3, noise="optimizer", inner_step=step)

    with torch.no_grad():
        signs = evograd(case.problem(), 4, 1e-3, inner_step=GradientDescent(step.typical_rate().item()))
    assert_close(found.train_losses, signs.train_losses, rtol=1e-12, atol=0)
    assert_close(found.weights, signs.weights, rtol=1e-12, atol=0)
    assert max(d.abs().max() for d in drift) > 1e-4
    assert not torch.allclose(found.scores, signs.scores, rtol=1e-6)


def test_noise_of_the_optimizers_shape_equals_the_literal_formula():
    """Signs times the root of the variances, around theta; the validation loss is at theta* plus the drift."""
    case = two_layer()
    step = OptimizerStep(trained(case, "adamw_decay", 20), case.theta)
    sigma, tau = 0.03, 0.05
    draw = Perturbations("sign", case.theta, 5, sigma, 11)
    rows = torch.stack([torch.cat([block.clone() for block in epsilon]) for epsilon in draw])
    rows *= torch.cat([v.flatten() for v in step.noise_variances()]).sqrt()
    sizes = [t.numel() for t in case.theta]

    def at(vector):
        return [t.detach() + e.view(t.shape) for t, e in zip(case.theta, vector.split(sizes), strict=True)]

    with torch.random.fork_rng():
        random_state = torch.get_rng_state()
        losses = torch.stack([case.train(case.call_at(at(row), random_state), case.meta_params) for row in rows])
        weights = torch.softmax(-losses / tau, dim=0)
        star = [t + d for t, d in zip(at(weights @ rows), step.drift(), strict=True)]
        val_loss = case.val(case.call_at(star, random_state), case.meta_params)
        total = torch.autograd.grad(val_loss, case.meta_params, retain_graph=True)
        plain = [t.detach() for t in star]
        direct = torch.autograd.grad(
            case.val(case.call_at(plain, random_state), case.meta_params),
            case.meta_params,
            allow_unused=True,
            materialize_grads=True,
        )

    found = evograd(case.problem(), 5, sigma, tau, "optimizer", 11, inner_step=step)

    # The scale is that of the inner step, whatever sigma and the temperature are.
    indirect = [[g - d for g, d in zip(grads, direct, strict=True)] for grads in (found.grads, total)]
    assert cosine(*indirect) > 1 - 1e-12
    assert_close(found.val_loss, val_loss.detach(), rtol=1e-12, atol=0)
    assert_close(found.weights, weights.detach(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["momentum", "adamw_decay"])
@pytest.mark.parametrize(
    "estimate",
    [finite_difference, lambda problem, **settings: evograd(problem, 2, 1e-5, noise="guided", **settings)],
    ids=["finite_difference", "guided"],
)
def test_the_change_of_the_validation_loss_is_that_of_t1t2(name, estimate):
    """The whole inner step's, to first order, momentum and weight decay included."""
    case = two_layer()
    optimizer = trained(case, name, 20)
    for group in optimizer.param_groups:
        group["lr"] *= 0.01
    step = OptimizerStep(optimizer, case.theta)
    exact = t1t2(case.problem(), inner_step=step).val_loss_change
    with torch.random.fork_rng():
        before = case.val(case.model, case.meta_params).detach()
    after = t1t2(case.problem(), inner_step=step).val_loss
    assert_close(exact, after - before, rtol=1e-2, atol=0)

    found = estimate(case.problem(), inner_step=step).val_loss_change

    assert_close(found, exact, rtol=0.2, atol=0)


ALL = {
    "t1t2": t1t2,
    "finite_difference": finite_difference,
    "guided": lambda problem, **settings: evograd(problem, 3, noise="guided", **settings),
    "guided_auto": lambda problem, **settings: evograd(problem, 3, temperature="auto", noise="guided", **settings),
    "optimizer": lambda problem, **settings: evograd(problem, 3, noise="optimizer", **settings),
}


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("name", SOME)
def test_at_the_end_of_a_schedule_the_direct_term_is_left(name, estimator):
    case = two_layer()
    optimizer = trained(case, name, 5)
    case.meta_params[1].data.fill_(0.4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    found = ALL[estimator](case.problem(), inner_step=OptimizerStep(optimizer, case.theta))

    assert_close(found.grads, (torch.zeros(12).double(), torch.tensor(0.08).double()))


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("name", SOME)
def test_before_the_first_step_every_estimate_is_finite(name, estimator):
    case = two_layer()
    step = OptimizerStep(trained(case, name, 0), case.theta, 1.0)

    found = ALL[estimator](case.problem(), inner_step=step)

    assert all(g.isfinite().all() for g in (*found.grads, found.val_loss_change, found.weights, found.scores))


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("name", ["momentum", "adamw_decay"])
def test_a_parameter_that_never_had_a_gradient(name, estimator):
    case = two_layer(idle=True)
    optimizer = trained(case, name, 5)
    spare = [t for t in case.theta if t.shape == (3,) and t.unique().numel() == 1]
    assert [dict(optimizer.state[t]) for t in spare if t in optimizer.state] == []

    found = ALL[estimator](case.problem(), inner_step=OptimizerStep(optimizer, case.theta))

    assert all(g.isfinite().all() for g in found.grads)
    assert found.grads[0].norm() > 0


@pytest.mark.parametrize("estimator", ALL)
def test_a_problem_in_single_precision_with_an_unreached_validation_loss(estimator):
    theta, meta = torch.randn(5, requires_grad=True), torch.tensor([3.0], requires_grad=True)
    problem = BilevelProblem([theta], [meta], lambda: (meta * theta**2).sum(), lambda: (meta**2).sum())
    optimizer = AdamW([theta], lr=0.1)
    theta.grad = torch.randn(5)
    optimizer.step()
    optimizer.zero_grad()

    assert ALL[estimator](problem, inner_step=OptimizerStep(optimizer, [theta])).grads[0].tolist() == [6.0]


@pytest.mark.parametrize("name", ["momentum", "adamw_decay"])
def test_an_optimizer_is_left_as_it_was(name):
    case = two_layer()
    optimizer = trained(case, name, 5)
    before = copy.deepcopy(optimizer.state_dict())

    for estimator in ALL.values():
        estimator(case.problem(), inner_step=OptimizerStep(optimizer, case.theta, 0.1))

    assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("max_grad_norm", [0.0, float("inf")])
def test_gradients_may_go_unclipped(max_grad_norm):
    optimizer, theta = stepped("sgd", 0)
    gradients = gradients_like(theta)

    found = OptimizerStep(optimizer, theta, max_grad_norm).displacement(gradients)

    assert_close(found, real_displacement(optimizer, theta, gradients))


# Refusals.


class Adafactor(torch.optim.Optimizer):
    """As in other libraries: an optimizer of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "kind",
    [Adafactor, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax],
)
def test_optimizers_of_other_kinds_are_refused(kind):
    theta = parameters()
    message = f"The inner step of {kind.__name__} is not known; those of SGD, Adam and AdamW of torch.optim are"
    with pytest.raises(ValueError, match=message):
        OptimizerStep(kind(theta), theta)
    with pytest.raises(ValueError, match=message):
        OptimizerStep.check_kind(kind)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_the_known_kinds_are_taken(kind):
    OptimizerStep.check_kind(kind)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(SGD, "maximize"), (Adam, "maximize"), (AdamW, "maximize"), (Adam, "amsgrad"), (AdamW, "amsgrad")],
)
def test_options_that_change_the_step_are_refused(kind, option):
    theta = parameters()
    with pytest.raises(
        ValueError, match=f"The inner step of an optimizer with {option}=True is not known. Switch it off"
    ):
        OptimizerStep(kind(theta, lr=1e-3, **{option: True}), theta)


def test_a_tensor_that_the_optimizer_does_not_hold_is_refused():
    theta = parameters()
    with pytest.raises(ValueError, match="should hold every tensor of theta, but 2 of 4 are not among its parameters"):
        OptimizerStep(SGD(theta[:2], lr=0.1), theta)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_the_learning_rate_of_gradient_descent_is_positive_and_finite(lr):
    with pytest.raises(ValueError, match=f"`lr` should be a positive, finite number, got {lr}"):
        GradientDescent(lr)
