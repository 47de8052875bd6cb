"""At SIGTERM: finish the optimizer step, save a checkpoint there, stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from meta_trainer.agreement import any_process

logger = logging.get_logger(__name__)

EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """Training was stopped by SIGTERM, after a checkpoint was saved; ends the process unless it is caught.

    Attributes:
        checkpoint: What a run with `resume_from_checkpoint` goes on from.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(EXIT_TERMINATED)
        self.checkpoint = checkpoint


class SaveAndStop(TrainerCallback):
    """Ends training with a checkpoint between two optimizer steps, in all processes after the same one.

    At the end of an epoch the checkpoint waits for the evaluation that belongs there; within an epoch nothing is added
    to what an uninterrupted run does.

    Attributes:
        requested: Whether this process got the signal.
        stopping: Whether all processes have agreed to stop.
        checkpoint: What was saved then, as the trainer tells.
    """

    def __init__(self) -> None:
        self.requested = self.stopping = self._at_end_of_epoch = False
        self.checkpoint: Path | None = None
        self._best: str | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decide whether this was the last step."""
        self.stopping = any_process(self.requested, args.device)
        if self.stopping:
            finished = state.global_step >= state.max_steps
            self._at_end_of_epoch = finished or float(state.epoch or 0).is_integer()
            control.should_training_stop = True
            control.should_save = not self._at_end_of_epoch
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save at the end of an epoch, and leave out what belongs there if it has not come."""
        if self.stopping:
            control.should_save = self._at_end_of_epoch
            if not self._at_end_of_epoch:
                control.should_log = control.should_evaluate = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the checkpoint from being deleted when training ends."""
        if self.stopping:
            # With a best model, Trainer ends by loading that, and with `save_total_limit` by deleting all others.
            self._best = self._best or state.best_model_checkpoint
            state.best_model_checkpoint = None

    def finish(self, state: TrainerState) -> None:
        """Give `state` back what it knew; end the process if training was stopped.

        Raises:
            Terminated: If it was.
        """
        if self.checkpoint is not None:
            state.best_model_checkpoint = self._best
            logger.warning(
                f"Training was stopped by SIGTERM after step {state.global_step}. {self.checkpoint} is saved: go on "
                "with resume_from_checkpoint=True."
            )
            raise Terminated(self.checkpoint)


@contextmanager
def listening(callback: SaveAndStop) -> Iterator[None]:
    """Let `callback` know of SIGTERM; a handler of the user's own stays in its place, and is the only one."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        callback.requested = True

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if callback.requested and callback.checkpoint is None:
        # It came after the last step; nobody else has heard it.
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def without_checkpoints_within_steps(args: Any) -> Iterator[None]:
    """Keep Trainer from saving at SIGTERM by itself: it does so also after the meta step and before the base step."""
    asked = getattr(args, "enable_jit_checkpoint", False)
    if asked:
        args.enable_jit_checkpoint = False
    try:
        yield
    finally:
        if asked:
            args.enable_jit_checkpoint = True
