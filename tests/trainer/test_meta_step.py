"""One meta step: what it computes, what it leaves alone, and when it is taken."""

import random

import numpy as np
import pytest
import torch
from tiny import (
    NUM_META,
    NUM_TRAIN,
    HiddenShift,
    IdentityModule,
    MeanLoss,
    PointClassifier,
    arguments,
    batch_of,
    meta_trainer,
    points,
    same,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from meta_trainer import MetaModule, MetaTrainer
from meta_trainer.hypergrad import BilevelProblem, Hypergradient, evograd, finite_difference, t1t2
from meta_trainer.meta_optimizer import apply_hypergradient

ESTIMATORS = ["evograd", "t1t2", "finite_difference"]


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("hypergradient", ESTIMATORS)
@pytest.mark.parametrize("perturb", ["all", ["head.*"]])
def test_a_meta_step_changes_the_meta_module_and_nothing_else(tmp_path, hypergradient, perturb):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), hypergradient=hypergradient, perturb=perturb)
    model, batch = trainer.model, batch_of(points(8, 5))
    model.train()
    model.body[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.body[0].bias.requires_grad_(False)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    theta, lam, drawn, mode = snapshot(model), snapshot(trainer.meta_module), random_state(), modes(model)
    given = {key: value.clone() for key, value in batch.items()}

    result = trainer.meta_step(model, batch)

    assert isinstance(result, Hypergradient)
    assert [g.shape for g in result.grads] == [p.shape for p in trainer.meta_parameters]
    assert not same(snapshot(trainer.meta_module), lam)
    assert same(snapshot(model), theta)
    assert random_state() == drawn
    assert modes(model) == mode
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(p.grad is None and p.requires_grad for p in trainer.meta_parameters)
    assert same(batch, given)


@pytest.mark.parametrize("failing_pass", [0, 1, 2, 3])
def test_a_failing_meta_step_leaves_no_trace(tmp_path, failing_pass):
    trainer = meta_trainer(tmp_path, model=PointClassifier())
    model, passes = trainer.model, iter(range(4))
    whole_forward = model.forward

    def forward(**inputs):
        outputs = whole_forward(**inputs)
        if next(passes) == failing_pass:
            raise FloatingPointError("in the middle")
        return outputs

    model.forward = forward
    model.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    theta, lam, drawn = snapshot(model), snapshot(trainer.meta_module), random_state()

    with pytest.raises(FloatingPointError, match="in the middle"):
        trainer.meta_step(model, batch_of(points(8, 5)))

    assert same(snapshot(model), theta)
    assert same(snapshot(trainer.meta_module), lam)
    assert random_state() == drawn
    assert not any(modes(model))
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(p.grad is None and p.requires_grad for p in trainer.meta_parameters)
    model.forward = whole_forward
    assert trainer.evaluate(points(4, 6))["eval_loss"] > 0


def independent_problem(model, net, batch, meta_batch):
    """Meta-Weight-Net's problem, written without the trainer; dropout is drawn from the present state."""

    def losses(inputs):
        logits = model(input_ids=inputs["input_ids"]).logits
        return F.cross_entropy(logits, inputs["labels"], reduction="none")

    state = torch.random.get_rng_state()
    with torch.no_grad():
        unperturbed = losses(batch)
    torch.random.set_rng_state(state)

    def train_loss():
        weights = net.network(unperturbed[:, None])[:, 0]
        return (weights * losses(batch)).sum() / weights.sum()

    return BilevelProblem(
        theta=list(model.parameters()),
        meta_params=list(net.parameters()),
        train_loss=train_loss,
        val_loss=lambda: losses(meta_batch).mean(),
    )


def spread(module):
    """Widen the initial weights, so that the hypergradient stands out from rounding errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    return module


@pytest.mark.parametrize("hypergradient", ESTIMATORS)
def test_a_meta_step_of_meta_weight_net_equals_a_computation_by_hand(tmp_path, hypergradient):
    batch, meta_batch = batch_of(sentences(4, 5)), batch_of(sentences(4, 6))
    settings = {"hypergradient": hypergradient, "meta_weight_decay": 0.1, "meta_learning_rate": 0.01}
    settings |= {
        "num_candidates": 3,
        "sigma": 0.02,
        "temperature": 0.1,
        "noise": "normal",
        "learning_rate": 0.3,
    }
    model, net = spread(tiny_bert()), spread(weight_net())
    trainer = meta_trainer(tmp_path, spread(weight_net()), spread(tiny_bert()), **settings)
    model.train()

    torch.manual_seed(11)
    problem = independent_problem(model, net, batch, meta_batch)
    # The seed of the first meta step in a run with seed 3.
    seed = int(np.random.SeedSequence([3, 0]).generate_state(1)[0])
    expected = {
        "evograd": lambda: evograd(problem, 3, 0.02, 0.1, "normal", seed),
        "t1t2": lambda: t1t2(problem, lr=0.3),
        "finite_difference": lambda: finite_difference(problem, lr=0.3),
    }[hypergradient]()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    for parameter, grad in zip(net.parameters(), expected.grads, strict=True):
        parameter.grad = grad.clone()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()

    # Also a model that was evaluated last takes its meta step with dropout.
    trainer.model.eval()
    torch.manual_seed(11)
    found = trainer.meta_step(trainer.model, {**batch, "meta_batch": meta_batch})

    assert max(float(grad.abs().max()) for grad in expected.grads) > 1e-5
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.train_losses, expected.train_losses)
    torch.testing.assert_close(found.val_loss, expected.val_loss)
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(snapshot(trainer.meta_module), snapshot(net), rtol=1e-5, atol=1e-7)


def test_every_meta_step_of_a_run_has_perturbations_of_its_own(tmp_path):
    def scores(seed):
        trainer = meta_trainer(tmp_path, MeanLoss(), tiny_bert(dropout=0.0), seed=seed)
        batch = batch_of(sentences(4, 5))
        return [trainer.meta_step(trainer.model, {**batch, "meta_batch": batch}).scores.tolist() for _ in range(2)]

    first, second = scores(seed=3)
    assert first != second
    assert scores(seed=3) == [first, second]
    assert first not in scores(seed=4)


def test_nothing_is_differentiated_outside_the_scope(tmp_path):
    trainer = meta_trainer(tmp_path, perturb="head", hypergradient="t1t2")
    needed = []
    trainer.model.classifier.register_forward_pre_hook(
        lambda module, inputs: needed.append((inputs[0].requires_grad, module.weight.requires_grad))
    )
    trainer.meta_step(trainer.model, batch_of(sentences(4, 5)))
    # The unperturbed losses, the train loss and the meta loss.
    assert needed == [(False, True)] * 3
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class Recorder(MetaTrainer):
    """Writes down what happens, in order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events = []
        self.results = []
        trainer, backward = self, self.accelerator.backward

        def recorded_backward(*args, **kwargs):
            trainer.events.append("base")
            backward(*args, **kwargs)
            assert all(p.grad is None for p in trainer.meta_parameters)

        class Steps(TrainerCallback):
            def on_optimizer_step(self, *args, **kwargs):
                trainer.events.append("step")
                trainer.events.append(trainer.state.global_step)

        self.accelerator.backward = recorded_backward
        self.add_callback(Steps())

    def meta_step(self, model, inputs):
        self.events.append("meta")
        assert all(p.grad is None for p in self.model.parameters())
        theta = snapshot(self.model)
        result = super().meta_step(model, inputs)
        assert all(p.grad is None for p in self.model.parameters())
        assert same(snapshot(self.model), theta)
        self.results.append(result)
        return result


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("meta_every", [1, 3])
def test_one_meta_step_comes_before_the_base_step_of_every_meta_every_th_optimizer_step(
    tmp_path, accumulation, meta_every
):
    trainer = meta_trainer(
        tmp_path,
        HiddenShift(),
        kind=Recorder,
        gradient_accumulation_steps=accumulation,
        meta_every=meta_every,
        per_device_train_batch_size=2,
    )
    trainer.train()
    expected = []
    # 12 micro-batches an epoch: also the fourth step of an epoch with four per step is a whole one.
    for step in range(4):
        expected += ["meta"] * (step % meta_every == 0) + ["base"] * accumulation + ["step", step]
    assert trainer.events == expected


@pytest.mark.parametrize("module", [weight_net, HiddenShift])
def test_each_step_differentiates_its_own_parameters_only(tmp_path, module):
    trainer = meta_trainer(tmp_path, module(), kind=Recorder, keywords={"train_dataset": sentences(8, 1)}, max_steps=2)
    lam = snapshot(trainer.meta_module)
    trainer.train()
    assert trainer.events == ["meta", "base", "step", 0, "meta", "base", "step", 1]
    assert not same(snapshot(trainer.meta_module), lam)
    meta_parameters = {id(p) for p in trainer.meta_parameters}
    in_base_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not meta_parameters & in_base_optimizer
    assert not meta_parameters & {id(p) for p in trainer.model.parameters()}
    assert {id(p) for group in trainer.meta_optimizer.param_groups for p in group["params"]} == meta_parameters


@pytest.mark.parametrize("given_loss_function", [False, True])
def test_accumulation_does_not_inflate_the_loss_of_the_loss_door(tmp_path, given_loss_function):
    keywords = {}
    if given_loss_function:
        keywords = {
            "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(
                outputs["logits"], labels
            ),
            "per_example_loss": lambda outputs, labels: F.cross_entropy(outputs["logits"], labels, reduction="none"),
        }
    runs = [
        meta_trainer(
            tmp_path,
            MeanLoss(),
            tiny_bert(dropout=0.0),
            keywords=keywords,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
        )
        for accumulation in (1, 2)
    ]
    for trainer in runs:
        trainer.train()
    whole, halves = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in runs)
    assert halves == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(snapshot(runs[1].model), snapshot(runs[0].model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_scale_leaves_the_update_alone_and_falls_at_an_overflow(dtype):
    """Half precision scales on accelerators; the scaler itself runs anywhere."""
    updates = []
    for enabled in (False, True):
        parameter = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        grad = torch.tensor([3.0, 0.0, 4.0])
        norm, stepped = apply_hypergradient([parameter], [grad], optimizer, scaler, max_grad_norm=1.0)
        assert stepped
        assert float(norm) == pytest.approx(5.0)
        assert grad.tolist() == [3.0, 0.0, 4.0]
        assert parameter.grad is None
        updates.append(parameter.detach().clone())

        _, stepped = apply_hypergradient([parameter], [grad * float("inf")], optimizer, scaler, 1.0)
        assert not stepped
        assert torch.equal(parameter, updates[-1])
        assert scaler.get_scale() == (512.0 if enabled else 1.0)
    torch.testing.assert_close(updates[0], torch.tensor([0.94, 1.0, 0.92], dtype=dtype))
    torch.testing.assert_close(updates[1], updates[0])


def test_the_meta_optimizer_has_its_own_name_rate_and_decay(tmp_path):
    for name, kind in (
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("adamw_torch", torch.optim.AdamW),
    ):
        trainer = meta_trainer(
            tmp_path, meta_optim=name, meta_learning_rate=0.25, meta_weight_decay=0.125, optim="adafactor"
        )
        trainer.create_optimizer()
        assert type(trainer.meta_optimizer) is kind
        (group,) = trainer.meta_optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
        assert trainer.args.learning_rate == 1e-3
        assert type(trainer.optimizer).__name__ == "Adafactor"


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0.5, [0, 1 / 2, 1, 1 / 2]),
        ("constant_with_warmup", 3, [0, 1 / 3, 2 / 3, 1]),
    ],
)
def test_the_meta_schedule_runs_over_the_meta_steps(tmp_path, schedule, warmup, rates):
    trainer = meta_trainer(
        tmp_path,
        IdentityModule(),
        max_steps=7,
        meta_every=2,
        meta_learning_rate=0.1,
        meta_lr_scheduler_type=schedule,
        meta_warmup_steps=warmup,
        logging_steps=1,
    )
    trainer.train()
    logged = [log["meta/learning_rate"] for log in trainer.state.log_history if "meta/learning_rate" in log]
    assert logged == pytest.approx([0.1 * rate for rate in rates])


