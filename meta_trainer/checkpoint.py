"""Checkpoints that are known to be complete: a manifest of their files, and the choice of one to resume from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from meta_trainer.hypergrad.checks import is_integer

logger = logging.get_logger(__name__)

MANIFEST_NAME = "meta_manifest.json"
SENTINEL_NAME = "checkpoint-is-incomplete.txt"
"""What Trainer's own checkpoints at SIGTERM hold until they are written."""

NO_MANIFEST = f"it has no {MANIFEST_NAME}, which is written last"


def write_manifest(folder: Path) -> None:
    """List every file of a checkpoint with its size and hash; what was written before is complete from then on.

    Args:
        folder: The checkpoint. Markdown is left out, as people edit it.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    left_out = (MANIFEST_NAME, _temporary(folder / MANIFEST_NAME).name, SENTINEL_NAME)
    listed = [f for f in files if f.suffix != ".md" and f.name not in left_out]
    manifest = {f.relative_to(folder).as_posix(): {"size": f.stat().st_size, "sha256": _sha256(f)} for f in listed}
    _replace_text(folder / MANIFEST_NAME, json.dumps({"files": manifest}, indent=1))


def seal(folder: Path) -> None:
    """Add the trainer's state to a manifest, which is older than that file."""
    file = folder / MANIFEST_NAME
    manifest = json.loads(file.read_text(encoding="utf-8"))
    state = folder / TRAINER_STATE_NAME
    manifest["files"][TRAINER_STATE_NAME] = {"size": state.stat().st_size, "sha256": _sha256(state)}
    _replace_text(file, json.dumps(manifest, indent=1))


def break_seal(folder: Path) -> None:
    """Make a checkpoint count as incomplete, as it is about to be written anew."""
    for name in (TRAINER_STATE_NAME, MANIFEST_NAME):
        (folder / name).unlink(missing_ok=True)


def defect(folder: Path, hashes: bool = True) -> str | None:
    """Say why a checkpoint is not complete; None for one that is.

    Args:
        folder: The checkpoint.
        hashes: Read all files, instead of looking at their sizes only.
    """
    if (folder / SENTINEL_NAME).exists():
        return f"it holds {SENTINEL_NAME}, which Trainer removes when all is written"
    why = _state_defect(folder / TRAINER_STATE_NAME)
    if why is not None:
        return why
    if not (folder / MANIFEST_NAME).is_file():
        return NO_MANIFEST
    try:
        listed = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        for name, entry in listed.items():
            why = _file_defect(folder, name, entry, hashes)
            if why is not None:
                return why
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} is not one that a run writes"
    return None


def is_half_written(folder: Path) -> bool:
    """Whether the run was stopped while it wrote this checkpoint: the trainer's state comes last."""
    return (folder / SENTINEL_NAME).exists() or _state_defect(folder / TRAINER_STATE_NAME) is not None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders ``checkpoint-N`` of a run, complete or not, the newest first."""
    if not output_dir.is_dir():
        return []
    numbered = {f: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", f.name) for f in output_dir.iterdir() if f.is_dir()}
    steps = {folder: int(match.group(1)) for folder, match in numbered.items() if match is not None}
    return sorted(steps, key=lambda folder: steps[folder], reverse=True)


def newest_complete(output_dir: Path, with_manifest: bool = True) -> Path | None:
    """The newest complete checkpoint of a run; the incomplete ones that are passed over are warned about.

    Args:
        output_dir: Of the run.
        with_manifest: Whether the run writes manifests: without a meta module it is Trainer, which does not.

    Returns:
        None if there is none, complete or not.

    Raises:
        ValueError: If all are incomplete.
    """
    found: dict[Path, str] = {}
    for folder in checkpoints(output_dir):
        why = defect(folder)
        if why is None or (why == NO_MANIFEST and not with_manifest):
            for passed_over, reason in found.items():
                logger.warning(f"{passed_over} is incomplete and passed over: {reason}.")
            return folder
        found[folder] = why
    if not found:
        return None
    reasons = "; ".join(f"{folder.name}: {why}" for folder, why in found.items())
    raise ValueError(
        f"No checkpoint in {output_dir} is complete ({reasons}). Start anew, without `resume_from_checkpoint`, or name "
        "one that you trust."
    )


def discard_incomplete(output_dir: Path) -> None:
    """Delete what a run that was killed left half-written.

    Rotation, which deletes the oldest checkpoints, would count it as one to keep.
    """
    for folder in checkpoints(output_dir):
        why = defect(folder, hashes=False)
        if why not in (None, NO_MANIFEST):
            logger.warning(f"{folder} is incomplete and deleted, as there is a `save_total_limit`: {why}.")
            shutil.rmtree(folder)


def check_complete(folder: Path) -> None:
    """Look at a checkpoint that was asked for by its name.

    Raises:
        ValueError: If it is not complete. One without a manifest is only warned about.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder}.")
    why = defect(folder)
    if why == NO_MANIFEST:
        logger.warning(f"{folder} cannot be checked: {why}. It is resumed from as it is.")
    elif why is not None:
        raise ValueError(
            f"{folder} is incomplete or was changed: {why}. Resume from another checkpoint; "
            "resume_from_checkpoint=True chooses the newest complete one. If you changed it yourself, remove its "
            f"{MANIFEST_NAME}."
        )


