"""Parameters that are spread over two replicas: the hypergradient is that of whole ones."""

import threading

import pytest
import torch
from problem_zoo import ZOO, Case
from test_cost import run_on_two_threads, split, two_part_case
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import evograd, finite_difference, t1t2
from meta_trainer.hypergrad.sharding import seed_of_shard


class Meeting:
    """Where two threads, which stand for two processes, exchange tensors."""

    def __init__(self):
        self.barrier, self.slots = threading.Barrier(2, timeout=20), [None, None]

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        both = list(self.slots)
        self.barrier.wait()
        return both


class HalfOfEach:
    """The rows of every parameter are dealt out to two replicas; a parameter with one row is the first one's alone.

    The model reads whole copies, which are gathered when they are needed and stale until then.
    """

    def __init__(self, case, rank, meeting):
        self.parameters, self.index, self._meeting = case.theta, rank, meeting
        self.shards = [part.detach().clone() for part in self.cut(self.parameters)]
        self.num_refreshed = 0
        self._stale = True

    def cut(self, tensors):
        return [torch.tensor_split(t.detach().reshape(len(t), -1), 2)[self.index].flatten() for t in tensors]

    def refresh(self):
        self._stale = True
        self.num_refreshed += 1

    def gather(self):
        if self._stale:
            parts = self._meeting.exchange(self.index, [shard.clone() for shard in self.shards])
            for parameter, *halves in zip(self.parameters, *parts, strict=True):
                parameter.data.copy_(torch.cat(halves).view_as(parameter))
            self._stale = False

    def gradient(self, loss, meta_params):
        grads = torch.autograd.grad(loss, [*self.parameters, *meta_params], allow_unused=True, materialize_grads=True)
        number = len(self.parameters)
        pairs = zip(*self._meeting.exchange(self.index, grads[:number]), strict=True)
        return self.cut([(a + b) / 2 for a, b in pairs]), grads[number:]

    def total(self, tensor):
        first, second = self._meeting.exchange(self.index, tensor)
        return first + second


def on_shards(cases, estimator, **settings):
    """Result, sharding and case of two replicas that hold half of every parameter each."""
    meeting, results = Meeting(), [None, None]

    def replica(rank):
        case = cases[rank]
        sharding = HalfOfEach(case, rank, meeting)
        train, val = case.train, case.val

        def gathered(objective):
            def evaluate():
                sharding.gather()
                return objective(case.model, case.meta_params)

            return evaluate

        def mean(tensor):
            first, second = meeting.exchange(rank, tensor)
            return (first + second) / 2

        noise = settings.get("noise")
        own = (
            {**settings, "noise": lambda k, shards: sharding.cut(noise(k, case.theta))} if callable(noise) else settings
        )
        problem = case.problem(
            theta=sharding.shards,
            train_loss=gathered(train),
            val_loss=gathered(val),
            mean=mean,
            sharding=sharding,
            with_train_grads=True,
        )
        before = [shard.clone() for shard in sharding.shards]
        try:
            results[rank] = estimator(problem, **own)
        except ArithmeticError as error:
            results[rank] = error
        assert all(torch.equal(a, b) for a, b in zip(before, sharding.shards, strict=True))
        assert sharding._stale
        assert all(p.requires_grad and p.grad is None for p in (*case.theta, *case.meta_params))

    run_on_two_threads(replica)
    return results


def given(k, theta):
    generator = torch.Generator().manual_seed(11 + k)
    return [0.01 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in theta]


EXACT = [
    pytest.param(evograd, {"noise": given, "num_candidates": 3}, id="given"),
    pytest.param(evograd, {"noise": given, "num_candidates": 3, "temperature": "auto"}, id="auto"),
    pytest.param(evograd, {"noise": "guided", "num_candidates": 3}, id="guided"),
    pytest.param(evograd, {"noise": "guided", "relative_sigma": True}, id="relative"),
    pytest.param(evograd, {"noise": "guided", "include_unperturbed": True, "num_candidates": 4}, id="unperturbed"),
    pytest.param(finite_difference, {}, id="finite_difference"),
]


def halves_of_the_batch():
    """A case on both halves of a batch, and one on each."""
    case = two_part_case()
    halves = [slice(0, 4), slice(4, 8)]

    def val(call, meta):
        return (case.val(call, meta, halves[0]) + case.val(call, meta, halves[1])) / 2

    return Case(case.model, case.meta_params, case.train, val), [split(case, half) for half in halves]