@pytest.mark.parametrize(("max_norm", "share"), [(0.0, 1.0), (1e9, 1.0), (None, 0.5)])
def test_the_hypergradient_is_clipped_to_its_norm(tmp_path, max_norm, share):
    def step(limit):
        trainer = meta_trainer(
            tmp_path,
            HiddenShift(),
            meta_optim="sgd",
            meta_learning_rate=1.0,
            meta_max_grad_norm=limit,
            hypergradient="t1t2",
            learning_rate=0.5,
        )
        before = trainer.meta_module.shift.detach().clone()
        result = trainer.meta_step(trainer.model, batch_of(sentences(4, 5)))
        return before - trainer.meta_module.shift.detach(), result.grads[0]

    _, grad = step(0.0)
    assert grad.norm() > 0
    update, _ = step(0.5 * float(grad.norm()) if max_norm is None else max_norm)
    torch.testing.assert_close(update, share * grad, rtol=1e-3, atol=1e-7)


def points_with_a_nan(number, position):
    data = points(number, 2)
    data[position]["features"] = torch.full((4,), float("nan"))
    return data


@pytest.mark.parametrize("hypergradient", ESTIMATORS)
def test_a_meta_batch_of_nan_is_skipped_and_training_goes_on(tmp_path, hypergradient):
    class Watcher(Recorder):
        def meta_step(self, model, inputs):
            before = snapshot(self.meta_module)
            states = None if self.meta_optimizer is None else self.meta_optimizer.state_dict()["state"]
            states = {i: {k: v.clone() for k, v in state.items()} for i, state in states.items()}
            result = super().meta_step(model, inputs)
            finite = all(bool(torch.isfinite(grad).all()) for grad in result.grads)
            assert same(snapshot(self.meta_module), before) is not finite
            assert same(self.meta_optimizer.state_dict()["state"], states) is not finite
            self.finite = [*getattr(self, "finite", []), finite]
            return result

    trainer = meta_trainer(
        tmp_path,
        model=PointClassifier(),
        kind=Watcher,
        keywords={"meta_dataset": points_with_a_nan(8, 1)},
        per_device_meta_batch_size=2,
        meta_lr_scheduler_type="linear",
        hypergradient=hypergradient,
        logging_steps=4,
    )
    trainer.train()
    assert trainer.finite.count(False) == 1
    assert all(bool(torch.isfinite(p).all()) for p in (*trainer.model.parameters(), *trainer.meta_parameters))
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["meta/skipped"] == 0.25
    assert log["meta/loss"] == pytest.approx(
        np.mean([float(r.val_loss) for r, finite in zip(trainer.results, trainer.finite, strict=True) if finite])
    )


