"""Estimators as the trainer runs them: inner steps from the live optimizer, guards, and what they warn about."""

import pytest
import torch
from tiny import (
    NUM_TRAIN,
    HiddenShift,
    IdentityModule,
    PointClassifier,
    Recorder,
    meta_trainer,
    points,
    sentences,
    tiny_bert,
)
from torch import nn
from torch.nn.functional import cosine_similarity

from meta_trainer import MetaModule, MetaWeightNet, RepresentationTransform
from meta_trainer.hypergrad import NormalizedDescent, OptimizerStep, t1t2


def flat(grads):
    return torch.cat([grad.flatten() for grad in grads]).double()


class Estimates(Recorder):
    """Estimates every hypergradient a second time, exactly."""

    exact: tuple = ()

    def _estimate(self, problem):
        state = self.optimizer.optimizer.state
        if any(state.get(t) for t in problem.theta):
            step = OptimizerStep(self.optimizer.optimizer, problem.theta, self.args.max_grad_norm)
            self.exact = (*self.exact, t1t2(problem, inner_step=step))
        else:
            self.exact = (*self.exact, t1t2(problem, lr=self.args.learning_rate))
        return super()._estimate(problem)


class Plain(Recorder):
    """Estimates every hypergradient a second time, exactly, through gradient descent."""

    exact: tuple = ()

    def _estimate(self, problem):
        self.exact = (*self.exact, t1t2(problem, lr=self.args.learning_rate))
        return super()._estimate(problem)


OPTIMIZER_STEPS = {
    "t1t2": {"hypergradient": "t1t2", "inner_step": "optimizer"},
    "finite difference": {"hypergradient": "finite_difference", "inner_step": "optimizer"},
    "guided": {"noise": "guided", "inner_step": "optimizer"},
    "guided, auto": {"noise": "guided", "inner_step": "optimizer", "temperature": "auto"},
}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("name", OPTIMIZER_STEPS)
def test_directed_estimators_follow_the_live_optimizer(tmp_path, name, optim):
    trainer = meta_trainer(
        tmp_path,
        model=PointClassifier(),
        kind=Estimates,
        optim=optim,
        max_steps=30,
        warmup_steps=0,
        lr_scheduler_type="constant",
        **OPTIMIZER_STEPS[name],
    )
    trainer.train()
    cosines = [
        float(cosine_similarity(flat(found.grads), flat(exact.grads), dim=0))
        for found, exact in zip(trainer.results, trainer.exact, strict=True)
    ]
    assert len(cosines) == 30
    if name == "t1t2":
        assert min(cosines) > 0.999
    # Beforehand it is not known how Adam's denominator is going to change, which counts for much in its first steps.
    assert sum(cosines[20:]) / 10 > 0.95


class Normalized(Recorder):
    """Estimates every hypergradient a second time, exactly, through a step of given length."""

    exact: tuple = ()

    def _estimate(self, problem):
        self.exact = (*self.exact, t1t2(problem, inner_step=NormalizedDescent(self.args.learning_rate)))
        return super()._estimate(problem)


@pytest.mark.parametrize("perturb", ["all", ["head.*"]])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "estimator", [{"noise": "guided"}, {"hypergradient": "finite_difference"}, {"hypergradient": "t1t2"}]
)
def test_an_inner_step_of_given_length_is_that_of_the_whole_optimizer_step(tmp_path, perturb, micro_batches, estimator):
    trainer = meta_trainer(
        tmp_path,
        MetaWeightNet(4),
        PointClassifier(),
        kind=Normalized,
        inner_step="normalized",
        perturb=perturb,
        gradient_accumulation_steps=micro_batches,
        learning_rate=1e-3,
        max_steps=6,
        **estimator,
    )
    assert trainer.args.meta_guard == "none"
    trainer.train()
    for found, exact in zip(trainer.results, trainer.exact, strict=True):
        product, norms = flat(found.grads) @ flat(exact.grads), [float(flat(r.grads).norm()) for r in (found, exact)]
        assert product / norms[0] / norms[1] > 0.98
        # Of several normalizers, a difference quotient also sees the weights of the losses that it moves.
        assert micro_batches > 1 or norms[0] == pytest.approx(norms[1], rel=0.01)


def test_guided_noise_is_the_finite_difference_in_the_scale_of_the_inner_step(tmp_path):
    grads = {}
    for name, settings in {"fd": {"hypergradient": "finite_difference"}, "guided": {"noise": "guided"}}.items():
        trainer = meta_trainer(tmp_path, model=PointClassifier(), kind=Recorder, max_steps=1, **settings)
        trainer.train()
        grads[name] = flat(trainer.results[0].grads)
    torch.testing.assert_close(grads["guided"], grads["fd"], rtol=1e-2, atol=float(grads["fd"].abs().max()) * 1e-2)


