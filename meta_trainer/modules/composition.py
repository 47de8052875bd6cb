"""Several meta modules, learned at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from meta_trainer.modules.meta_module import Batch, MetaModule


class MetaModuleList(MetaModule):
    """One meta module out of several, which go through each door in the given order.

    Args:
        members: The meta modules. At most one of them may use the loss door, since it takes the per-example losses to a
            scalar.

    Raises:
        ValueError: If there is no member, one that is no meta module, or more than one that uses the loss door.
    """

    def __init__(self, members: Sequence[MetaModule]) -> None:
        super().__init__()
        # A module of torch may be iterable, and a text is a sequence.
        if not isinstance(members, Sequence) or not all(isinstance(member, MetaModule) for member in members):
            raise ValueError(
                "A meta module should be a MetaModule, or a list of them, got "
                f"{[type(m).__name__ for m in members] if isinstance(members, list | tuple) else members!r}."
            )
        if not members:
            raise ValueError("A MetaModuleList should have at least one member, got none.")
        reducers = [type(member).__name__ for member in members if member.has_loss_door]
        if len(reducers) > 1:
            raise ValueError(f"At most one member may use the loss door (`reduce`), got {len(reducers)}: {reducers}.")
        self.members = nn.ModuleList(members)

    def __iter__(self) -> Iterator[MetaModule]:
        """The members in order."""
        return iter(self.members)  # type: ignore[arg-type]

    @property
    def batch_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Columns that any member reads."""
        return tuple(dict.fromkeys(column for member in self for column in member.batch_columns))

    @property
    def reference_losses(self) -> str | None:  # type: ignore[override]
        """Those that the member at the loss door reads."""
        return next((member.reference_losses for member in self if member.has_loss_door), None)

    @property
    def reads_base_model(self) -> bool:  # type: ignore[override]
        """Whether the member at the loss door does."""
        return any(member.reads_base_model for member in self if member.has_loss_door)

    @property
    def may_be_idle(self) -> bool:  # type: ignore[override]
        """Whether all members may."""
        return all(member.may_be_idle for member in self)

    @property
    def has_forward_door(self) -> bool:
        """Whether a member uses the forward door."""
        return any(member.has_forward_door for member in self)

    @property
    def has_batch_door(self) -> bool:
        """Whether a member uses the batch door."""
        return any(member.has_batch_door for member in self)

    @property
    def has_loss_door(self) -> bool:
        """Whether a member uses the loss door."""
        return any(member.has_loss_door for member in self)

    @property
    def has_normalizer(self) -> bool:
        """Whether the member that uses the loss door has one."""
        return any(member.has_normalizer for member in self if member.has_loss_door)

    @property
    def weighs_examples(self) -> bool:
        """Whether a member weighs examples."""
        return any(member.weighs_examples for member in self)

    def transform_batch(self, batch: Batch) -> Batch:
        """Each member transforms what the one before it gave."""
        for member in self:
            batch = member.transform_batch(batch)
        return batch

    @contextmanager
    def attach(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """All members are attached; hooks on one layer run in the members' order."""
        with ExitStack() as stack:
            for member in self:
                stack.enter_context(member.attach(model, batch))
            yield

    def reduce(self, losses: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """The objective of the member that uses the loss door, the mean when none does."""
        for member in self:
            if member.has_loss_door:
                return member.reduce(losses, batch, outputs)
        return super().reduce(losses, batch, outputs)

    def normalizer(self, losses: Tensor, batch: Batch) -> Tensor | None:
        """That of the member that uses the loss door."""
        return next((member.normalizer(losses, batch) for member in self if member.has_loss_door), None)

    def example_weights(self, losses: Tensor, batch: Batch) -> Tensor | None:
        """Those of the member that weighs examples."""
        return next((member.example_weights(losses, batch) for member in self if member.weighs_examples), None)

    def summary(self) -> dict[str, Tensor]:
        """What all members have to say; of two equal names the later member's."""
        return {name: value for member in self for name, value in member.summary().items()}

    def check_model(self, model: nn.Module) -> None:
        """Ask every member."""
        for member in self:
            member.check_model(model)

    def to_config(self) -> dict[str, Any]:
        """The members' configurations, in order."""
        return {"meta_module": type(self).__name__, "members": [member.to_config() for member in self]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MetaModule:
        """Build every member from its own configuration."""
        if config.get("meta_module") != cls.__name__:
            return MetaModule.from_config(config)
        members = config.get("members")
        if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
            raise ValueError(f"The configuration of a {cls.__name__} should list its `members`, got {members!r}.")
        return cls([MetaModule.from_config(member) for member in members])
