"""Several trainings that take turns: each runs Trainer's own loop, one optimizer step whenever it is told to."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Semaphore, Thread
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from meta_trainer.meter import LiveBytes


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step cost.

    Attributes:
        wall_ms: Wall time in milliseconds.
        cpu_ms: CPU time of the process, all its threads, in milliseconds.
        step_bytes: Peak of the bytes above those alive before the step; 0 when not counted.
        held_bytes: What the training keeps from step to step; 0 when not counted.
    """

    wall_ms: float
    cpu_ms: float
    step_bytes: int = 0
    held_bytes: int = 0


class SteppedTraining(TrainerCallback):
    """A training in a thread of its own that waits for :meth:`step` after every optimizer step.

    The trainer is made in that thread at the first step: grad mode, autocast and dispatch modes are a thread's own.
    Whoever calls :meth:`step` is blocked meanwhile, so that one thread runs at any time. Leaving the context ends the
    training.

    Args:
        make_trainer: Makes the trainer, whose `max_steps` bounds the number of steps.
    """

    def __init__(self, make_trainer: Callable[[], Trainer]) -> None:
        self._make_trainer = make_trainer
        self._thread = Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._open_counter = ExitStack()
        self._closing = self._ended = self._counts_memory = False
        self._error: BaseException | None = None

    def step(self, count_memory: bool = False) -> StepCost:
        """Take one step and return its cost; what the training raises is raised here.

        Raises:
            RuntimeError: If the training has ended.
        """
        self._counts_memory = count_memory
        if not self._ended:
            self._go.release()
            self._done.acquire()
        if self._error is not None:
            raise self._error
        if self._ended:
            raise RuntimeError("The training has taken its last step. Give it a larger `max_steps`.")
        return self._cost

    def _run(self, threads: int) -> None:
        self._go.acquire()
        try:
            if not self._closing:
                # OpenMP keeps the number of threads for each thread that asks.
                torch.set_num_threads(threads)
                self._trainer = self._make_trainer()
                self._trainer.add_callback(self)
                self._trainer.train()
        except BaseException as error:  # raised again in `step`, in the thread that waits
            self._error = error
        finally:
            self._open_counter.close()
            self._ended = True
            self._done.release()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks, and the count of bytes where it is asked for."""
        if self._counts_memory:
            self._memory = self._open_counter.enter_context(PeakMemory(args.device))
        _synchronize(args.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clocks, hand the turn back and wait for the next one."""
        _synchronize(args.device)
        times = 1000 * (time.perf_counter() - self._wall), 1000 * (time.process_time() - self._cpu)
        self._open_counter.close()
        memory = (self._memory.bytes, held_bytes(self._trainer)) if self._counts_memory else ()
        self._cost = StepCost(*times, *memory)
        self._done.release()
        self._go.acquire()
        control.should_training_stop = control.should_training_stop or self._closing

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing = True
        self._go.release()
        self._thread.join()


class PeakMemory:
    """Count, while it is open, the peak of the bytes above those that were alive before.

    On CUDA these are the allocator's; elsewhere :class:`LiveBytes` counts the tensors.

    Attributes:
        bytes: The peak, once it is closed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._live_bytes = LiveBytes()

    def __enter__(self) -> Self:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._live_bytes.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._live_bytes.__exit__(*exception)
            self.bytes = self._live_bytes.peak


def held_bytes(trainer: Trainer) -> int:
    """Bytes of the parameters, the buffers and the optimizers' states, those of the meta module included."""
    modules = [trainer.model, getattr(trainer, "meta_module", None)]
    optimizers = [trainer.optimizer, getattr(trainer, "meta_optimizer", None)]
    tensors = [t for module in modules if module is not None for t in (*module.parameters(), *module.buffers())]
    states = [list(optimizer.state.values()) for optimizer in optimizers if optimizer is not None]
    tensors += [leaf for leaf in tree_leaves(states) if isinstance(leaf, torch.Tensor)]
    # Tied parameters and views share a storage.
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def take_turns(
    trainings: Sequence[SteppedTraining], warm_up: int, rounds: int
) -> tuple[list[StepCost], list[list[StepCost]]]:
    """Step all trainings in turn, one step each in a round; who begins changes from round to round.

    Args:
        trainings: Whose `max_steps` is at least ``warm_up + 1 + rounds``.
        warm_up: Rounds that are not counted. After them comes one round for the memory.
        rounds: Rounds that are timed.

    Returns:
        For each training, the step whose memory was counted, and the timed steps by round.
    """
    for number in range(warm_up):
        for position in rotation(len(trainings), number):
            trainings[position].step()
    memory = [training.step(count_memory=True) for training in trainings]
    times: list[list[StepCost]] = [[] for _ in trainings]
    for number in range(rounds):
        for position in rotation(len(trainings), number):
            times[position].append(trainings[position].step())
    return memory, times


def rotation(length: int, number: int) -> list[int]:
    """The positions from 0 to ``length - 1``, beginning with ``number`` modulo ``length``."""
    return [(number + position) % length for position in range(length)]


def _synchronize(device: torch.device) -> None:
    """Wait for the kernels in flight, which the clocks would otherwise miss."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
