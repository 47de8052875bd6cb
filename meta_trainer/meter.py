"""What an optimizer step costs: wall time and peak memory, measured from inside a Trainer."""

import math
import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.meta_optimizer import first_meta_step

WARM_UP_STEPS = 2


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are created while the mode is active and still alive.

    A storage counts once, from the operator that returns it until it is freed; views and in-place
    results share the storage of an input and add nothing. What was allocated before is not seen, nor the
    workspace that a kernel frees before it returns, nor sparse tensors.

    Attributes:
        live: bytes alive now.
        peak: largest value of ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in inputs and id(storage) not in self._alive:
                self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()


class StepMeter(TrainerCallback):
    """Measure the wall time and the peak memory of an optimizer step.

    A step holds all its micro-batches and the meta step; logging, evaluation and saving happen between
    steps. The first two steps warm up. Memory is taken in the third one, or in the third that holds a meta
    step where these begin later or are rarer (``meta_delay_steps``, ``meta_every``). It is left out of the
    timing because counting slows it down; the time is the median over all others. Where only some steps
    hold a meta step, the median describes the more frequent kind. Every ``train()`` measures anew.

    On CUDA, memory is ``torch.cuda.max_memory_allocated`` during the step, parameters and optimizer
    state included. Elsewhere it is the peak of :class:`LiveBytes`: what the step needs *above* all that
    lived before it, so activations, gradients and perturbations, but not parameters and optimizer state.

    A Trainer tells its callbacks nothing when a step raises. The counting mode of an interrupted step is
    closed by the next training with the same meter; where the process goes on without one, use the meter
    as a context manager::

        with StepMeter() as meter:
            Trainer(..., callbacks=[meter]).train()
        print(meter.step_ms, meter.peak_memory_mib)
    """

    def __init__(self) -> None:
        self._open_mode = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._open_mode.close()
        self._steps, self._memory_step = 0, WARM_UP_STEPS + 1
        self._milliseconds: list[float] = []
        self._peak_bytes: int | None = None
        self._live_bytes: LiveBytes | None = None

    @property
    def step_ms(self) -> float:
        """Median time of a step in milliseconds; nan when fewer than four steps were taken."""
        return statistics.median(self._milliseconds) if self._milliseconds else math.nan

    @property
    def peak_memory_mib(self) -> float:
        """Peak memory of a step in MiB; nan when the step whose memory is taken was not reached."""
        return math.nan if self._peak_bytes is None else self._peak_bytes / 2**20

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training, and choose the step whose memory is taken."""
        self._reset()
        if isinstance(args, MetaTrainingArguments):
            # Adam makes its state in the first step that it takes, of the model or of the meta module.
            to_first = max(0, first_meta_step(args, state.max_steps) - state.global_step)
            self._memory_step = to_first + WARM_UP_STEPS * args.meta_every + 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and in the step whose memory is taken the count of bytes."""
        self._steps += 1
        _synchronize(args.device)
        if self._steps == self._memory_step:
            self._begin_memory(args.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop what ``on_step_begin`` started."""
        _synchronize(args.device)
        if self._steps == self._memory_step:
            self._end_memory(args.device)
        elif self._steps > WARM_UP_STEPS:
            self._milliseconds.append(1000 * (time.perf_counter() - self._started))

    def _begin_memory(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._live_bytes = self._open_mode.enter_context(LiveBytes())

    def _end_memory(self, device: torch.device) -> None:
        self._open_mode.close()
        if self._live_bytes is not None:
            self._peak_bytes = self._live_bytes.peak
        else:
            self._peak_bytes = torch.cuda.max_memory_allocated(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open_mode.close()


def _synchronize(device: torch.device) -> None:
    """Wait for the kernels in flight: on CUDA the clock would otherwise stop before they do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
