"""The train batches of one optimizer step: one, or the micro-batches of an accumulated gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device

from meta_trainer.hypergrad import RandomState, TrainLoss
from meta_trainer.modules import Batch


@dataclass(frozen=True)
class Window:
    """The train batches of one optimizer step on this process.

    Attributes:
        batches: In order.
        num_items: Labels in all of them, as Trainer counts; None where it does not.
    """

    batches: list[Batch]
    num_items: Any = None

    def begins_with(self, batch: Batch) -> bool:
        """Whether this very object is the first batch."""
        return bool(self.batches) and self.batches[0] is batch

    def terms(self, term: Callable[[Batch], TrainLoss]) -> Iterable[TrainLoss]:
        """What `term` gives for each batch, when it is asked for, any number of times."""
        return _Terms(self.batches, term)


@dataclass(frozen=True)
class _Terms(Iterable[TrainLoss]):
    batches: list[Batch]
    term: Callable[[Batch], TrainLoss]

    def __iter__(self) -> Iterator[TrainLoss]:
        return map(self.term, self.batches)


def from_first_process(window: Window, device: torch.device) -> Window:
    """The first process's train batches, for all; the global random state becomes that of the first process, too.

    Args:
        window: Of this process.
        device: Of this process.
    """
    state = RandomState.capture([device])
    sent = [send_to_device(window.batches, "cpu"), state.python, state.numpy, state.cpu, list(state.devices.values())]
    batches, python, numpy, cpu, devices = broadcast_object_list(sent)
    RandomState(python, numpy, cpu, dict(zip(state.devices, devices, strict=True))).restore()
    return Window(send_to_device(batches, device), window.num_items)