@pytest.mark.parametrize("noise", ["sign", "guided"])
def test_an_automatic_temperature_keeps_the_weights_apart_and_the_scale(tmp_path, noise):
    trainer = meta_trainer(
        tmp_path, model=tiny_bert(), kind=Recorder, temperature="auto", noise=noise, num_candidates=4
    )
    trainer.train()
    for result in trainer.results:
        assert float(result.weights.max()) < 0.95
        assert float(result.weights.max() - result.weights.min()) > 0.01


@pytest.mark.parametrize("settings", [{"noise": "optimizer"}, *OPTIMIZER_STEPS.values()])
def test_an_optimizer_without_a_known_step_is_refused_at_once(tmp_path, settings):
    with pytest.raises(ValueError, match=r"inner step of Adafactor is not known.*SGD, Adam and AdamW"):
        meta_trainer(tmp_path, optim="adafactor", **settings)


def test_an_optimizer_that_is_handed_over_is_looked_at_too(tmp_path):
    model = PointClassifier()
    optimizer = torch.optim.RMSprop(model.parameters())
    with pytest.raises(ValueError, match="inner step of RMSprop is not known"):
        meta_trainer(
            tmp_path, model=model, keywords={"optimizers": (optimizer, None)}, inner_step="optimizer", noise="guided"
        )


