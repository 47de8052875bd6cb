"""The three doors through which meta-parameters may enter the training objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import ModelHubMixin, constants, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

Batch = dict[str, Any]
"""A collated batch: column name to tensor."""

META_BATCH = "meta_batch"
"""Batch key under which a data collator may put the meta batch of each train batch."""

REFERENCE_LOSSES = "reference_losses"
"""Batch key under which the loss door finds per-example losses that are the same for all candidates."""

EXAMPLE_OF_LOSS = "example_of_loss"
"""Batch key under which the loss door finds, for each of its losses ``[N]``, the row that it belongs to: several losses
of one example are those of its tokens. Missing with a `per_example_loss` of the user's own."""

LABEL_OF_LOSS = "label_of_loss"
"""Batch key under which the loss door finds, for each of its losses ``[N]``, the number of the class that it was
computed for. Missing where labels are no classes, where a loss belongs to several labels, and with a `per_example_loss`
of the user's own."""

IS_TRUSTED = "is_trusted"
"""Batch column, booleans ``[B]``: examples of the meta set, whose labels are right, that the model trains on as well.
A batch without it holds none."""

BASE_MODEL = "base_model"
"""Batch key under which the loss door of a module that `reads_base_model` finds the base model."""

REFERENCES = "references"
"""Key of the dictionary that all evaluations of a batch within a meta step share, for :meth:`MetaModule.attach`."""

_DOWNLOAD_SETTINGS = ("revision", "cache_dir", "token", "force_download", "local_files_only")


_CARD = """
---
{{ card_data }}
---

# A meta module of meta_trainer

Its parameters were learned by a hypergradient while a model was trained; `config.json` says which module it is. Load it
with `MetaModule.from_pretrained` of the Python package `meta_trainer`.
"""


