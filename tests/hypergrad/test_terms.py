"""A training loss that is given by its terms, the micro-batches of an accumulated one."""

from dataclasses import replace

import pytest
import torch
from problem_zoo import ZOO
from test_cost import on_replicas
from test_intermediates import Transformed
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import OptimizerStep, evograd, finite_difference, t1t2

ESTIMATORS = [
    pytest.param(evograd, {"num_candidates": 3, "sigma": 0.05}, id="evograd"),
    pytest.param(evograd, {"noise": "guided"}, id="guided"),
    pytest.param(finite_difference, {}, id="finite_difference"),
    pytest.param(t1t2, {}, id="t1t2"),
]


def terms_of(case):
    """Three terms that draw random numbers one after another, and their sum."""
    terms = [lambda f=f: f * case.train(case.model, case.meta_params) for f in (0.2, 0.5, 0.3)]
    return terms, lambda: sum(term() for term in terms)


def assert_same(found, expected):
    assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-13)
    assert_close(found.train_grads, expected.train_grads, rtol=1e-9, atol=1e-13)
    for name in ("val_loss", "train_losses", "weights", "scores", "val_loss_change"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS)
def test_terms_have_the_hypergradient_of_their_sum(name, estimator, settings):
    torch.manual_seed(0)
    case = ZOO[name](torch.float64)
    terms, total = terms_of(case)
    expected = estimator(case.problem(train_loss=total, with_train_grads=True), **settings)

    found = estimator(case.problem(train_loss=terms, with_train_grads=True), **settings)

    assert max(grad.abs().max() for grad in expected.grads) > 1e-12
    assert_same(found, expected)


@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS)
def test_terms_leave_no_trace(estimator, settings):
    torch.manual_seed(0)
    case = ZOO["dropout"](torch.float64)
    before, random_state = [t.detach().clone() for t in case.theta], torch.get_rng_state()

    estimator(case.problem(train_loss=terms_of(case)[0]), **settings)

    assert all(torch.equal(t, b) for t, b in zip(case.theta, before, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS)
def test_what_happens_between_two_terms_sees_the_random_numbers_of_training(estimator, settings):
    torch.manual_seed(0)
    case = ZOO["dropout"](torch.float64)
    (first, second, _), states = terms_of(case)[0], []

    class Watched:
        def __iter__(self):
            for term in (first, second):
                states.append(torch.get_rng_state())
                yield term

    expected = [torch.get_rng_state()]
    with torch.random.fork_rng():
        first()
        expected.append(torch.get_rng_state())

    estimator(case.problem(train_loss=Watched()), **settings)

    assert len(states) in (2, 4)
    for state, right in zip(states, expected * 2, strict=False):
        assert torch.equal(state, right)


@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS[:3])
def test_terms_may_have_intermediates_of_their_own(estimator, settings):
    case = Transformed()
    pairs = []

    class Shared:
        """Each term is twice the objective, from leaves that are made anew."""

        def __iter__(self):
            for factor in (2.0, -1.0):
                pairs.clear()
                leaves = []

                def cut(value):
                    pairs.append((value.detach().requires_grad_(), value))
                    return pairs[-1][0]

                def term(factor=factor, leaves=leaves, cut=cut):
                    if not leaves:
                        leaves.extend(case.transform(cut))
                    return factor * case.objective(*leaves)

                yield term
            pairs.clear()

    expected = estimator(case.problem(with_train_grads=True), **settings)
    problem = case.problem(with_train_grads=True, intermediates=pairs)
    object.__setattr__(problem, "train_loss", Shared())

    assert_same(estimator(problem, **settings), expected)


def test_one_graph_is_alive_at_a_time():
    case = ZOO["linear"](torch.float64)
    alive, most = set(), []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            ctx.token = Token()
            return tensor * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Token:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    term = lambda: Node.apply(case.train(case.model, case.meta_params))  # noqa: E731
    evograd(case.problem(train_loss=[term] * 4), 3)

    assert len(most) == 12
    assert max(most) == 1


