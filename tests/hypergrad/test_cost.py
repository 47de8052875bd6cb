"""What an estimator keeps in memory and sends between replicas."""

import threading
import weakref

import pytest
import torch
from problem_zoo import ZOO, Case
from test_intermediates import Transformed
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import evograd, finite_difference, t1t2


class SavedTensor:
    """Stands for a tensor that a graph keeps; lives as long as the graph does."""

    def __init__(self, tensor):
        self.tensor = tensor


def graphs_alive_at_each_training_loss(case, estimator, **settings):
    """How many tensors the graphs of earlier training losses still keep when the next one is evaluated."""
    saved, alive = weakref.WeakSet(), []

    def pack(tensor):
        holder = SavedTensor(tensor)
        saved.add(holder)
        return holder

    def train_loss():
        alive.append(len(saved))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            return case.train(case.model, case.meta_params)

    estimator(case.problem(train_loss=train_loss), **settings)
    return alive


@pytest.mark.parametrize("name", ["linear", "in_the_forward_pass", "convolution"])
def test_one_candidates_graph_is_alive_at_a_time(name):
    alive = graphs_alive_at_each_training_loss(ZOO[name](torch.float64), evograd, num_candidates=5)
    assert alive == [0] * 5


def test_the_count_of_living_graphs_sees_one_that_is_kept():
    case = ZOO["linear"](torch.float64)

    alive = graphs_alive_at_each_training_loss(case, lambda problem: [problem.train_loss() for _ in range(3)])

    assert alive[0] == 0
    assert 0 < alive[1] < alive[2]


@pytest.mark.parametrize("estimator", [evograd, finite_difference])
@pytest.mark.parametrize("name", ["linear", "dropout", "batch_norm", "convolution", "tied"])
def test_a_meta_parameter_after_the_model_records_no_graph_through_the_model(name, estimator):
    case, recorded = ZOO[name](torch.float32), []
    problem = case.problem()
    hooks = [case.model.register_forward_hook(lambda *call: recorded.append(call[2].requires_grad))]

    estimator(problem)

    hooks[0].remove()
    validation = [True]
    training = [False, False]
    assert recorded == (training + validation if estimator is evograd else validation + training)


def test_a_meta_parameter_inside_the_model_records_the_graph_above_it_alone():
    case, recorded = ZOO["in_the_forward_pass"](torch.float32), []
    for module in (case.model.first, case.model.second):
        module.register_forward_hook(lambda *call: recorded.append(call[2].requires_grad))

    evograd(case.problem(), 2)

    assert recorded[:4] == [False, True] * 2


def test_evograd_sends_candidate_sized_and_meta_sized_tensors_only():
    sent, case = [], ZOO["idle_meta"](torch.float64)

    def mean(tensor):
        sent.append(tuple(tensor.shape))
        return tensor

    evograd(case.problem(mean=mean), 5)

    losses, scores, *rest = sent
    assert losses == scores == (5,)
    assert sorted(rest) == sorted([(), (8,), (2, 2)])


def split(case, part):
    """The case on half of its examples, with a model of its own."""
    model = torch.nn.Linear(3, 3).double()
    model.load_state_dict(case.model.state_dict())
    meta = [m.detach().clone().requires_grad_() for m in case.meta_params]
    return Case(model, meta, lambda c, m: case.train(c, m, part), lambda c, m: case.val(c, m, part))


def two_part_case():
    """A classification whose objectives can be evaluated on the first or the second half of the examples."""
    inputs, labels, held_out = torch.randn(8, 3).double(), torch.randint(3, (8,)), torch.randn(8, 3).double()
    model, meta = torch.nn.Linear(3, 3).double(), [torch.randn(3).double().requires_grad_()]
    everything = slice(None)

    def train(call, meta, part=everything):
        weights = torch.sigmoid(inputs[part] @ meta[0])
        return (weights * F.cross_entropy(call(inputs[part]), labels[part], reduction="none")).mean()

    def val(call, meta, part=everything):
        return F.cross_entropy(call(held_out[part]), labels[part].flip(0)) + (meta[0] ** 2).sum()

    return Case(model, meta, train, val)


