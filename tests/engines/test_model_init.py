"""`model_init` and `hyperparameter_search`: the meta module starts anew with the model."""

from types import SimpleNamespace

import pytest
import transformers.integrations
import transformers.trainer
from accelerate.utils.memory import release_memory
from tiny import NUM_META, NUM_TRAIN, arguments, losses_only, same, sentences, snapshot, tiny_bert, weight_net
from transformers.hyperparameter_search import HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from meta_trainer import MetaTrainer

SETTINGS = {
    "meta_lr_scheduler_type": "linear",
    "meta_learning_rate": 0.05,
    "logging_steps": 1,
    "meta_every": 2,
    "per_device_meta_batch_size": 3,
}


class Trials(MetaTrainer):
    """Keeps how every run ended."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ends = []

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.ends.append(
            {
                "theta": snapshot(self.model),
                "lambda": snapshot(self.meta_module),
                "meta optimizer": self.meta_optimizer.state_dict(),
                "meta schedule": self.meta_lr_scheduler.state_dict(),
                "meta steps": self._num_meta_steps,
                "meta batches": self.meta_data.batches_read,
                "diagnostics": self._diagnostics.state_dict(),
                "logs": losses_only([log for log in self.state.log_history if "loss" in log]),
            }
        )
        return output


def trainer_of(folder, **settings):
    return Trials(
        args=arguments(folder, **{**SETTINGS, **settings}),
        model_init=lambda trial: tiny_bert(),
        train_dataset=sentences(NUM_TRAIN, 1),
        eval_dataset=sentences(4, 4),
        meta_dataset=sentences(NUM_META, 2),
        meta_module=weight_net(),
    )


@pytest.fixture
def search(monkeypatch):
    """A search over given points, as the backend for optuna runs one."""

    class Points(HyperParamSearchBackendBase):
        name = "optuna"

        @staticmethod
        def is_available():
            return True

        def run(self, trainer, n_trials, direction, **kwargs):
            scores = []
            for number, params in enumerate(kwargs["points"]):
                trainer.objective = None
                trainer.train(trial=SimpleNamespace(number=number, params=params))
                scores.append(trainer.compute_objective(trainer.evaluate()))
                trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
                trainer.accelerator.clear()
            best = min(range(len(scores)), key=scores.__getitem__)
            return BestRun(str(best), scores[best], kwargs["points"][best])

    # Trainer knows trials by their types, which it takes from the libraries.
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Points)

    def search(trainer, *points):
        trainer.hyperparameter_search(hp_space=lambda trial: trial.params, backend="optuna", points=points)
        return trainer.ends

    return search


def differing(left, right):
    return [name for name in left if not same({0: left[name]}, {0: right[name]})]


def test_every_training_with_model_init_starts_anew(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.train()
    first, second = trainer.ends
    assert differing(first, second) == []
    assert first["meta steps"] == 2
    assert not same(first["lambda"], snapshot(weight_net()))


def test_trials_with_the_same_settings_are_equal_to_each_other_and_to_a_run_without_a_search(tmp_path, search):
    settings = {"meta_learning_rate": 0.2, "sigma": 0.01, "num_candidates": 3, "hypergradient": "evograd"}
    other = {"meta_learning_rate": 0.01, "sigma": 0.1, "num_candidates": 2, "hypergradient": "t1t2"}
    first, between, second = search(trainer_of(tmp_path), settings, other, settings)
    fresh = trainer_of(tmp_path, **settings)
    fresh.train()
    assert differing(first, second) == []
    assert differing(fresh.ends[0], first) == []
    assert {"lambda", "meta optimizer", "logs"} <= set(differing(first, between))


def test_the_meta_optimizer_has_the_settings_of_its_trial(tmp_path, search):
    trainer = trainer_of(tmp_path)
    rates = [
        end["meta optimizer"]["param_groups"][0]["initial_lr"]
        for end in search(trainer, {"meta_learning_rate": 0.5}, {"meta_learning_rate": 0.25})
    ]
    assert rates == [0.5, 0.25]


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"meta_learning_rate": -1.0}, "`meta_learning_rate` should be zero or a positive number, got -1.0"),
        ({"sigma": 0.0}, "`sigma` should be a positive, finite number"),
        ({"hypergradient": "evolution"}, "`hypergradient` should be one of evograd, t1t2, finite_difference"),
        ({"meta_every": 0}, "`meta_every` should be a positive, whole number, got 0"),
        ({"optim": "adafactor", "hypergradient": "t1t2", "inner_step": "optimizer"}, "step of Adafactor is not known"),
    ],
)
def test_settings_of_a_trial_are_checked(tmp_path, search, point, message):
    with pytest.raises(ValueError, match=message):
        search(trainer_of(tmp_path), point)


def test_a_run_with_model_init_is_resumed_from_its_checkpoint_and_not_from_the_start(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(tmp_path, **settings)
    straight.train()
    resumed = trainer_of(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differing(straight.ends[0], resumed.ends[0]) == []