def check_writable(output_dir: Path) -> None:
    """Write an empty file, and remove it.

    Raises:
        OSError: If that fails.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"No checkpoint could be saved in `output_dir` {output_dir}: {error.strerror}. Make it a folder that can "
            "be written to, or choose another one",
        ) from error


@contextmanager
def writing(checkpoint: Path) -> Iterator[None]:
    """Give an error while a checkpoint is written its name.

    Raises:
        OSError: If it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        # A push to the Hub begins when all is written, and fails for reasons of its own.
        if not _is_of_writing(error) or defect(checkpoint, hashes=False) is None:
            raise
        message = (
            f"{checkpoint} could not be written: {_first_line(error)}. It is incomplete and will not be resumed from; "
            "earlier checkpoints are as they were. Make room, then go on with resume_from_checkpoint=True."
        )
        raise (OSError(message) if number is None else OSError(number, message)) from error


@contextmanager
def reading(checkpoint: str | Path) -> Iterator[None]:
    """Turn what readers of damaged or foreign files raise into one error.

    Raises:
        ValueError: If the checkpoint could not be read.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        OSError, EOFError, SafetensorError, UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError
    ) as error:  # fmt: skip
        raise ValueError(
            f"{checkpoint} cannot be resumed from: {_first_line(error)}. It is damaged, or of another model or "
            "meta module. Resume from another checkpoint."
        ) from error


def load_state(file: Path) -> dict[str, Any]:
    """Read a dictionary of tensors, onto the CPU, and plain values; no code in the file is ever run.

    Raises:
        ValueError: If the file holds anything else.
    """
    with reading(file):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"{file} should hold a dictionary, got {type(state).__name__}.")
    return state


def check_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter], file: Path) -> None:
    """Compare the shapes of an optimizer's state with its parameters, which PyTorch does not.

    Raises:
        ValueError: If it is the state of an optimizer of other parameters.
    """
    number = sum(len(group["params"]) for group in state["param_groups"])
    if number != len(parameters):
        raise ValueError(
            f"{file} belongs to another meta module: it is of {number} parameters, this one has {len(parameters)}."
        )
    for parameter, entry in zip(parameters, map(state["state"].get, range(number)), strict=True):
        shapes = [tuple(v.shape) for v in (entry or {}).values() if isinstance(v, torch.Tensor) and v.numel() > 1]
        if _is_foreign(shapes, parameter):
            raise ValueError(
                f"{file} belongs to another meta module: it has states of the shapes {shapes} for a parameter of the "
                f"shape {list(parameter.shape)}."
            )


@contextmanager
def same_kind(optimizer: torch.optim.Optimizer | None, checkpoint: str | Path) -> Iterator[None]:
    """Around the loading of an optimizer's state: look at the settings that it takes over, which PyTorch does not.

    Raises:
        ValueError: If they are those of an optimizer of another kind.
    """
    # Loading replaces the groups.
    needed = {name for group in getattr(optimizer, "param_groups", []) for name in group}
    yield
    if missing := sorted({name for g in getattr(optimizer, "param_groups", []) for name in needed - g.keys()}):
        raise ValueError(
            f"{checkpoint} was saved with another optimizer: that state has no {', '.join(missing)}. Resume with the "
            "`optim` and the `meta_optim` of then."
        )


def check_counts(state: dict[str, Any], names: Sequence[str], file: Path) -> None:
    """Raise ValueError unless the state holds whole numbers, not below zero, under `names`."""
    for name in names:
        if not is_integer(state.get(name)) or state[name] < 0:
            raise ValueError(f"{file} is damaged: {name} should be a whole number, got {short(state.get(name))}.")


def _is_foreign(shapes: list[tuple[int, ...]], parameter: nn.Parameter) -> bool:
    # Optimizers that factorize keep rows and columns instead of the whole.
    return any(len(shape) == parameter.ndim and shape != tuple(parameter.shape) for shape in shapes)


def _state_defect(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        state = TrainerState.load_from_json(str(file))
    except (ValueError, TypeError, AttributeError, LookupError):
        return f"{file.name} cannot be read"
    # Trainer computes with it.
    return None if isinstance(state.train_batch_size, int) else f"{file.name} is not one that a run writes"


def _file_defect(folder: Path, name: str, entry: dict[str, Any], hashes: bool) -> str | None:
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size} bytes instead of {entry['size']}"
    if hashes and _sha256(file) != entry["sha256"]:
        return f"{name} is not the file that was saved"
    return None


def _is_of_writing(error: BaseException) -> bool:
    # PyTorch's own writer raises no OSError, and no error of a kind of its own.
    words = ("PytorchStreamWriter", "inline_container", "file write failed")
    return not isinstance(error, RuntimeError) or any(word in str(error) for word in words)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace_text(file: Path, text: str) -> None:
    """Write a file such that there is never half of it."""
    temporary = _temporary(file)
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}")
