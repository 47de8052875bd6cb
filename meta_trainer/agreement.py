"""Decisions that all processes of a run take alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

T = TypeVar("T")


def decided_by_the_first(decide: Callable[[], T]) -> T:
    """What `decide` gives in the first process, in all of them.

    Raises:
        ValueError, OSError: In all of them, if the first raised it.
    """
    process = PartialState()
    if process.num_processes == 1:
        return decide()
    outcome: list[T | Exception | None] = [None]
    if process.is_main_process:
        try:
            outcome = [decide()]
        except (ValueError, OSError) as error:
            # Without its cause, which need not be one that can be sent.
            outcome = [type(error)(*error.args)]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in one of the processes at least."""
    if PartialState().num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=device), reduction="sum") > 0)