class Weighted(Transformed):
    """A weighted mean whose weights are learned and normalised over all examples, or over those of a slice."""

    def quotient(self, part, leaves):
        losses = F.cross_entropy(self.head((leaves[0] + leaves[1])[part]), self.labels[part], reduction="none")
        weights = torch.sigmoid(self.weights[part])
        return (weights * losses).sum(), weights.sum()

    def objective(self, one, two):
        numerator, denominator = self.quotient(slice(None), (one, two))
        return numerator / denominator

    def terms(self):
        return [
            lambda p=p: self.quotient(p, self.transform(lambda v: v)) for p in (slice(0, 1), slice(1, 4), slice(4, 6))
        ]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS)
def test_a_quotient_is_that_of_the_sums_over_terms(estimator, settings, inner):
    case = Weighted()
    if inner:
        settings = {**settings, "inner_step": adam_step(case)}
        if estimator is evograd and settings.get("noise") != "guided":
            settings["noise"] = "optimizer"
    expected = estimator(case.problem(with_train_grads=True), **settings)

    problem = case.problem(with_train_grads=True)
    object.__setattr__(problem, "train_loss", case.terms())
    assert_same(estimator(problem, **settings), expected)

    object.__setattr__(problem, "train_loss", lambda: case.quotient(slice(None), case.transform(lambda v: v)))
    assert_same(estimator(problem, **settings), expected)


@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS[:3])
def test_a_quotient_may_have_intermediates(estimator, settings):
    case = Weighted()
    expected = estimator(case.problem(with_train_grads=True), **settings)
    pairs, leaves = [], []

    def cut(value):
        pairs.append((value.detach().requires_grad_(), value))
        return pairs[-1][0]

    def train_loss():
        if not leaves:
            leaves.extend(case.transform(cut))
        return case.quotient(slice(None), leaves)

    problem = case.problem(with_train_grads=True, intermediates=pairs)
    object.__setattr__(problem, "train_loss", train_loss)
    assert_same(estimator(problem, **settings), expected)


@pytest.mark.parametrize(("estimator", "settings"), ESTIMATORS)
@pytest.mark.parametrize("turns", [False, True])
def test_a_quotient_is_that_of_the_sums_over_replicas(estimator, settings, turns):
    if turns and estimator is t1t2:
        pytest.skip("t1t2 has no candidates to deal out")
    cases, parts = [Weighted(), Weighted()], [slice(0, 2), slice(2, 6)]
    expected = estimator(cases[0].problem(with_train_grads=True), **settings)

    def evaluate(rank, mean):
        case, part = cases[rank], slice(None) if turns else parts[rank]
        problem = case.problem(with_train_grads=True, mean=mean, turn=(rank, 2) if turns else (0, 1))
        object.__setattr__(problem, "train_loss", lambda: case.quotient(part, case.transform(lambda v: v)))
        return estimator(problem, **settings)

    results = on_replicas(evaluate)
    # Each replica's own; their mean is what counts.
    train_grads = tuple(torch.stack(grads).mean(dim=0) for grads in zip(*(r.train_grads for r in results), strict=True))
    for found in results:
        assert_same(replace(found, train_grads=train_grads), expected)


def test_t1t2_refuses_a_denominator_that_depends_on_theta():
    case = ZOO["linear"](torch.float64)
    term = lambda: (case.train(case.model, case.meta_params), case.theta[0].sum())  # noqa: E731
    with pytest.raises(ValueError, match="denominator of `train_loss` should not depend on theta"):
        t1t2(case.problem(train_loss=term))


def adam_step(case):
    theta = list(case.head.parameters())
    optimizer = torch.optim.AdamW(theta, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        case.objective(*case.transform(lambda v: v)).backward()
        optimizer.step()
    optimizer.zero_grad()
    for parameter in case.meta_params:
        parameter.grad = None
    return OptimizerStep(optimizer, theta)