def test_nan_in_every_meta_batch_from_the_first_on_trains_the_model_as_trainer_does(tmp_path):
    expected = Trainer(PointClassifier(), arguments(tmp_path, TrainingArguments), train_dataset=points(NUM_TRAIN, 1))
    expected.train()
    trainer = meta_trainer(
        tmp_path,
        MeanLoss(),
        PointClassifier(),
        keywords={"meta_dataset": points_with_a_nan(4, 0)},
        logging_steps=4,
    )
    lam = snapshot(trainer.meta_module)
    trainer.train()
    torch.testing.assert_close(snapshot(trainer.model), snapshot(expected.model))
    assert same(snapshot(trainer.meta_module), lam)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["meta/skipped"] == 1
    assert "meta/loss" not in log


def test_meta_data_that_is_missing_is_an_error(tmp_path):
    trainer = meta_trainer(tmp_path, keywords={"meta_dataset": None})
    with pytest.raises(ValueError, match=r"needs meta data.*columns are \['input_ids', 'labels'\]"):
        trainer.train()


@pytest.mark.parametrize(("meta_dataset", "message"), [([], "at least one example"), (iter([]), "map-style data set")])
def test_a_meta_dataset_without_examples_or_length_is_refused(tmp_path, meta_dataset, message):
    with pytest.raises(ValueError, match=message):
        meta_trainer(tmp_path, keywords={"meta_dataset": meta_dataset})


