"""What a model cannot take, found where a batch is made: on the host, so that no accelerator is waited for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from meta_trainer.modules import Batch
from meta_trainer.per_example_loss import IGNORED

Check = Callable[[Batch, str], None]


def _names(*tasks: str) -> frozenset[str]:
    """Classes of transformers for some tasks; some architectures have several for one."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in tasks]
    found = [name for mapping in mappings for name in mapping.values()]
    return frozenset(name for names in found for name in ([names] if isinstance(names, str) else names))


CLASSIFIERS = _names("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION")
TOKEN_CLASSIFIERS = _names("TOKEN_CLASSIFICATION")
LANGUAGE_MODELS = _names("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
CHOOSERS = _names("MULTIPLE_CHOICE")


class BatchChecks:
    """Columns, shapes, types and ranges that a model's forward pass takes for granted.

    Labels are checked for the classifiers and language models of transformers, numbers of tokens for every model of
    text.

    Args:
        model: The base model.
        hidden: Columns that the model does not get.
        reads_labels: Whether the loss is the model's own.
        reads_all: Whether the model gets all other columns; otherwise it is not known which.
    """

    def __init__(self, model: nn.Module, hidden: Sequence[str], reads_labels: bool, reads_all: bool = True) -> None:
        self.hidden, self.reads_all = frozenset(hidden), reads_all
        self._asked_for_labels = reads_labels
        self._float_labels: bool | None = None
        parameters = inspect.signature(model.forward).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.required = {p.name for p in named if p.default is p.empty}
        self.known = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in named}
        # PEFT wraps a model that stays what it is.
        model = getattr(model, "get_base_model", lambda: model)()
        self.model_name = type(model).__name__
        self.config: Any = getattr(model, "config", None)
        # Of a model of the user's own nothing is known by its name.
        kind = self.model_name if type(model).__module__.startswith("transformers.") else ""
        self.per_token = kind in TOKEN_CLASSIFIERS
        self.reads_labels = self._asked_for_labels and (self.per_token or kind in CLASSIFIERS)
        self.sizes = _table_sizes(model)
        self.reads_tokens_as_labels = self._asked_for_labels and kind in LANGUAGE_MODELS and bool(self.sizes)
        self.token_dims = "[B, C, T]" if kind in CHOOSERS else "[B, T]"
        table = _position_table(model)
        self.position_ids = None if table is None else table.num_embeddings
        # RoBERTa counts from the padding index on.
        offset = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
        self.positions = None if table is None else table.num_embeddings - offset
        self.is_double = any(p.dtype == torch.float64 for p in model.parameters())
        # A head of the user's own often comes with the attribute only.
        self._own_num_labels = getattr(model, "num_labels", 0)

    def check(self, batch: Mapping[str, Any], kind: str = "train") -> None:
        """Raise ValueError, which says what is wrong, unless the model can take the batch.

        Args:
            batch: The batch.
            kind: What the error calls it.
        """
        if not isinstance(batch, Mapping):
            raise ValueError(f"A {kind} batch should be a dictionary, got {type(batch).__name__}.")
        try:
            self._check(batch)
        except ValueError as error:
            raise ValueError(f"{self.model_name} cannot take a {kind} batch: {error}.") from error

    def _check(self, batch: Mapping[str, Any]) -> None:
        self._check_columns({key for key in batch if key not in self.hidden})
        for column, size in self.sizes.items():
            if column in batch:
                self._check_indices(column, batch[column], size)
        self._check_shapes(batch)
        if self.reads_labels:
            self._check_labels(batch)
        elif self.reads_tokens_as_labels and isinstance(batch.get("labels"), Tensor):
            self._check_token_labels(batch)

    def _check_columns(self, columns: set[str]) -> None:
        if not columns:
            raise ValueError("it has no column that the model takes")
        if not self.reads_all:
            return
        if missing := sorted(self.required - columns):
            raise ValueError(f"it should have the columns {missing}, got {sorted(columns)}")
        if self.known is not None and (unknown := sorted(columns - self.known)):
            raise ValueError(f"{self.model_name} takes the columns {sorted(self.known)}, got also {unknown}")

    def _check_indices(self, column: str, values: Any, size: int) -> None:
        integers = isinstance(values, Tensor) and values.dtype in (torch.int64, torch.int32)
        if not integers or values.dim() != self.token_dims.count(",") + 1:
            raise ValueError(f"`{column}` should be integers of shape {self.token_dims}, got {_found(values)}")
        if not values.numel():
            raise ValueError(f"`{column}` should hold at least one token, got {_found(values)}")
        _check_range(column, values, size)

    def _check_shapes(self, batch: Mapping[str, Any]) -> None:
        if "input_ids" not in self.sizes:
            return
        if "inputs_embeds" in batch:
            if "input_ids" in batch:
                raise ValueError("it should have a column `input_ids` or `inputs_embeds`, got both")
            return
        if "input_ids" not in batch:
            raise ValueError(f"it should have a column `input_ids`, got the columns {sorted(batch)}")
        shape = batch["input_ids"].shape
        if self.positions is not None and shape[-1] > self.positions:
            raise ValueError(f"a sentence should have at most {self.positions} tokens, got {shape[-1]}: truncate it")
        chosen = batch.get("position_ids")
        if self.position_ids is not None and isinstance(chosen, Tensor) and chosen.numel():
            _check_range("position_ids", chosen, self.position_ids)
        for column in ("attention_mask", "token_type_ids"):
            value = batch.get(column)
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape != shape:
                raise ValueError(f"`{column}` should have the shape {list(shape)} of the tokens, got {_found(value)}")

    def _check_labels(self, batch: Mapping[str, Any]) -> None:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            found = f"the columns {sorted(batch)}" if labels is None else _found(labels)
            raise ValueError(f"it should have a column `labels` to learn from, got {found}")
        if self._float_labels is not None and labels.is_floating_point() != self._float_labels:
            raise ValueError(f"`labels` should be of one kind in all batches, got {_found(labels)} after others")
        tokens = batch.get("input_ids")
        rows = len(labels) if not isinstance(tokens, Tensor) else len(tokens)
        if self._has_float_labels(labels):
            self._check_float_labels(labels, rows)
        else:
            self._check_classes(labels, list(tokens.shape) if self.per_token and isinstance(tokens, Tensor) else [rows])
        self._float_labels = labels.is_floating_point()

    def _check_token_labels(self, batch: Mapping[str, Any]) -> None:
        labels, tokens = batch["labels"], batch.get("input_ids")
        if labels.dtype not in (torch.int64, torch.uint8):
            raise ValueError(f"`labels` should be tokens of type int64, got {_found(labels)}")
        # A decoder of its own reads other tokens; permuted ones are predicted in part.
        same = not getattr(self.config, "is_encoder_decoder", False) and "target_mapping" not in batch
        if same and isinstance(tokens, Tensor) and labels.shape != tokens.shape:
            raise ValueError(f"`labels` should have the shape {list(tokens.shape)} of the tokens, got {_found(labels)}")
        counted = labels[labels != IGNORED]
        size = getattr(self.config, "vocab_size", None)
        if isinstance(size, int) and counted.numel():
            _check_range("labels", counted, size, f", or be {IGNORED}")

    @property
    def _num_labels(self) -> int:
        return max(int(self.config.num_labels), self._own_num_labels)

    def _has_float_labels(self, labels: Tensor) -> bool:
        if self.per_token:
            return False
        kind = getattr(self.config, "problem_type", None)
        if kind is None:
            # As the heads themselves guess.
            return self._num_labels == 1 or labels.is_floating_point()
        return bool(kind != "single_label_classification")

    def _check_float_labels(self, labels: Tensor, rows: int) -> None:
        number = self._num_labels
        shapes = [[rows, number]] if number > 1 else [[rows], [rows, 1]]
        right = labels.is_floating_point() and (labels.dtype != torch.float64 or self.is_double or number == 1)
        if not right or list(labels.shape) not in shapes or not rows:
            raise ValueError(
                f"`labels` should be floats of single precision and shape {shapes[0]}, for a model with {number} "
                f"labels that are no classes, got {_found(labels)}"
            )
        if not labels.isfinite().all():
            raise ValueError("`labels` should be finite, got nan or infinity among them")

    def _check_classes(self, labels: Tensor, shape: list[int]) -> None:
        number = self._num_labels
        if labels.dtype != torch.int64 or list(labels.shape) not in (shape, [*shape, 1]):
            raise ValueError(f"`labels` should be int64 of shape {shape}, got {_found(labels)}")
        counted = labels[labels != IGNORED]
        if not counted.numel():
            raise ValueError(
                f"at least one of its labels should count, got none or {IGNORED} only: its loss would be nan"
            )
        advice = ". Set `num_labels` of the model's config to the number of classes"
        _check_range("labels", counted, number, f", or be {IGNORED}", advice)