class Deaf(MetaModule):
    """Uses its loss door, but not its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def reduce(self, losses, batch, outputs):
        return losses.mean() * self.scale.detach()


@pytest.mark.parametrize("hypergradient", ["evograd", "t1t2", "finite_difference"])
def test_a_meta_module_without_a_path_to_the_training_loss_is_an_error(tmp_path, hypergradient):
    trainer = meta_trainer(tmp_path, Deaf(), PointClassifier(), hypergradient=hypergradient)
    with pytest.raises(ValueError, match=r"does not depend on any parameter of Deaf.*`may_be_idle`"):
        trainer.train()


def test_it_is_none_where_nothing_is_to_be_learned_or_the_module_may_rest(tmp_path):
    meta_trainer(tmp_path, Deaf(), PointClassifier(), meta_learning_rate=0).train()
    meta_trainer(tmp_path, IdentityModule(), PointClassifier()).train()


@pytest.fixture
def messages(monkeypatch):
    heard = []
    monkeypatch.setattr("meta_trainer.diagnostics.logger.warning", heard.append)
    return heard


@pytest.mark.parametrize("shared", [True, False])
def test_meta_examples_that_are_in_the_train_batch_are_warned_about_once(tmp_path, messages, shared):
    model = PointClassifier()
    model.main_input_name = "features"
    train = points(4, 1)
    meta = [train[0], *points(3, 2)] if shared else points(4, 2)
    keywords = {"train_dataset": train, "meta_dataset": meta}
    trainer = meta_trainer(tmp_path, model=model, keywords=keywords, per_device_meta_batch_size=4)
    trainer.train()

    assert training_overlap(trainer) == pytest.approx(0.25 if shared else 0.0)
    assert sum("Train and meta batches overlap: 25.0%" in message for message in messages) == shared


def training_overlap(trainer):
    return trainer.state.log_history[0]["meta/overlap"]


def test_a_temperature_that_saturates_is_warned_about(tmp_path, messages):
    meta_trainer(tmp_path, model=PointClassifier(), sigma=0.5, temperature=1e-6).train()
    assert sum("saturated" in message for message in messages) == 1


@pytest.mark.parametrize("noise", ["sign", "guided"])
def test_a_run_without_trouble_warns_about_nothing(tmp_path, messages, monkeypatch, noise):
    monkeypatch.setattr("meta_trainer.trainer.logger.warning", messages.append)
    meta_trainer(tmp_path, model=PointClassifier(), noise=noise, temperature="auto").train()
    assert messages == []


@pytest.mark.parametrize("guard", ["ascent", "change"])
@pytest.mark.parametrize("hypergradient", ["evograd", "t1t2", "finite_difference"])
def test_a_guard_keeps_the_update_from_raising_the_training_objective(tmp_path, hypergradient, guard):
    class Updates(Recorder):
        changes: tuple = ()

        def _update_meta_module(self, result):
            before = [p.detach().clone() for p in self.meta_parameters]
            super()._update_meta_module(result)
            steps = [p.detach() - b for p, b in zip(self.meta_parameters, before, strict=True)]
            change = sum(float((s * u).sum()) for s, u in zip(steps, result.train_grads, strict=True))
            size = flat(steps).norm() * flat(result.train_grads).norm()
            self.changes = (*self.changes, change / float(size))

    settings = {"hypergradient": hypergradient, "meta_optim": "sgd", "meta_guard": guard, "meta_max_grad_norm": 0}
    trainer = meta_trainer(tmp_path, model=PointClassifier(), kind=Updates, meta_learning_rate=1e3, **settings)
    trainer.train()

    assert max(trainer.changes) < 1e-2
    if guard == "change":
        assert min(trainer.changes) > -1e-2


def test_a_trust_region_limits_what_an_update_does_to_the_training_objective(tmp_path):
    settings = {"noise": "guided", "meta_learning_rate": 0.3, "meta_guard": "none", "logging_steps": 1}
    free = meta_trainer(tmp_path, MetaWeightNet(4), PointClassifier(), meta_trust_region=0, **settings)
    free.train()
    bound = meta_trainer(tmp_path, MetaWeightNet(4), PointClassifier(), meta_trust_region=1e-3, **settings)
    bound.train()

    changes = [[log["meta/objective_change"] for log in t.state.log_history if "loss" in log] for t in (free, bound)]
    assert max(changes[0]) > 4e-3
    assert max(changes[1]) < 2e-3
    assert min(log["meta/step_share"] for log in bound.state.log_history if "loss" in log) < 0.5


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    for settings, message in (
        ({"inner_step": "optimizer"}, "needs noise='optimizer' or 'guided' with hypergradient='evograd', got 'sign'"),
        ({"inner_step": "normalized"}, "inner_step='normalized' needs noise='guided' .*, got 'sign'"),
        (
            {"inner_step": "normalized", "noise": "guided", "temperature": "auto"},
            "no spread of losses for temperature='auto' to follow",
        ),
        ({"inner_step": "normalized", "noise": "optimizer"}, "inner_step='normalized' needs noise='guided'"),
        (
            {"inner_step": "normalized", "noise": "guided", "relative_sigma": True},
            "do not go with inner_step='normalized'",
        ),
        ({"noise": "optimizer", "relative_sigma": True}, "`relative_sigma` .*noise='optimizer' has a scale of its own"),
        ({"noise": "guided", "learning_rate": 0}, "`learning_rate` should be a positive number .*noise='guided'"),
        ({"temperature": "cold"}, "`temperature` should be a positive number or 'auto', got 'cold'"),
        ({"guidance": 0.5}, "`guidance` is the share .*but `noise` is 'sign'"),
        ({"noise": "guided", "antithetic": True}, "`antithetic` is a layout of random perturbations"),
        ({"meta_guard": "all"}, "`meta_guard` should be one of none, ascent, change"),
    ):
        with pytest.raises(ValueError, match=message):
            meta_trainer(tmp_path, **settings)


@pytest.mark.parametrize("settings", [{"noise": "guided"}, {"hypergradient": "finite_difference"}])
def test_directed_estimators_survive_bfloat16_passes(tmp_path, settings):
    trainer = meta_trainer(tmp_path, HiddenShift(), tiny_bert(), kind=Plain, bf16=True, max_steps=8, **settings)
    trainer.train()
    cosines = [
        float(cosine_similarity(flat(found.grads), flat(exact.grads), dim=0))
        for found, exact in zip(trainer.results, trainer.exact, strict=True)
    ]
    assert sum(cosines) / len(cosines) > 0.9


@pytest.mark.parametrize(("settings", "warned"), [({"noise": "guided"}, 1), ({"noise": "sign"}, 0)])
def test_parameters_too_coarse_for_a_direction_are_warned_about(tmp_path, messages, monkeypatch, settings, warned):
    monkeypatch.setattr("meta_trainer.estimation.logger.warning", messages.append)
    meta_trainer(tmp_path, model=PointClassifier().bfloat16(), **settings)
    assert sum("round most of a short perturbation away" in message for message in messages) == warned


@pytest.mark.parametrize("settings", [{"noise": "guided"}, {"hypergradient": "finite_difference"}])
def test_a_transformation_reads_the_same_states_for_all_candidates_as_the_base_step_takes_them_for_given(
    tmp_path, settings
):
    torch.manual_seed(0)
    transform = RepresentationTransform(hidden_size=8, bottleneck_size=4)
    for parameter in transform.parameters():
        parameter.data.mul_(6)
    trainer = meta_trainer(
        tmp_path,
        transform,
        tiny_bert(),
        kind=Plain,
        keywords={"train_dataset": with_source(sentences(NUM_TRAIN, 1)), "meta_dataset": with_source(sentences(8, 2))},
        max_steps=6,
        **settings,
    )
    trainer.train()
    cosines = [
        float(cosine_similarity(flat(found.grads), flat(exact.grads), dim=0))
        for found, exact in zip(trainer.results, trainer.exact, strict=True)
    ]
    assert min(cosines) > 0.999


def with_source(examples):
    return [{**example, "is_source": torch.tensor(True)} for example in examples]