def test_every_example_of_the_meta_dataset_is_seen_once_a_pass(tmp_path):
    trainer = meta_trainer(tmp_path, per_device_meta_batch_size=NUM_META)
    for _ in range(2):
        seen = next(trainer.meta_data)["input_ids"].tolist()
        assert sorted(seen) == sorted(example["input_ids"].tolist() for example in sentences(NUM_META, 2))


def test_a_model_whose_loss_is_no_plain_mean_is_refused_at_the_loss_door(tmp_path):
    trainer = meta_trainer(tmp_path, model=PointClassifier(class_weights=torch.tensor([1.0, 9.0])))
    with pytest.raises(ValueError, match="objective is no plain mean"):
        trainer.train()


def test_a_per_example_loss_of_ones_own_replaces_that_of_the_heads(tmp_path):
    weights = torch.tensor([1.0, 9.0])

    def per_example_loss(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels, weight=weights, reduction="none")

    trainer = meta_trainer(
        tmp_path,
        MeanLoss(),
        PointClassifier(class_weights=weights),
        keywords={"per_example_loss": per_example_loss},
    )
    result = trainer.meta_step(trainer.model, batch_of(points(8, 5), 8))
    outputs = PointClassifier().train()(**batch_of(points(8, 5), 8))
    assert result.train_losses.mean() > 2 * outputs["loss"]
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_loss_function_of_trainer_cannot_feed_the_loss_door(tmp_path):
    with pytest.raises(ValueError, match=r"MetaWeightNet weighs examples.*Pass `per_example_loss`"):
        meta_trainer(tmp_path, keywords={"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: None})


def test_a_loss_function_of_trainer_serves_the_other_doors(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return 3 * F.cross_entropy(outputs["logits"], labels)

    trainer = meta_trainer(tmp_path, HiddenShift(), tiny_bert(0.0), keywords={"compute_loss_func": loss_function})
    batch = batch_of(sentences(4, 5))
    own = tiny_bert(0.0).train()(**batch).loss
    result = trainer.meta_step(trainer.model, {**batch, "meta_batch": batch})
    torch.testing.assert_close(result.val_loss, 3 * own.detach(), rtol=1e-2, atol=0)


def test_a_batch_without_labels_cannot_be_weighed(tmp_path):
    trainer = meta_trainer(tmp_path)
    batch = batch_of(sentences(4, 5))
    with pytest.raises(ValueError, match=r"needs a column `labels`, got the columns \['input_ids'"):
        trainer.meta_step(trainer.model, {"input_ids": batch["input_ids"]})


def test_a_meta_module_that_cannot_learn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MetaModule has no trainable parameter"):
        meta_trainer(tmp_path, MetaModule())


def test_a_meta_module_that_holds_the_model_is_refused(tmp_path):
    model, module = tiny_bert(), IdentityModule()
    module.inner = model.classifier
    with pytest.raises(ValueError, match="share parameters"):
        meta_trainer(tmp_path, module, model)


def test_a_scope_that_matches_nothing_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"'clasifier.\*', which matches no trainable parameter"):
        meta_trainer(tmp_path, perturb=["clasifier.*"])


def test_data_parallelism_within_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.nn\.DataParallel.*accelerate launch"):
        meta_trainer(tmp_path)


@pytest.mark.parametrize(("flag", "engine"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_engines_that_split_the_model_are_refused(tmp_path, flag, engine):
    trainer = meta_trainer(tmp_path)
    setattr(trainer, flag, True)
    with pytest.raises(NotImplementedError, match=f"does not run under {engine}"):
        trainer._refuse_engines()
