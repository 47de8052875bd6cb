"""Statistics of successive hypergradients, and the warnings that follow from them."""

import pytest
import torch

from meta_trainer import MetaTrainingArguments
from meta_trainer.diagnostics import Diagnostics
from meta_trainer.hypergrad import Hypergradient


def diagnostics(tmp_path, **settings):
    return Diagnostics(MetaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings))


def result(grads, weights=(0.5, 0.5), val_loss=2.0, scores=(0.1, -0.1)):
    weights, scores = torch.tensor(weights), torch.tensor(scores)
    return Hypergradient(
        grads=tuple(torch.as_tensor(g, dtype=torch.float32) for g in grads),
        val_loss=torch.tensor(val_loss),
        train_losses=torch.ones(len(weights)),
        weights=weights,
        scores=scores,
        val_loss_change=torch.tensor(-0.25),
    )


@pytest.fixture
def messages(monkeypatch):
    heard = []
    monkeypatch.setattr("meta_trainer.diagnostics.logger.warning", heard.append)
    return heard


def test_the_weights_say_how_many_candidates_count_and_how_far_their_losses_are_apart(tmp_path):
    losses, temperature = torch.tensor([1.0, 1.3, 1.9]), 0.7
    weights = torch.softmax(-losses / temperature, 0)
    found = diagnostics(tmp_path).observe(result([[1.0]], weights.tolist(), scores=(0.1, 0.2, -0.4)))

    assert found["effective_candidates"] == pytest.approx(float(1 / weights.square().sum()))
    assert found["loss_spread"] == pytest.approx(float(losses.std() / temperature), rel=1e-5)
    assert found["candidate_weight_range"] == pytest.approx(float(weights.max() - weights.min()))
    assert found["loss_slope"] == pytest.approx(0.2)
    assert (found["loss"], found["loss_change"]) == (2.0, -0.25)


def test_the_cosine_is_that_of_two_successive_hypergradients_over_all_parameters(tmp_path):
    watch = diagnostics(tmp_path)
    assert "cosine_to_last" not in watch.observe(result([[1.0, 0.0], [0.0]]))
    assert watch.observe(result([[1.0, 0.0], [1.0]]))["cosine_to_last"] == pytest.approx(0.5**0.5)
    assert watch.observe(result([[-2.0, 0.0], [-2.0]]))["cosine_to_last"] == pytest.approx(-1)


@pytest.mark.parametrize("expected", [0.0, 0.5, 2.0])
def test_signal_to_noise_finds_the_mean_in_units_of_the_deviation(tmp_path, expected):
    torch.manual_seed(0)
    watch, found = diagnostics(tmp_path), []
    direction = torch.ones(100) / 10
    for _ in range(600):
        noise = torch.randn(100) / 10  # of standard deviation 1, all entries together
        found.append(watch.observe(result([expected * direction + noise])).get("signal_to_noise"))

    assert float(torch.stack(found[100:]).mean()) == pytest.approx(expected, abs=0.1)


def test_statistics_stay_on_their_device_as_scalars(tmp_path):
    watch = diagnostics(tmp_path)
    watch.observe(result([[1.0]]))
    assert all(
        isinstance(value, torch.Tensor) and value.dim() == 0 for value in watch.observe(result([[1.0]])).values()
    )


def test_a_state_goes_on_where_it_was_saved(tmp_path):
    torch.manual_seed(0)
    first, second = diagnostics(tmp_path), diagnostics(tmp_path)
    for _ in range(5):
        first.observe(result([torch.randn(3)]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    grads = [torch.randn(3)]
    assert first.observe(result(grads)) == second.observe(result(grads))


FINE = {
    "meta/max_candidate_weight": 0.8,
    "meta/candidate_weight_range": 0.6,
    "meta/loss_slope": 1e-3,
    "meta/overlap": 0.0,
    "meta/objective_change": 1e-3,
}
TROUBLES = {
    "meta/max_candidate_weight": (0.99, "saturated: the largest weight is 0.990 .*Raise `temperature`, now 0.05"),
    "meta/candidate_weight_range": (1e-4, "flat: weights differ by 1.0e-04 .*Lower `temperature`.*'auto'"),
    "meta/loss_slope": (0.0, "does not react .*`perturb`, now"),
    "meta/overlap": (0.125, "overlap: 12.5% .*out of the training set"),
    "meta/objective_change": (0.03, "outruns the model: .*by 3%.*Lower `meta_learning_rate`"),
}


def test_what_is_fine_is_passed_over_in_silence(tmp_path, messages):
    diagnostics(tmp_path).check(FINE)
    diagnostics(tmp_path).check({})
    assert messages == []


@pytest.mark.parametrize("name", TROUBLES)
def test_a_trouble_is_warned_about_once_with_the_remedy(tmp_path, messages, name):
    value, expected = TROUBLES[name]
    watch = diagnostics(tmp_path)
    for factor in (1.0, 1.001):
        watch.check({**FINE, name: value * factor})

    assert len(messages) == 1
    with pytest.raises(ValueError, match=expected):
        raise ValueError(messages[0])


def test_weights_that_are_equal_by_definition_are_no_trouble(tmp_path, messages):
    diagnostics(tmp_path, hypergradient="finite_difference").check({**FINE, "meta/candidate_weight_range": 0.0})
    diagnostics(tmp_path, hypergradient="t1t2").check({**FINE, "meta/max_candidate_weight": 1.0})
    diagnostics(tmp_path, noise="guided").check({**FINE, "meta/candidate_weight_range": 1e-5})
    assert messages == []
