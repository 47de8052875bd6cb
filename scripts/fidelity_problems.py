"""Small classifiers, trained together with a meta module, and the bilevel problems that their next batches pose."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meta_trainer import MetaModule, MetaWeightNet, RepresentationTransform
from meta_trainer.hypergrad import BilevelProblem, OptimizerStep, t1t2
from meta_trainer.modules.meta_module import REFERENCE_LOSSES, REFERENCES, Batch
from meta_trainer.modules.representation_transform import SOURCE_COLUMN
from meta_trainer.per_example_loss import per_example_losses
from meta_trainer.scope import select_parameters
from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.task import Task
from meta_trainer.tasks.text_classification import TextClassificationArguments, build_text_classification_task

BATCH_SIZE = 32
NUM_META_EXAMPLES = 240
WARM_UP_META_EVERY, WARM_UP_META_RATE = 4, 1e-3
"""Steps per meta step while model and meta module are trained, and the learning rate of these."""

TREC = {"train_file": "text/trec6_train.parquet", "label_column": "label", "exclude_column": "dup"}
GENERATED = {"data": "generated", "label_column": "label", "validation_split": None, "test_split": None}

NETWORK, EXAMPLES, TRANSFORM = "MetaWeightNet", "one weight per example", "RepresentationTransform"
"""Names of the meta-parameters by which a hypergradient is taken."""


@dataclass(frozen=True)
class Size:
    """A model and its training before it is judged.

    Attributes:
        model: Sizes of the encoder.
        learning_rate: Of AdamW.
        training_steps: Its steps.
    """

    model: ModelArguments
    learning_rate: float
    training_steps: int


def _encoder(width: int, layers: int, heads: int, vocabulary: int, feed_forward: int) -> ModelArguments:
    return ModelArguments(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        intermediate_size=feed_forward,
    )


SIZES = {
    "0.1M": Size(_encoder(32, 2, 2, 2000, 64), 1e-3, 300),
    "1.4M": Size(_encoder(128, 4, 2, 4000, 512), 5e-4, 300),
    "5.4M": Size(_encoder(256, 4, 4, 8000, 1024), 3e-4, 150),
}
"""Models by their number of parameters."""


class FactoredWeights(MetaWeightNet):
    r"""Meta-Weight-Net whose weight of a batch's i-th example is multiplied by :math:`e^{f_i}`.

    f stays zero, where nothing is changed. But derivatives by it have as many dimensions as there are examples, while
    those by the network, a smooth function of one number, have hardly more than one that matters.

    Args:
        batch_size: Number of factors.
    """

    def __init__(self, batch_size: int = BATCH_SIZE) -> None:
        super().__init__()
        self.log_factors = nn.Parameter(torch.zeros(batch_size))

    def forward(self, losses: Tensor, classes: Tensor | None = None) -> Tensor:
        """Weights ``[N]`` of the losses ``[N]``."""
        return super().forward(losses, classes) * self.log_factors.exp()


@dataclass(frozen=True)
class Variant:
    """How losses are computed.

    Attributes:
        shared_random_numbers: Every evaluation of the train loss draws the same dropout masks; the official code of
            EvoGrad goes on drawing.
        shared_losses: Meta-Weight-Net reads the first candidate's losses for all of them; in the official code each
            candidate's own.
        autocast: In bfloat16, with the parameters in float32.
    """

    shared_random_numbers: bool = True
    shared_inputs: bool = True
    autocast: bool = False


AS_TRAINED = Variant()

BatchPair = tuple[Batch, Batch]
"""A train batch and a meta batch."""


class Subject:
    """A classifier and its meta module, trained together, in turns: AdamW and, now and then, an exact meta step.

    A Meta-Weight-Net at its random start is all but constant, and its hypergradient one-dimensional, so that cosines
    would be ±1. The exact hypergradient by which it is warmed up is that of the optimizer's own step.

    Args:
        size: Model and training.
        kind: :data:`NETWORK`, or :data:`TRANSFORM` after the last layer, all training rows being source examples.
        seed: Of weights, label noise, batches and dropout.

    Attributes:
        model: The classifier, in training mode.
        meta_module: The meta module.
        optimizer: Of the classifier, with its moments.
        learning_rate: Of that optimizer.
        train_loss: Mean of the objective over the last steps of the training.
    """

    def __init__(self, size: Size, kind: str, seed: int) -> None:
        task = _task(size.model, seed)
        self._task, self._generator = task, torch.Generator().manual_seed(seed)
        self._rows = {"train": list(task.train_dataset), "meta": list(task.meta_dataset or ())}
        torch.manual_seed(seed)
        self.model = task.model_init().train()
        self.meta_module: MetaModule = (
            FactoredWeights()
            if kind == NETWORK
            else RepresentationTransform(size.model.hidden_size, bottleneck_size=size.model.hidden_size)
        )
        self.learning_rate = size.learning_rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=size.learning_rate)
        self.train_loss = self._train(size.training_steps)

    def meta_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Meta-parameters by the name under which their hypergradient is judged."""
        if isinstance(self.meta_module, FactoredWeights):
            return {NETWORK: list(self.meta_module.network.parameters()), EXAMPLES: [self.meta_module.log_factors]}
        return {TRANSFORM: list(self.meta_module.parameters())}

    def example_weights(self, losses: Sequence[float]) -> dict[str, float]:
        """Meta-Weight-Net's weights of examples with these losses; none for another module."""
        if not isinstance(self.meta_module, FactoredWeights):
            return {}
        with torch.no_grad():
            weights = MetaWeightNet.forward(self.meta_module, torch.tensor(losses))
        return {f"{loss:g}": float(weight) for loss, weight in zip(losses, weights, strict=True)}

    def draw(self) -> BatchPair:
        """The next train batch, its labels noisy, and the next meta batch, its labels true."""
        train, meta = self._draw("train"), self._draw("meta")
        return {**train, SOURCE_COLUMN: torch.ones(BATCH_SIZE, dtype=torch.bool)}, meta

    def problem(self, batches: BatchPair, scope: str = "all", variant: Variant = AS_TRAINED) -> BilevelProblem:
        """Pose the bilevel problem of a train batch and a meta batch.

        Args:
            batches: The two.
            scope: What the inner step moves, as `meta_trainer.scope.select_parameters` has it.
            variant: How losses are computed.
        """
        train_batch, meta_batch = batches
        references: dict[Any, Tensor] = {}
        # The state that all evaluations start from has the seed before these.
        seeds = count(torch.initial_seed() + 1)

        def train_loss() -> Tensor:
            if not variant.shared_random_numbers:
                torch.manual_seed(next(seeds))
            with _precision(variant):
                return self._objective(train_batch, references if variant.shared_inputs else {})

        def val_loss() -> Tensor:
            with _precision(variant):
                return self.model(**meta_batch).loss

        theta = select_parameters(self.model, scope)
        meta_params = [p for group in self.meta_parameters().values() for p in group]
        return BilevelProblem(theta, meta_params, train_loss, val_loss)

    def _objective(self, batch: Batch, references: dict[Any, Tensor]) -> Tensor:
        """Training objective through the doors of the meta module, as the trainer computes it."""
        with self.meta_module.attach(self.model, {**batch, REFERENCES: references}):
            outputs = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        losses = per_example_losses(logits, batch["labels"])  # [B]
        batch = {**batch, REFERENCE_LOSSES: references.setdefault(REFERENCE_LOSSES, losses.detach())}
        return self.meta_module.reduce(losses, batch, outputs)

    def _train(self, steps: int) -> float:
        # The factors stay where they are.
        (meta_params, *_) = self.meta_parameters().values()
        meta_optimizer = torch.optim.Adam(meta_params, lr=WARM_UP_META_RATE, eps=1e-15)
        losses = []
        for step in range(steps):
            batches = self.draw()
            problem = self.problem(batches)
            if step % WARM_UP_META_EVERY == WARM_UP_META_EVERY - 1:
                result = t1t2(problem, inner_step=OptimizerStep(self.optimizer, problem.theta))
                for parameter, grad in zip(problem.meta_params, result.grads, strict=True):
                    parameter.grad = grad
                meta_optimizer.step()
            loss = self._objective(batches[0], {})
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        self.optimizer.zero_grad()
        self.meta_module.zero_grad()
        last = losses[-20:]
        return sum(last) / len(last)

    def _draw(self, kind: str) -> Batch:
        rows = self._rows[kind]
        chosen = torch.randint(len(rows), (BATCH_SIZE,), generator=self._generator).tolist()
        return dict(self._task.data_collator([rows[i] for i in chosen]))


def has_trec() -> bool:
    """Whether $META_TRAINER_DATA holds the TREC questions; generated texts stand in for them."""
    return (Path(os.environ.get("META_TRAINER_DATA", "")) / TREC["train_file"]).is_file()


def _task(model: ModelArguments, seed: int) -> Task:
    source: dict[str, Any] = TREC if has_trec() else GENERATED
    arguments = TextClassificationArguments(
        **source,
        num_meta_examples=NUM_META_EXAMPLES,
        label_noise="flip",
        label_noise_share=0.4,
        max_length=24,
    )
    return build_text_classification_task(arguments, model, seed=seed, with_meta=True)


def _precision(variant: Variant) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if variant.autocast else nullcontext()