@pytest.mark.parametrize("estimator", [evograd, finite_difference, t1t2])
def test_two_replicas_agree_with_one_that_has_both_batches(estimator):
    whole = two_part_case()
    halves = [split(whole, slice(0, 4)), split(whole, slice(4, 8))]
    results = on_replicas(lambda rank, mean: estimator(halves[rank].problem(mean=mean)))

    # The labels of the halves' validation losses are flipped within each half.
    whole.val = lambda call, meta, val=whole.val: (val(call, meta, slice(0, 4)) + val(call, meta, slice(4, 8))) / 2
    expected = estimator(whole.problem())
    for found in results:
        assert_same_result(found, expected)


SHARING = [
    pytest.param(evograd, {"num_candidates": 4}, id="evograd"),
    pytest.param(evograd, {"num_candidates": 5, "antithetic": True, "include_unperturbed": True}, id="layout"),
    pytest.param(evograd, {"num_candidates": 3, "noise": "guided", "guidance": 0.5}, id="guided"),
    pytest.param(finite_difference, {}, id="finite_difference"),
]


@pytest.mark.parametrize("with_intermediates", [False, True])
@pytest.mark.parametrize(("estimator", "settings"), SHARING)
def test_candidates_that_two_replicas_share_are_those_of_one(estimator, settings, with_intermediates):
    def problem(case, **changes):
        build = case.shared_problem if with_intermediates else case.problem
        return build(with_train_grads=True, **changes)

    cases = [Transformed(), Transformed()]
    results = on_replicas(lambda rank, mean: estimator(problem(cases[rank], mean=mean, turn=(rank, 2)), **settings))

    expected = estimator(problem(Transformed()), **settings)
    for found in results:
        assert_same_result(found, expected)
    # Each replica's own; their mean is what counts.
    train_grads = [torch.stack(parts).mean(dim=0) for parts in zip(*(r.train_grads for r in results), strict=True)]
    assert_close(train_grads, list(expected.train_grads), rtol=1e-9, atol=1e-12)


def test_each_replica_evaluates_its_share_and_the_first_candidate():
    seen, cases = [[], []], [ZOO["linear"](torch.float64) for _ in range(2)]

    def evaluate(rank, mean):
        case = cases[rank]
        start = case.theta[0].detach().clone()

        def train_loss():
            seen[rank].append(float((case.theta[0].detach() - start).flatten()[0]))
            return case.train(case.model, case.meta_params)

        return evograd(case.problem(train_loss=train_loss, mean=mean, turn=(rank, 2)), 5, noise=numbered)

    on_replicas(evaluate)

    assert [round(s, 3) for s in seen[0]] == [0.1, 0.3, 0.5]
    assert [round(s, 3) for s in seen[1]] == [0.1, 0.2, 0.4]


def test_more_replicas_than_candidates_are_refused():
    case = ZOO["linear"](torch.float64)
    with pytest.raises(ValueError, match=r"3 replicas should have at least as many candidates to share, got 2\."):
        evograd(case.problem(turn=(0, 3)), 2)


def test_t1t2_has_no_candidates_to_deal_out():
    case = ZOO["linear"](torch.float64)
    with pytest.raises(ValueError, match=r"`turn` should be \(0, 1\), got \(0, 2\)"):
        t1t2(case.problem(turn=(0, 2)))


def numbered(k, theta):
    return [torch.full_like(t, 0.1 * (k + 1)) for t in theta]


def on_replicas(evaluate):
    """Results of ``evaluate(rank, mean)`` on two threads, which stand for two processes."""
    barrier, slots, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def replica(rank):
        def mean(tensor):
            slots[rank] = tensor
            barrier.wait()
            average = (slots[0] + slots[1]) / 2
            barrier.wait()
            return average

        results[rank] = evaluate(rank, mean)

    run_on_two_threads(replica)
    return results


def run_on_two_threads(replica):
    """Calls ``replica(rank)`` for both ranks at once."""
    threads = [threading.Thread(target=replica, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_same_result(found, expected):
    assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)
    for name in ("val_loss", "train_losses", "weights", "scores", "val_loss_change"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
