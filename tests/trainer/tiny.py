"""Tiny models, data, meta modules and trainers: small enough that a whole training run is a unit test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from meta_trainer import MetaModule, MetaTrainer, MetaTrainingArguments, MetaWeightNet

NUM_TRAIN, NUM_META = 24, 7

BEST_BY_SCORE = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}
"""Settings of a run that ends with the model of the best score, among those after each step."""


def sentences(number: int, seed: int) -> list[dict[str, Any]]:
    """Random token ids with random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (number, 6), generator=generator)
    labels = torch.randint(0, 2, (number,), generator=generator).tolist()
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def points(number: int, seed: int) -> list[dict[str, Any]]:
    """Random features with random labels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(number, 4, generator=generator)
    labels = torch.randint(0, 2, (number,), generator=generator).tolist()
    return [{"features": f, "labels": label} for f, label in zip(features, labels, strict=True)]


def batch_of(examples: list[dict[str, Any]], size: int = 4) -> dict[str, Tensor]:
    """The first examples, collated."""
    return {key: torch.stack([torch.as_tensor(e[key]) for e in examples[:size]]) for key in examples[0]}


def tiny_bert(dropout: float = 0.1, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


class PointClassifier(nn.Module):
    """A model that is not of Hugging Face: no config, strict arguments, running statistics, dropout."""

    def __init__(self, class_weights: Tensor | None = None, as_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 2)
        self.class_weights, self.as_tuple = class_weights, as_tuple

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.body(features))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.class_weights)
        return (loss, logits) if self.as_tuple else {"loss": loss, "logits": logits}


class IdentityModule(MetaModule):
    """Doors 1 and 2 are the identity, and the parameter has no influence."""

    may_be_idle = True

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))


class MeanLoss(IdentityModule):
    """Goes through the loss door, and computes there what the model computes itself."""

    def reduce(self, losses: Tensor, batch: dict[str, Any], outputs: Any) -> Tensor:
        return losses.mean() + 0 * self.unused.sum()


class Spy(IdentityModule):
    """Records which door was opened for which batch; reads a column of its own, and adds one."""

    batch_columns = ("is_source", "seen")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def transform_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(("transform_batch", dict(batch)))
        return {**batch, "seen": batch["is_source"]}

    @contextmanager
    def attach(self, model: nn.Module, batch: dict[str, Any]) -> Iterator[None]:
        self.calls.append(("attach", dict(batch)))
        yield

    def reduce(self, losses: Tensor, batch: dict[str, Any], outputs: Any) -> Tensor:
        self.calls.append(("reduce", dict(batch)))
        return losses.mean() + 0 * self.unused.sum()


class HiddenShift(MetaModule):
    """A forward door whose parameter has an influence: shifts the hidden states by a learned vector."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((size,), 0.1))

    @contextmanager
    def attach(self, model: nn.Module, batch: dict[str, Any]) -> Iterator[None]:
        hook = model.dropout.register_forward_pre_hook(lambda module, inputs: (inputs[0] + self.shift,))
        try:
            yield
        finally:
            hook.remove()


def examples_for(model: nn.Module, number: int, seed: int) -> list[dict[str, Any]]:
    """Data that the model can read."""
    return points(number, seed) if isinstance(model, PointClassifier) else sentences(number, seed)


def weight_net(seed: int = 0, loss_input: str = "shared") -> MetaWeightNet:
    torch.manual_seed(seed)
    return MetaWeightNet(hidden_size=4, loss_input=loss_input)


def arguments(
    folder: Path | str, kind: type[TrainingArguments] = MetaTrainingArguments, **settings: Any
) -> TrainingArguments:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(output_dir=str(folder), **{**defaults, **settings})


def plain_trainer(folder: Path | str, model: nn.Module | None = None, **settings: Any) -> Trainer:
    """What a `meta_trainer` is compared with: Trainer on the same model, train data and arguments."""
    model = tiny_bert() if model is None else model
    args = arguments(folder, TrainingArguments, **settings)
    return Trainer(model, args, train_dataset=examples_for(model, NUM_TRAIN, 1))


def meta_trainer(
    folder: Path | str,
    meta_module: MetaModule | None = None,
    model: nn.Module | None = None,
    kind: type[MetaTrainer] = MetaTrainer,
    keywords: dict[str, Any] | None = None,
    **settings: Any,
) -> MetaTrainer:
    """A trainer on tiny data; `keywords` are its own, `settings` those of its arguments."""
    model = tiny_bert() if model is None else model
    data = {"train_dataset": examples_for(model, NUM_TRAIN, 1), "meta_dataset": examples_for(model, NUM_META, 2)}
    meta_module = weight_net() if meta_module is None else meta_module
    return kind(model, arguments(folder, **settings), meta_module=meta_module, **{**data, **(keywords or {})})


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two nested dictionaries hold the same, tensors bit for bit."""
    return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return same(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


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


def training_logs(trainer: Trainer) -> list[dict[str, Any]]:
    """The logs of training steps."""
    return [log for log in trainer.state.log_history if "loss" in log]


def losses_only(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log history without clock times."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in log.items() if not any(word in k for word in timed)} for log in history]