class CheckedCollator:
    """A data collator that says in one ValueError what is wrong with its examples.

    Args:
        collate: From a list of examples to a batch.
        kind: What errors call the batch: ``"train"`` or ``"meta"``.
        check: ``(batch, kind)``, raises a ValueError; None for no check.
        nested: Column in which the collator may put a meta batch; None for no such column.
        check_nested: Of that one.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Batch],
        kind: str,
        check: Check | None,
        nested: str | None = None,
        check_nested: Check | None = None,
    ) -> None:
        self.collate, self.kind, self.check = collate, kind, check
        self.nested, self.check_nested = nested, check_nested

    def __call__(self, examples: list[Any]) -> Batch:
        """The collated batch.

        Raises:
            ValueError: If the examples cannot be put together, or the model cannot take what comes of it.
        """
        try:
            batch = self.collate(examples)
            if not isinstance(batch, Mapping):
                raise TypeError(f"the data collator should return a dictionary, got {type(batch).__name__}")
        # What collators raise for columns that are missing, ragged or of a wrong type.
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
            first = examples[0] if examples else None
            found = (
                f"columns {sorted(map(str, first))}" if isinstance(first, Mapping) else f"type {type(first).__name__}"
            )
            raise ValueError(
                f"{len(examples)} examples, the first with {found}, cannot be put together to a {self.kind} batch: "
                f"{str(error)[:300]}. All should have the same columns; pass a `data_collator` that pads those of "
                "different lengths."
            ) from error
        if self.check is not None:
            self.check(batch, self.kind)
        nested = None if self.nested is None else batch.get(self.nested)
        if self.check_nested is not None and nested is not None:
            self.check_nested(nested, "meta")
        return batch


def _found(value: Any) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else short(value)


def _check_range(column: str, values: Tensor, size: int, exception: str = "", advice: str = "") -> None:
    low, high = values.min().item(), values.max().item()
    if low < 0 or high >= size:
        found = low if low < 0 else high
        raise ValueError(f"`{column}` should lie between 0 and {size - 1}{exception}, got {found}{advice}")


def _table_sizes(model: nn.Module) -> dict[str, int]:
    """Number of embeddings that a column points into; none for models of more than text, with ids of their own."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "sub_configs", None) or getattr(model, "main_input_name", "") != "input_ids":
        return {}
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        # A model of the user's own, whose embeddings transformers does not find.
        return {}
    sizes = {
        "input_ids": getattr(table, "num_embeddings", None),
        "token_type_ids": getattr(config, "type_vocab_size", None),
    }
    return {column: size for column, size in sizes.items() if size}


def _position_table(model: nn.Module) -> nn.Embedding | None:
    """The embeddings of positions, where they are learned."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings":
            return module
    return None