class MetaModule(
    nn.Module,
    ModelHubMixin,
    library_name="meta-trainer",
    tags=["meta-learning", "hypergradient"],
    model_card_template=_CARD,
):
    r"""A module whose parameters :math:`\lambda` are learned by the hypergradient.

    It takes part in training through three doors. A subclass overrides those it uses; the others are the identity.

    1. :meth:`transform_batch`, before the model: learned augmentation, learned label correction;
    2. :meth:`attach`, during the forward pass: learned transformations of hidden states;
    3. :meth:`reduce`, after the model: learned weights of examples, learned regularisers.

    The doors are open on training batches only. On meta batches, in evaluation and in prediction the model runs alone.

    Saving and loading follow the Hub: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` keep the
    constructor's arguments in ``config.json`` and the parameters in ``model.safetensors``.

    Attributes:
        batch_columns: Columns of the batch that the doors read and the base model does not know. They reach the doors
            and are kept from the model.
        reference_losses: Which per-example losses :meth:`reduce` finds as ``batch["reference_losses"]``, detached and
            the same for all candidates: ``"shared"``, those of the first candidate; ``"unperturbed"``, those at the
            unperturbed parameters, at the price of one more forward pass; None for none.
        reads_base_model: Whether :meth:`reduce` reads the model's parameters, as they stand at the candidate. It finds
            the model as ``batch["base_model"]``. Refused where parameters are spread over several devices.
        may_be_idle: Whether the doors may be shut in the first meta step of a run. If not, it is an error when none of
            the parameters takes part in its training loss.
    """

    batch_columns: ClassVar[tuple[str, ...]] = ()
    reference_losses: str | None = None
    reads_base_model: bool = False
    may_be_idle: bool = False

    def transform_batch(self, batch: Batch) -> Batch:
        """Door 1: the batch that the model trains on. Returns a new dictionary where it changes anything."""
        return batch

    @contextmanager
    def attach(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Door 2: hooks on `model` that live for one forward pass and are gone afterwards, also after an exception.

        What a hook reads through ``detach`` is no function of the model's parameters to the base step, but differs from
        candidate to candidate. A module that wants the same for all keeps that of the first in
        ``batch["references"]``, a dictionary that all evaluations of a batch within a meta step share.
        """
        yield

    def reduce(self, losses: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """Door 3: from per-example (per-token) losses ``[N]`` to the training objective, a scalar."""
        return losses.mean()

    def normalizer(self, losses: Tensor, batch: Batch) -> Tensor | None:
        """What :meth:`reduce` divides by, a scalar, where that is learned, such as the sum of learned weights.

        An optimizer step may go over several micro-batches and processes. Its objective is then the quotient of the
        sums over all of them, as if they were one batch: normalised one by one, batches of a single example would leave
        nothing to learn. None for a plain mean, which adds up by itself. May not depend on the model's parameters.
        """
        return None

    def example_weights(self, losses: Tensor, batch: Batch) -> Tensor | None:
        """The learned weight of each of the per-example (per-token) losses ``[N]``, ``[N]``, not normalised.

        By it examples are sorted once the training is over; only the ratios of weights matter. None for a module that
        weighs none.
        """
        return None

    def summary(self) -> dict[str, Tensor]:
        """What is worth watching of the parameters while they are learned: scalars by name, such as an angle.

        They are logged as ``meta_module/<name>``, and drawn. Empty for a module that no few numbers describe.
        """
        return {}

    @property
    def has_forward_door(self) -> bool:
        """Whether this module takes part in the model's forward pass."""
        return type(self).attach is not MetaModule.attach

    @property
    def has_batch_door(self) -> bool:
        """Whether the model trains on another batch than the collated one."""
        return type(self).transform_batch is not MetaModule.transform_batch

    @property
    def has_loss_door(self) -> bool:
        """Whether the objective is this module's; otherwise it is the model's own loss."""
        return type(self).reduce is not MetaModule.reduce

    @property
    def has_normalizer(self) -> bool:
        """Whether the objective is a quotient."""
        return type(self).normalizer is not MetaModule.normalizer

    @property
    def weighs_examples(self) -> bool:
        """Whether examples have a learned weight."""
        return type(self).example_weights is not MetaModule.example_weights

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError when `model` lacks what the doors need. Called before training starts."""

    def to_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to build this module again, parameters aside."""
        # The mixin keeps the constructor's arguments.
        arguments: dict[str, Any] = self._hub_mixin_config or {}  # type: ignore[assignment]
        return {"meta_module": type(self).__name__, **arguments}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MetaModule:
        """Build the module that a configuration names, among `MetaModule` and its subclasses that are imported.

        Raises:
            ValueError: If the configuration names no known meta module, or other arguments than it takes.
        """
        arguments = dict(config)
        name = arguments.pop("meta_module", None)
        known = {kind.__name__: kind for kind in _all_subclasses(MetaModule)}
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"The configuration should name a meta module under `meta_module`, one of {sorted(known)}, "
                f"got {name!r}. A module of your own has to be imported before it can be loaded."
            )
        if known[name].from_config.__func__ is not cls.from_config.__func__:  # type: ignore[attr-defined]
            return known[name].from_config(config)
        try:
            return known[name](**arguments)
        except TypeError as error:
            raise ValueError(f"The configuration of a {name} does not fit it: {error}.") from error

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write ``config.json`` and ``model.safetensors``; arguments as in `huggingface_hub.ModelHubMixin`."""
        # `push_to_hub` passes config=None for none of its own.
        kwargs["config"] = kwargs.get("config") or self.to_config()
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self, str(save_directory / constants.SAFETENSORS_SINGLE_FILE))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, **kwargs: Any) -> Self:
        download = {key: kwargs.pop(key) for key in _DOWNLOAD_SETTINGS}
        # What is left are the constructor's arguments, as the caller wants them.
        module = cls.from_config({**(config or {}), **kwargs})
        if not isinstance(module, cls):
            raise ValueError(
                f"{model_id} holds a {type(module).__name__}, not a {cls.__name__}. Load it with its own class."
            )
        module.load_weights(_weights_file(model_id, **download))
        return module

    def load_weights(self, file: str | Path) -> None:
        """Read parameters and buffers from a safetensors file.

        Raises:
            ValueError: If the file is missing, unreadable, or belongs to a module of another shape.
        """
        if not Path(file).is_file():
            raise ValueError(f"No weights of a meta module at {file}. Expected a file that `save_pretrained` wrote.")
        try:
            load_model(self, str(file), strict=True)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{file} does not fit this {type(self).__name__}: {error}") from error


def _all_subclasses(kind: type[MetaModule]) -> Iterator[type[MetaModule]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _all_subclasses(subclass)


def _weights_file(model_id: str, **download: Any) -> str:
    if Path(model_id).is_dir():
        return str(Path(model_id) / constants.SAFETENSORS_SINGLE_FILE)
    return str(hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **download))