@pytest.mark.parametrize(("estimator", "settings"), EXACT)
def test_shards_of_theta_have_the_hypergradient_of_whole_parameters(estimator, settings):
    whole, halves = halves_of_the_batch()

    results = on_shards(halves, estimator, **settings)

    expected = estimator(whole.problem(with_train_grads=True), **settings)
    for found in results:
        assert_same_result(found, expected)
    train_grads = [torch.stack(parts).mean(dim=0) for parts in zip(*(r.train_grads for r in results), strict=True)]
    assert_close(train_grads, list(expected.train_grads), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dropout", "in_the_forward_pass", "tied", "idle_theta", "direct_term"])
@pytest.mark.parametrize(("estimator", "settings"), EXACT[:1] + EXACT[-1:])
def test_both_replicas_find_what_one_finds_on_the_same_batch(name, estimator, settings):
    cases = []
    for _ in range(3):
        torch.manual_seed(4)
        cases.append(ZOO[name](torch.float64))
    # Two threads share the global random state.
    for case in cases:
        for module in case.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    results = on_shards(cases[:2], estimator, **settings)

    expected = estimator(cases[2].problem(), **settings)
    for found in results:
        assert_same_result(found, expected)


def single_rows():
    """All parameters have one row, so that the second replica holds nothing at all."""
    inputs, labels = torch.randn(6, 4).double(), torch.randn(6).double()
    model, meta = nn.Linear(4, 1).double(), [torch.randn(6).double().requires_grad_()]

    def train(call, m):
        return (torch.sigmoid(m[0]) * (call(inputs).squeeze(1) - labels) ** 2).mean()

    return Case(model, meta, train, lambda call, m: F.l1_loss(call(inputs.flip(0)).squeeze(1), labels))


@pytest.mark.parametrize(("estimator", "settings"), EXACT)
def test_a_replica_without_any_part_of_theta_takes_part(estimator, settings):
    cases = []
    for _ in range(3):
        torch.manual_seed(6)
        cases.append(single_rows())

    results = on_shards(cases[:2], estimator, **settings)

    expected = estimator(cases[2].problem(), **settings)
    for found in results:
        assert_same_result(found, expected)


BLIND = [
    pytest.param({"noise": "sign"}, id="sign"),
    pytest.param({"noise": "normal", "antithetic": True, "num_candidates": 4}, id="antithetic"),
    pytest.param({"noise": "sign", "orthogonal": True, "num_candidates": 4}, id="orthogonal"),
    pytest.param({"noise": "sign", "relative_sigma": True}, id="relative"),
    pytest.param({"noise": "guided", "guidance": 0.5, "num_candidates": 3}, id="half-guided"),
]


@pytest.mark.parametrize("settings", BLIND)
def test_replicas_agree_on_everything_but_their_own_signs(settings):
    _, halves = halves_of_the_batch()

    first, second = on_shards(halves, evograd, **settings)

    assert_same_result(first, second)
    assert first.scores.std() > 0


def test_equal_places_of_two_shards_are_perturbed_differently():
    seen, cases = [], []
    for _ in range(2):
        torch.manual_seed(0)
        case = Case(nn.Linear(64, 2, bias=False).double(), [torch.ones(1).double().requires_grad_()], None, None)
        case.val = lambda call, meta: call(torch.ones(1, 64).double()).sum()
        case.train = lambda call, meta: (call(torch.ones(1, 64).double()) * meta[0]).sum()
        cases.append(case)
    cases[0].model.register_forward_hook(lambda model, *call: seen.append(model.weight.detach().clone()))
    start = cases[0].model.weight.detach().clone()

    on_shards(cases, evograd, noise="sign", sigma=0.5, num_candidates=2)

    for weight in seen[:2]:
        first, second = weight - start  # of either replica
        assert_close(first.abs(), torch.full_like(first, 0.5))
        assert 0.25 < (first == second).double().mean() < 0.75


def test_the_first_shard_is_perturbed_as_whole_parameters_are():
    assert seed_of_shard(5, 0) == 5
    assert len({seed_of_shard(seed, index) for seed in range(4) for index in range(4)}) == 16


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_shards_come_back_after_an_exception(fails_at):
    _, halves = halves_of_the_batch()
    for case in halves:
        case.train = _failing(case.train, fails_at)
        case.val = _failing(case.val, fails_at - 3)

    results = on_shards(halves, evograd, noise="sign", num_candidates=3)

    assert all(isinstance(result, ArithmeticError) for result in results)


def _failing(objective, after):
    calls = []

    def evaluate(*args):
        calls.append(None)
        if len(calls) == after + 1:
            raise ArithmeticError("on purpose")
        return objective(*args)

    return evaluate


def test_a_loss_scale_leaves_no_trace_in_the_result():
    whole, halves = halves_of_the_batch()
    for case in halves:
        problem = case.problem
        case.problem = lambda problem=problem, **changes: problem(loss_scale=torch.tensor(1024.0), **changes)

    found, _ = on_shards(halves, finite_difference)

    assert_same_result(found, finite_difference(whole.problem()))


def test_second_derivatives_need_whole_parameters():
    case = ZOO["linear"](torch.float64)
    with pytest.raises(ValueError, match="t1t2 differentiates twice through whole parameters"):
        t1t2(case.problem(sharding=HalfOfEach(case, 0, Meeting())))


def test_replicas_with_shards_do_not_share_candidates():
    case = ZOO["linear"](torch.float64)
    with pytest.raises(
        ValueError, match=r"evaluate every candidate together, so `turn` should be \(0, 1\), got \(1, 2\)"
    ):
        case.problem(sharding=HalfOfEach(case, 0, Meeting()), turn=(1, 2))


def assert_same_result(found, expected):
    assert not isinstance(found, Exception)
    assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)
    for name in ("val_loss", "train_losses", "weights", "scores", "val_loss_change"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
