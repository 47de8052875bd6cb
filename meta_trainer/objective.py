"""The training objective: the model's loss through the doors of a meta module, over a whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.hypergrad import TermSum
from meta_trainer.modules import Batch, MetaModule
from meta_trainer.modules.meta_module import (
    BASE_MODEL,
    EXAMPLE_OF_LOSS,
    LABEL_OF_LOSS,
    META_BATCH,
    REFERENCE_LOSSES,
    REFERENCES,
)
from meta_trainer.per_example_loss import IGNORED, PerExampleLoss, PerSentenceLoss, check_agreement
from meta_trainer.sharding import local_part
from meta_trainer.window import Window


class ObjectiveTrainer(Trainer):
    """A Trainer whose training objective goes through a meta module's doors, while these are open."""

    args: MetaTrainingArguments
    model: nn.Module
    # None in a plain Trainer.
    meta_module: MetaModule = None  # type: ignore[assignment]

    def _set_up_objective(self, per_example_loss: Callable[[Any, Tensor], Tensor] | None) -> None:
        smoothing = self.args.label_smoothing_factor
        self.per_example_loss = per_example_loss or PerExampleLoss(self.model, smoothing)
        self._loss_checked = per_example_loss is not None or smoothing != 0 or self.compute_loss_func is not None
        self._reference: Batch | None = None  # None while the doors are shut
        self._normalizers: list[Tensor] = []  # of the evaluation under way
        self._divides_loss = False  # by its normalizer, before the backward pass
        self._begin(Window([]))

    @property
    def meta_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the meta module."""
        return [p for p in self.meta_module.parameters() if p.requires_grad]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As in Trainer; the meta step looks at all micro-batches of an optimizer step."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.meta_module is not None:
            self._begin(Window(batches, num_items))
        return batches, num_items

    def _num_items(self, batch: Batch) -> Any:
        """Labels in a batch of each process, as Trainer counts those of an optimizer step."""
        _, num_items = super().get_batch_samples(iter([batch]), 1, self.args.device)
        return num_items

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; on training batches, that of the meta module's three doors."""
        if self.meta_module is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._reference is None:
            return super().compute_loss(model, self._model_inputs(inputs), return_outputs, num_items_in_batch)
        batch = self.meta_module.transform_batch(inputs)
        if not isinstance(batch, Mapping):
            name = type(self.meta_module).__name__
            raise ValueError(f"{name}.transform_batch should return a dictionary, got {type(batch).__name__}.")
        with self.meta_module.attach(self.accelerator.unwrap_model(model), {**batch, REFERENCES: self._reference}):
            if not self.meta_module.has_loss_door:
                return super().compute_loss(model, self._model_inputs(batch), return_outputs, num_items_in_batch)
            losses, outputs = self._per_example_losses(model, batch)
        batch = self._at_loss_door(model, batch, losses, self._reference)
        loss = self.meta_module.reduce(losses, batch, outputs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"{type(self.meta_module).__name__}.reduce should return a scalar tensor, got {found}.")
        normalizer = self.meta_module.normalizer(losses, batch) if self._sums_quotients else None
        if normalizer is not None:
            # A constant that keeps the loss in the order of a mean.
            normalizer = normalizer / (len(self._window.batches) * self.args.train_batch_size)
            loss = loss * normalizer
            if self._divides_loss:
                loss = loss / _divisor(self._mean_over_replicas(normalizer.detach()))
            else:
                self._normalizers.append(normalizer)
        elif num_items_in_batch is not None:
            loss = loss * self._share_of_items(batch["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, without the columns that only the meta step reads."""
        return super().prediction_step(model, self._model_inputs(inputs), *args, **kwargs)

    def _at_loss_door(self, model: nn.Module, batch: Batch, losses: Tensor, reference: Batch) -> Batch:
        """The batch, and what else the loss door may read."""
        more: Batch = {}
        if self.meta_module.reference_losses:
            more[REFERENCE_LOSSES] = reference.setdefault(REFERENCE_LOSSES, losses.detach())
        if isinstance(self.per_example_loss, PerExampleLoss | PerSentenceLoss):
            more[EXAMPLE_OF_LOSS] = self.per_example_loss.examples(batch["labels"])
        if isinstance(self.per_example_loss, PerExampleLoss) and not batch["labels"].is_floating_point():
            more[LABEL_OF_LOSS] = self.per_example_loss.classes(batch["labels"])
        if self.meta_module.reads_base_model:
            more[BASE_MODEL] = self.accelerator.unwrap_model(model)
        return {**batch, **more}

    def _per_example_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        if "labels" not in batch:
            raise ValueError(f"Weighing examples needs a column `labels`, got the columns {sorted(batch)}.")
        outputs = model(**self._model_inputs(batch))
        losses = self.per_example_loss(outputs, batch["labels"])
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise ValueError(f"`per_example_loss` should return one loss per example, a tensor [N], got {found}.")
        if not self._loss_checked:
            check_agreement(losses, outputs["loss"] if isinstance(outputs, dict) else outputs[0])
            self._loss_checked = True
        return losses, outputs

    def _share_of_items(self, labels: Tensor, num_items: Any) -> Tensor:
        """Of a micro-batch in the optimizer step of all processes, as Trainer counts, times what DDP divides by."""
        counted = labels[..., 1:] if getattr(self, "_loss_shifts_labels", False) else labels
        num_replicas = self.args.world_size if self.args.average_tokens_across_devices else 1
        return (counted != IGNORED).sum() * num_replicas / num_items

    def _begin(self, window: Window) -> None:
        """A new optimizer step."""
        self._window, self._num_taken, self._step_sum = window, 0, TermSum()

    def _take(self, inputs: Batch, num_items: Any) -> None:
        """The next micro-batch, which a subclass may have changed; outside of a training loop a step of its own."""
        if self._num_taken == len(self._window.batches):
            self._begin(Window([inputs], num_items))
        self._num_taken += 1

    @property
    def _sums_quotients(self) -> bool:
        """Whether the objective is a quotient whose parts are sums over several batches."""
        several = len(self._window.batches) > 1 or self.args.world_size > 1
        return several and self.meta_module.has_loss_door and self.meta_module.has_normalizer

    def _normalized(self, loss: Tensor) -> Tensor:
        """A micro-batch's share in the objective of the optimizer step; the last one completes the gradient."""
        normalizer = self._normalizers.pop()
        if not hasattr(Trainer, "loss_is_scaled_for_ga") and not self._is_scaled_by_rule(self._window.num_items):
            # Older releases do not heed it, and have divided the loss.
            normalizer = normalizer / len(self._window.batches)
        self._step_sum.add([loss, normalizer], [])
        if not self.accelerator.sync_gradients:
            return loss
        numerator, denominator = self._step_sum.values
        denominator = _divisor(self._mean_over_replicas(denominator))
        grads = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        torch._foreach_div_(grads, denominator)
        # What the micro-batches before this one gave has been added to the log already.
        return numerator / denominator - (numerator - loss)

    def _loss_is_scaled(self, num_items: Any) -> bool:
        """Whether a micro-batch's loss is a share of the optimizer step's; Trainer has this rule in `training_step`."""
        declared: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        return self._is_scaled_by_rule(num_items)

    def _is_scaled_by_rule(self, num_items: Any) -> bool:
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def _mean_over_replicas(self, tensor: Tensor) -> Tensor:
        return tensor if self.args.world_size == 1 else reduce(tensor, reduction="mean")

    def _model_inputs(self, batch: Batch) -> Batch:
        if self.meta_module is None:
            return batch
        hidden = {*self.meta_module.batch_columns, META_BATCH}
        return {key: value for key, value in batch.items() if key not in hidden}

    @contextmanager
    def _open_doors(self, reference: Batch) -> Iterator[None]:
        """Let the meta module take part; `reference` keeps what all evaluations of one batch are to share."""
        self._reference = reference
        self._normalizers.clear()
        try:
            yield
        finally:
            self._reference = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.meta_module is not None:
            known: list[str] = self._signature_columns or []
            extra = [column for column in self.meta_module.batch_columns if column not in known]
            self._signature_columns = [*known, *extra]  # type: ignore[assignment]


def _divisor(denominator: Tensor) -> Tensor:
    """Where all weights are zero, so is the numerator, and the objective is to be."""
    return torch.where(denominator != 0, denominator, torch.ones_like(denominator))
