"""A checkpoint that cannot be written: a clear error, and the one before it is as it was."""

import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import save_model
from tiny import meta_trainer, same, snapshot, tiny_bert, weight_net
from transformers import Trainer, TrainerCallback, TrainerState

from meta_trainer import MetaTrainer, checkpoint
from meta_trainer.checkpoint import defect, newest_complete

SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


@contextmanager
def full_disk():
    """No file may grow beyond 100 bytes; the interpreter ignores the signal, so that writing fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "model": (transformers.modeling_utils, "safe_save_file"),
    "meta module": ("meta_trainer.modules.meta_module", "save_model"),
    "states": (torch, "save"),
    "manifest": (checkpoint, "_replace_text"),
    "trainer's state": (TrainerState, "save_to_json"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_ends_in_an_error_that_names_the_checkpoint(tmp_path, monkeypatch, writer):
    owner, name = WRITERS[writer]
    original = save_model if isinstance(owner, str) else getattr(owner, name)
    trainer = meta_trainer(tmp_path, **SETTINGS)

    def write(*args, **kwargs):
        if trainer.state.global_step < 2:
            return original(*args, **kwargs)
        with full_disk():
            return original(*args, **kwargs)

    target = f"{owner}.{name}" if isinstance(owner, str) else None
    monkeypatch.setattr(*((target, write) if target else (owner, name, write)))
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .* incomplete and will not be resumed from"):
        trainer.train()
    monkeypatch.undo()
    assert defect(tmp_path / "checkpoint-2") is not None
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-1"


def test_a_run_goes_on_where_there_is_room_again(tmp_path, monkeypatch):
    straight = meta_trainer(tmp_path / "straight", **SETTINGS)
    straight.train()
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: full(*args))

    def full(state, file):
        if "checkpoint-2" not in str(file):
            return original(state, file)
        with full_disk():
            return original(state, file)

    with pytest.raises(OSError, match="checkpoint-2 could not be written"):
        meta_trainer(tmp_path / "stopped", **SETTINGS).train()
    monkeypatch.undo()
    resumed = meta_trainer(tmp_path / "stopped", weight_net(seed=5), tiny_bert(seed=5), **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert same(snapshot(resumed.model), snapshot(straight.model))
    assert same(snapshot(resumed.meta_module), snapshot(straight.meta_module))


class FailsElsewhere(MetaTrainer):
    error: Exception

    def _save_optimizer_and_scheduler(self, output_dir):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ZeroDivisionError("of a callback")])
def test_other_errors_while_saving_keep_their_kind(tmp_path, error):
    trainer = meta_trainer(tmp_path, kind=FailsElsewhere, **SETTINGS)
    trainer.error = error
    with pytest.raises(type(error), match=str(error)):
        trainer.train()


def test_a_push_that_fails_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch):
    def push(self, folder):
        # What goes to the Hub is complete.
        assert "trainer_state.json" in (Path(folder) / checkpoint.MANIFEST_NAME).read_text()
        assert defect(Path(folder)) is None
        raise OSError("the Hub is away")

    trainer = meta_trainer(tmp_path, **SETTINGS)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    (tmp_path / "meta_module").mkdir()
    with pytest.raises(OSError, match=r"^the Hub is away$"):
        trainer.train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-1"


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(tmp_path, monkeypatch):
    begun = []

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(1)

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    for trainer in (meta_trainer(tmp_path / "run", **SETTINGS), meta_trainer(tmp_path / "file", **SETTINGS)):
        trainer.add_callback(Begun())
        with monkeypatch.context() as patch:
            if trainer.args.output_dir.endswith("run"):
                patch.setattr(tempfile, "TemporaryFile", read_only)
            else:
                (tmp_path / "file").rmdir()
                (tmp_path / "file").touch()
            with pytest.raises(
                OSError, match=r"No checkpoint could be saved in `output_dir` .*(Read-only|File exists)"
            ):
                trainer.train()
    assert begun == []


def test_a_run_that_saves_nothing_needs_no_folder_to_write_to(tmp_path, monkeypatch):
    trainer = meta_trainer(tmp_path / "run", max_steps=1)
    (tmp_path / "run").rmdir()
    trainer.train()
    assert not (tmp_path / "run").exists()
