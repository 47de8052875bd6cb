"""Checkpoints of the meta side, and which of them a run goes on from."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from meta_trainer.agreement import decided_by_the_first
from meta_trainer.checkpoint import (
    break_seal,
    check_complete,
    check_counts,
    check_optimizer_state,
    check_writable,
    discard_incomplete,
    load_state,
    newest_complete,
    reading,
    same_kind,
    seal,
    write_manifest,
    writing,
)
from meta_trainer.diagnostics import Diagnostics
from meta_trainer.meta_data import MetaDataStream
from meta_trainer.meta_optimizer import all_finite
from meta_trainer.meta_update import SkippedSteps
from meta_trainer.model_card import add_loading_section, add_meta_section
from meta_trainer.objective import ObjectiveTrainer
from meta_trainer.schedule_free import averages, iterates, restore_iterates, set_training_mode
from meta_trainer.sharding import holds_optimizer
from meta_trainer.sigterm import SaveAndStop, listening
from meta_trainer.window import Window

logger = logging.get_logger(__name__)

META_MODULE_FOLDER = "meta_module"
META_STATE_NAME = "meta_state.pt"


class ResumableTrainer(ObjectiveTrainer):
    """A Trainer whose checkpoints hold the meta side too, are known to be complete, and are written at SIGTERM."""

    meta_optimizer: torch.optim.Optimizer = None  # type: ignore[assignment]
    # None before `train()`.
    meta_lr_scheduler: torch.optim.lr_scheduler.LRScheduler = None  # type: ignore[assignment]
    meta_scaler: torch.amp.GradScaler
    meta_data: MetaDataStream | None
    _diagnostics: Diagnostics
    _skipped: SkippedSteps
    _num_meta_steps: int

    def _set_up_checkpoints(self) -> None:
        self._stop = SaveAndStop()
        self._checkpoint_in_work: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; with a meta module, resume from complete checkpoints only, and save at SIGTERM.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest complete one.
            *args: As in Trainer.
            **kwargs: As in Trainer.

        Raises:
            ValueError: If the checkpoint is not complete, or there is none.
            OSError: If checkpoints could not be written.
            Terminated: If the run was stopped by SIGTERM.
        """
        if self.meta_module is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = decided_by_the_first(lambda: self._find_checkpoint(resume_from_checkpoint))
        self._stop = SaveAndStop()
        saves = self._saves or getattr(self.args, "enable_jit_checkpoint", False)
        if saves:
            self.add_callback(self._stop)
        try:
            with listening(self._stop) if saves else nullcontext():
                output = super().train(checkpoint, *args, **kwargs)
        finally:
            if saves:
                self.remove_callback(self._stop)
            # The last step's batches are of no more use.
            self._begin(Window([]))
        self._stop.finish(self.state)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.meta_module is not None and self.state.global_step >= self.state.max_steps:
            # Resumed at the last step, within an epoch; Trainer looks for the end after one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @property
    def _saves(self) -> bool:
        return self.args.save_strategy != SaveStrategy.NO

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        checkpoint = None
        if resume_from_checkpoint is True:
            checkpoint = newest_complete(self._folder())
            if checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True: there is no checkpoint in {self._folder()}.")
        elif resume_from_checkpoint:
            if not isinstance(resume_from_checkpoint, str | Path):
                raise ValueError(
                    f"`resume_from_checkpoint` should be a folder, True or False, got {resume_from_checkpoint!r}."
                )
            checkpoint = Path(resume_from_checkpoint)
            check_complete(checkpoint)
        if self._saves:
            check_writable(self._folder())
            if self.args.save_total_limit:
                discard_incomplete(self._folder())
        return None if checkpoint is None else str(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.meta_module is None:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._checkpoint_in_work = folder
        try:
            with writing(folder):
                if self.args.should_save:
                    break_seal(folder)
                super()._save_checkpoint(model, trial)
                self._seal_checkpoint()
        finally:
            self._checkpoint_in_work = None
        if self._stop.stopping:
            self._stop.checkpoint = folder

    def _seal_checkpoint(self) -> None:
        """Add what was written last to the manifest, before the checkpoint is pushed, or when it was not."""
        if self._checkpoint_in_work is not None and self.args.should_save:
            seal(self._checkpoint_in_work)
        self._checkpoint_in_work = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.meta_module is not None and self.args.should_save:
            self._save_meta_module(self._folder(output_dir))
            if self.args.save_only_model and self._checkpoint_in_work is not None:
                write_manifest(self._checkpoint_in_work)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.meta_module is not None and self.args.should_save:
            # `_save` is not called where a model is saved in shards.
            self._save_meta_module(Path(output_dir))
            torch.save(self._meta_state(), Path(output_dir) / META_STATE_NAME)

    def _save_meta_module(self, folder: Path) -> None:
        with averages(self.meta_optimizer):
            self.meta_module.save_pretrained(folder / META_MODULE_FOLDER)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.meta_module is not None and self._checkpoint_in_work is not None:
            # Before the trainer's state, which makes the checkpoint count, and before older ones are deleted.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(self._checkpoint_in_work)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        # With save_strategy="best" only the best would be saved, also at SIGTERM.
        return is_best or (self.meta_module is not None and self._stop.stopping)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with self._reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._load_meta_module(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        checkpoint = str(self.state.best_model_checkpoint)
        with self._reading(checkpoint):
            super()._load_best_model()
        self._load_meta_module(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._reading(checkpoint):
            if self.meta_module is None or checkpoint is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            with same_kind(self.optimizer, checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            # DeepSpeed goes without `_load_from_checkpoint`.
            self._load_meta_module(checkpoint)
            with same_kind(self.meta_optimizer, checkpoint):
                self._load_meta_state(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        with self._reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _reading(self, checkpoint: str | None) -> AbstractContextManager[None]:
        return nullcontext() if self.meta_module is None or checkpoint is None else reading(checkpoint)

    def _folder(self, output_dir: str | None = None) -> Path:
        return Path(output_dir or str(self.args.output_dir))

    def _load_meta_module(self, folder: str) -> None:
        if self.meta_module is not None:
            # The file holds the averages of a schedule-free optimizer.
            set_training_mode(self.meta_optimizer, False)
            self.meta_module.load_weights(Path(folder) / META_MODULE_FOLDER / "model.safetensors")

    def _meta_state(self) -> dict[str, Any]:
        return {
            "iterates": iterates(self.meta_optimizer),
            "optimizer": self.meta_optimizer.state_dict(),
            "scheduler": self.meta_lr_scheduler.state_dict(),
            "scaler": self.meta_scaler.state_dict(),
            "diagnostics": self._diagnostics.state_dict(),
            "skipped": self._skipped.state_dict(),
            "num_meta_steps": self._num_meta_steps,
            "meta_batches_read": 0 if self.meta_data is None else self.meta_data.batches_read,
        }

    def _load_meta_state(self, checkpoint: Path) -> None:
        file = checkpoint / META_STATE_NAME
        if not file.is_file():
            if holds_optimizer(checkpoint):
                raise ValueError(f"{checkpoint} was saved without a meta module: it has no {META_STATE_NAME}.")
            logger.warning(
                f"{checkpoint} holds no optimizer states: the meta optimizer starts anew, as the base one does."
            )
            return
        state = load_state(file)
        check_counts(state, ("num_meta_steps", "meta_batches_read"), file)
        check_optimizer_state(state["optimizer"], self.meta_parameters, file)
        self.meta_optimizer.load_state_dict(state["optimizer"])
        restore_iterates(self.meta_optimizer, state["iterates"])
        self.meta_lr_scheduler.load_state_dict(state["scheduler"])
        self.meta_scaler.load_state_dict(state["scaler"])
        if not all_finite(self.meta_parameters, self.meta_optimizer):
            raise ValueError(f"The meta module or the state of its optimizer in {checkpoint} is not finite.")
        self._diagnostics.load_state_dict(state["diagnostics"])
        self._skipped.load_state_dict(state["skipped"])
        self._num_meta_steps = state["num_meta_steps"]
        if self.meta_data is not None:
            self.meta_data.seek(state["meta_batches_read"])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.meta_module is not None:
            self._seal_checkpoint()
        if self.meta_module is not None and self.is_world_process_zero():
            source = Path(checkpoint_folder) / META_MODULE_FOLDER
            shutil.copytree(source, self._folder() / META_MODULE_FOLDER, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's model card, with sections on loading a model of this package and on the meta module."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        add_loading_section(self._folder() / "README.md", self.model)
        if self.meta_module is not None:
            add_meta_section(self._folder() / "README.md", self.meta_module, self.args)
