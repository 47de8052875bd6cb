"""Meta-Weight-Net: its formula, and what each estimator sees of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2
from meta_trainer.modules import MetaWeightNet


def literal_weights(net, losses):
    hidden = F.relu(losses[:, None] * net.network[0].weight[:, 0] + net.network[0].bias)
    return torch.sigmoid(hidden @ net.network[2].weight[0] + net.network[2].bias[0])


def test_weights_are_the_papers_network_of_the_loss():
    net, losses = MetaWeightNet(hidden_size=7), torch.rand(5) * 3

    assert net.network[0].weight.shape == (7, 1)
    assert_close(net(losses), literal_weights(net, losses))


def test_the_paper_has_a_hundred_hidden_units():
    assert sum(parameter.numel() for parameter in MetaWeightNet().parameters()) == 301


def test_the_objective_is_the_normalised_weighted_mean():
    net, losses = MetaWeightNet(), torch.rand(6) * 4
    weights = literal_weights(net, losses)

    found = net.reduce(losses, {}, None)

    assert found.shape == ()
    assert_close(found, sum(w * loss for w, loss in zip(weights, losses, strict=True)) / weights.sum())


def test_the_objective_of_equal_losses_is_that_loss():
    assert_close(MetaWeightNet().reduce(torch.full((4,), 2.5), {}, None), torch.tensor(2.5))


@pytest.mark.parametrize("loss_input", ["shared", "unperturbed", "candidate"])
def test_the_weights_are_constants_to_the_base_model(loss_input):
    """The gradient by a loss is its normalised weight and nothing else."""
    net, losses = MetaWeightNet(loss_input=loss_input), (torch.rand(5) * 3).requires_grad_()
    (grad,) = torch.autograd.grad(net.reduce(losses, {}, None), losses)

    weights = literal_weights(net, losses.detach())
    assert_close(grad, weights / weights.sum())


@pytest.mark.parametrize("loss_input", ["shared", "unperturbed"])
def test_it_reads_the_reference_losses_where_there_are_any(loss_input):
    net, losses, reference = MetaWeightNet(loss_input=loss_input), torch.rand(4), torch.rand(4) * 5
    weights = literal_weights(net, reference)

    found = net.reduce(losses, {"reference_losses": reference}, None)

    assert net.reference_losses == loss_input
    assert_close(found, weights @ losses / weights.sum())
    assert not torch.allclose(found, net.reduce(losses, {}, None), rtol=1e-4)


def test_the_candidate_variant_reads_the_losses_that_it_weighs():
    net, losses, reference = MetaWeightNet(loss_input="candidate"), torch.rand(4), torch.rand(4) * 5

    assert net.reference_losses is None
    assert torch.equal(net.reduce(losses, {"reference_losses": reference}, None), net.reduce(losses, {}, None))


def test_the_weights_of_examples_are_those_of_the_objective_and_of_the_summary():
    net = MetaWeightNet()
    losses = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])

    weights = net.example_weights(losses, {})
    assert net.weighs_examples
    assert_close(weights, literal_weights(net, losses))
    assert_close(net.reduce(losses, {}, None), weights @ losses / weights.sum())
    summary = net.summary()
    assert list(summary) == [f"weight_at_loss_{loss}" for loss in ("0", "0.5", "1", "2", "4")]
    assert_close(torch.stack(list(summary.values())), weights.detach())


def test_weights_that_underflow_together_give_zero_and_not_nan():
    net, losses = MetaWeightNet(), torch.rand(3, requires_grad=True)
    with torch.no_grad():
        net.network[2].bias.fill_(-1e4)
    objective = net.reduce(losses, {}, None)
    objective.backward()

    assert net(losses).sum() == 0
    assert objective == 0
    assert losses.grad.tolist() == [0, 0, 0]
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_half_precision_losses_are_weighed_in_the_networks_precision():
    net, losses = MetaWeightNet(), torch.rand(4).bfloat16()
    weights = net(losses)

    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, net(losses.float()).bfloat16())


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_losses_that_are_not_one_per_example_are_refused(shape):
    with pytest.raises(ValueError, match=rf"one loss per example, shape \[N\], got \[{', '.join(map(str, shape))}\]"):
        MetaWeightNet()(torch.zeros(shape))


@pytest.mark.parametrize("size", [0, -3, "8", 1.5, True, None])
def test_its_size_should_be_a_positive_whole_number(size):
    with pytest.raises(ValueError, match=f"`hidden_size` should be a positive, whole number, got {size!r}"):
        MetaWeightNet(size)


def test_an_unknown_loss_input_is_refused():
    with pytest.raises(ValueError, match="one of shared, unperturbed, candidate, got 'own'"):
        MetaWeightNet(loss_input="own")


# ------------------------------------------------------------------------------ trusted examples


def test_a_trusted_example_has_the_weight_one():
    net, losses, trusted = MetaWeightNet(), torch.rand(4) * 3, torch.tensor([False, True, False, True])
    weights = literal_weights(net, losses).detach()
    expected = torch.where(trusted, torch.ones(4), weights)
    batch = {"is_trusted": trusted}

    assert net.batch_columns == ("is_trusted",)
    assert_close(net.example_weights(losses, batch).detach(), expected)
    assert_close(net.normalizer(losses, batch).detach(), expected.sum())
    assert_close(net.reduce(losses, batch, None).detach(), expected @ losses / expected.sum())


def test_all_tokens_of_a_trusted_sentence_have_the_weight_one():
    net, losses = MetaWeightNet(), torch.rand(5) * 3
    batch = {"is_trusted": torch.tensor([1, 0]), "example_of_loss": torch.tensor([0, 0, 1, 1, 1])}

    weights = net.example_weights(losses, batch).detach()

    assert weights[:2].tolist() == [1, 1]
    assert_close(weights[2:], literal_weights(net, losses[2:]).detach())


def test_beside_trusted_examples_the_scale_of_the_weights_is_learned():
    """Without them a common factor of all weights changes nothing, and its hypergradient is zero."""
    net, losses = MetaWeightNet().double(), torch.rand(6, dtype=torch.float64)
    with torch.no_grad():
        net.network[2].weight.zero_()  # a weight that does not depend on the loss

    def grad_of_bias(batch):
        return torch.autograd.grad(net.reduce(losses, batch, None), net.network[2].bias)[0].item()

    trusted = torch.arange(6) < 2
    assert abs(grad_of_bias({})) < 1e-12
    weight = net(losses)[0].item()
    # d/dw (sum_t + w sum_n) / (2 + 4w), times dw/db = w (1 - w)
    sums = losses[:2].sum().item(), losses[2:].sum().item()
    slope = (sums[1] * (2 + 4 * weight) - 4 * (sums[0] + weight * sums[1])) / (2 + 4 * weight) ** 2
    assert grad_of_bias({"is_trusted": trusted}) == pytest.approx(slope * weight * (1 - weight), rel=1e-9)


def test_trusted_marks_that_do_not_fit_the_losses_are_refused():
    with pytest.raises(ValueError, match=r"got 4 losses for `is_trusted` of shape \[3\]"):
        MetaWeightNet().example_weights(torch.rand(4), {"is_trusted": torch.ones(3)})


# ------------------------------------------------------------------------------ weights that know the label


def test_at_first_the_label_changes_nothing():
    torch.manual_seed(0)
    plain = MetaWeightNet()
    torch.manual_seed(0)
    aware, losses, classes = MetaWeightNet(num_classes=3), torch.rand(5) * 3, torch.tensor([0, 1, 2, 0, 1])

    assert aware.num_classes == 3
    assert torch.equal(aware(losses, classes), plain(losses))
    assert_close(aware.summary(), plain.summary())


def test_a_class_shifts_the_hidden_layer():
    net, losses, classes = MetaWeightNet(4, num_classes=3), torch.rand(5) * 3, torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        net.class_shifts.normal_()
    hidden = F.relu(losses[:, None] * net.network[0].weight[:, 0] + net.network[0].bias + net.class_shifts[classes])
    expected = torch.sigmoid(hidden @ net.network[2].weight[0] + net.network[2].bias[0])

    assert_close(net(losses, classes), expected)
    assert_close(net.example_weights(losses, {"label_of_loss": classes}), expected)
    at_two = torch.stack([net(torch.tensor([2.0]), torch.tensor([c])) for c in range(3)]).mean()
    assert_close(net.summary()["weight_at_loss_2"], at_two.detach())


def test_the_label_of_a_class_that_is_wrong_by_rule_loses_its_weight():
    """Half of the zeros are called ones, and never the other way round; a quarter of the rows are trusted."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs = torch.randn(60, 3).double()
    truth = (inputs[:, 0] > 0).long()
    trusted = torch.arange(60) < 15
    labels = torch.where(trusted, truth, truth | torch.randint(2, (60,)))
    net = MetaWeightNet(num_classes=2).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def objective():
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        return net.reduce(losses, {"label_of_loss": labels, "is_trusted": trusted}, None)

    problem = BilevelProblem(
        list(model.parameters()), list(net.parameters()), objective, lambda: F.cross_entropy(model(inputs), truth)
    )
    for _ in range(150):
        for parameter, grad in zip(net.parameters(), t1t2(problem, lr=0.1).grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        grads = torch.autograd.grad(objective(), list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter -= 0.3 * grad
    losses = torch.full((2,), 0.5).double()
    kept, distrusted = net(losses, torch.tensor([0, 1])).tolist()
    assert distrusted < 0.6 * kept


@pytest.mark.parametrize("classes", [None, torch.zeros(3, dtype=torch.long)])
def test_classes_are_to_be_given_exactly_where_they_are_read(classes):
    net = MetaWeightNet(num_classes=None if classes is not None else 2)
    with pytest.raises(ValueError, match=r"reads the class of a label exactly where it was made with `num_classes`"):
        net(torch.rand(3), classes)


@pytest.mark.parametrize("batch", [{}, {"label_of_loss": torch.zeros(2, dtype=torch.long)}])
def test_losses_without_a_class_each_are_refused(batch):
    with pytest.raises(ValueError, match=r"expects the class of each of 3 losses as `label_of_loss`, got (none|\[2\])"):
        MetaWeightNet(num_classes=2).example_weights(torch.rand(3), batch)


def test_a_model_of_another_number_of_classes_is_refused():
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(num_labels=4)
    MetaWeightNet(num_classes=4).check_model(model)
    MetaWeightNet().check_model(model)
    with pytest.raises(ValueError, match="num_classes=3 classes, but the model has 4"):
        MetaWeightNet(num_classes=3).check_model(model)


@pytest.mark.parametrize("size", [0, 1.5, "3"])
def test_the_number_of_classes_should_be_a_positive_whole_number(size):
    with pytest.raises(ValueError, match=f"`num_classes` should be a positive, whole number, got {size!r}"):
        MetaWeightNet(num_classes=size)


def test_shifts_are_saved_and_loaded(tmp_path):
    net = MetaWeightNet(5, num_classes=3)
    with torch.no_grad():
        net.class_shifts.normal_()
    net.save_pretrained(tmp_path)
    loaded = MetaWeightNet.from_pretrained(tmp_path)
    assert loaded.num_classes == 3
    assert_close(loaded.state_dict(), net.state_dict())


# ------------------------------------------------------------------------------ which derivative is estimated


class NoisyClassification:
    """A small classification whose examples are weighed by a Meta-Weight-Net, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.inputs, self.labels = torch.randn(12, 4).double(), torch.randint(3, (12,))
        self.held_out, self.held_out_labels = torch.randn(12, 4).double(), torch.randint(3, (12,))
        self.state = MetaWeightNet(hidden_size=10).double().state_dict()
        for name in self.state:
            self.state[name] = self.state[name] * 3

    def losses(self):
        return F.cross_entropy(self.model(self.inputs), self.labels, reduction="none")

    def problem(self, objective, net):
        val_loss = lambda: F.cross_entropy(self.model(self.held_out), self.held_out_labels)  # noqa: E731
        return BilevelProblem(list(self.model.parameters()), list(net.parameters()), objective, val_loss)

    def estimate(self, estimator, loss_input, **settings):
        """Hypergradient of a net that reads what `loss_input` says, as one vector."""
        net = MetaWeightNet(10, loss_input).double()
        net.load_state_dict(self.state)
        batch = {"reference_losses": self.losses().detach()} if loss_input == "unperturbed" else {}

        def objective():
            losses = self.losses()
            if loss_input == "shared":
                batch.setdefault("reference_losses", losses.detach())
            return net.reduce(losses, batch, None)

        problem = self.problem(objective, net)
        return torch.cat([grad.flatten() for grad in estimator(problem, **settings).grads])

    def t1t2_undetached(self, lr):
        """T1-T2 of a net through whose input the gradient flows."""
        net = MetaWeightNet(10).double()
        net.load_state_dict(self.state)

        def objective():
            losses = self.losses()
            weights = net.network(losses[:, None])[:, 0]
            return weights @ losses / weights.sum()

        return torch.cat([grad.flatten() for grad in t1t2(self.problem(objective, net), lr=lr).grads])


def cosine(left, right):
    return torch.cosine_similarity(left, right, dim=0).item()


@pytest.mark.parametrize("reference", ["shared", "unperturbed"])
def test_finite_differences_of_one_input_for_both_sides_agree_with_t1t2_of_detached_input(reference):
    case, lr = NoisyClassification(), 1e-4
    detached, undetached = case.estimate(t1t2, "candidate", lr=lr), case.t1t2_undetached(lr)
    unperturbed = case.estimate(finite_difference, reference, lr=lr, step_size=1e-4)
    candidate = case.estimate(finite_difference, "candidate", lr=lr, step_size=1e-4)

    assert cosine(detached, undetached) < 0.95
    assert cosine(unperturbed, detached) > 0.9999
    assert cosine(candidate, undetached) > 0.9999
    assert_close(unperturbed, detached, rtol=1e-2, atol=1e-2 * detached.norm().item())
    assert_close(candidate, undetached, rtol=1e-2, atol=1e-2 * undetached.norm().item())


@pytest.mark.parametrize("reference", ["shared", "unperturbed"])
def test_the_mean_evograd_estimate_agrees_with_t1t2_likewise(reference):
    case, lr = NoisyClassification(), 1e-6
    detached, undetached = case.estimate(t1t2, "unperturbed", lr=lr), case.t1t2_undetached(lr)

    def mean(loss_input):
        return sum(case.estimate(evograd, loss_input, num_candidates=8, seed=seed) for seed in range(100))

    unperturbed, candidate = mean(reference), mean("candidate")
    assert cosine(unperturbed, detached) > 0.98 > cosine(unperturbed, undetached)
    assert cosine(candidate, undetached) > 0.98 > cosine(candidate, detached)


def test_t1t2_of_unperturbed_and_of_detached_input_is_the_same():
    """At the unperturbed point both read the same numbers, and neither lets a gradient through."""
    case = NoisyClassification()
    assert_close(case.estimate(t1t2, "unperturbed"), case.estimate(t1t2, "candidate"), rtol=1e-12, atol=0)
