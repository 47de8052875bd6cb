"""Training runs that are killed, for `test_kills.py`: one JSON request per line in, one JSON answer per line out.

Importing transformers takes seconds, a tiny run takes less than one. So this process imports everything once, computes
nothing, and forks for each run: its children start at once, and die without harm to it.

A request names a `folder`, the `settings` of the trainer, the number of `processes` and what happens to them: `write`
(process number `rank` kills itself in the middle of its n-th write to a checkpoint), `seconds` (all are killed after
that time), `sigterm` (process `rank` sends itself SIGTERM in that step) or `spoil` (process `rank` has NaN in that
meta batch). It resumes where there is a complete checkpoint, and with `resume` in any case.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from tiny import HiddenShift, PointClassifier, meta_trainer, snapshot, tiny_bert, weight_net
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerState

import meta_trainer.modules.meta_module as meta_module
from meta_trainer import MetaTrainer, checkpoint

TIMEOUT = 120


class KilledInTheMiddle:
    """Wraps all that writes or deletes files of a checkpoint; the n-th call ends half done, and the process with it."""

    def __init__(self, number: int) -> None:
        self.left = number
        for owner, name, end in (
            (torch, "save", self.halve),
            (transformers.modeling_utils, "safe_save_file", self.halve),
            (meta_module, "save_model", self.halve),
            (TrainerState, "save_to_json", self.halve),
            (checkpoint, "_replace_text", self.remain),
            (shutil, "rmtree", self.delete_one),
        ):
            setattr(owner, name, self.counted(getattr(owner, name), end))

    def counted(self, function: Callable[..., Any], end: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                end(function, *args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def halve(self, function: Callable[..., Any], first: Any, file: str | Path, *args: Any, **kwargs: Any) -> None:
        function(first, file, *args, **kwargs)
        os.truncate(file, os.path.getsize(file) // 2)

    def remain(self, function: Callable[..., Any], file: Path, text: str) -> None:
        """A manifest is written under another name first."""
        file.with_name(f".{file.name}").write_text(text[: len(text) // 2])

    def delete_one(self, function: Callable[..., Any], folder: str, **kwargs: Any) -> None:
        next(file for file in sorted(Path(folder).iterdir()) if file.is_file()).unlink()


class SendSigterm(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Spoiled(MetaTrainer):
    """Has NaN in one of its meta batches."""

    spoil = -1

    def _meta_step_batches(self, inputs: Any) -> Any:
        batch, meta_batch = super()._meta_step_batches(inputs)
        if self._num_meta_steps == self.spoil:
            meta_batch["features"] = meta_batch["features"] * float("nan")
        return batch, meta_batch


def train(request: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    folder, chosen = Path(request["folder"]), request.get("rank", 0) == rank
    spoiled = "spoil" in request
    found = any(checkpoint.defect(c) is None for c in checkpoint.checkpoints(folder))
    # What is to be loaded from a checkpoint is something else before.
    seed = 1 if found else 0
    model = PointClassifier() if spoiled else tiny_bert(seed=seed)
    modules = [weight_net()] if spoiled else [weight_net(seed), HiddenShift()]
    trainer = meta_trainer(folder, modules, model, kind=Spoiled, **request["settings"])
    if "sigterm" in request and chosen:
        trainer.add_callback(SendSigterm(request["sigterm"]))
    if spoiled and chosen:
        trainer.spoil = request["spoil"]
    if "write" in request and chosen:
        KilledInTheMiddle(request["write"])
    if found:
        torch.rand(7)
    trainer.train(resume_from_checkpoint=request.get("resume", found) or None)
    report = {
        "world_size": trainer.args.world_size,
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "skipped": trainer._skipped.in_all,
        "lambda": {name: tensor.tolist() for name, tensor in snapshot(trainer.meta_module).items()},
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def child(request: dict[str, Any], rank: int, port: int) -> None:
    """A run in this process, which it does not outlive."""
    log = os.open(f"{request['folder']}.{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    if request["processes"] > 1:
        size = str(request["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        train(request, rank)
        if request["processes"] > 1:
            torch.distributed.barrier()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The process group may hang at the interpreter's exit.
        os._exit(code)


def wait(pids: list[int], seconds: float) -> dict[int, int]:
    """Exit codes of those that end within that time, and are not left alone by one that was killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < end and -signal.SIGKILL not in codes.values():
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return codes


def run(request: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(request["processes"]):
        pid = os.fork()
        if pid == 0:
            child(request, rank, port)
        pids.append(pid)
    start = time.monotonic()
    codes = wait(pids, request.get("seconds", TIMEOUT))
    seconds = time.monotonic() - start
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"codes": [codes[pid] for pid in pids], "seconds": seconds, "timed_out": seconds > TIMEOUT}


if __name__ == "__main__":
    # safetensors is imported by name elsewhere; here it only has to be loaded before the first fork.
    assert safetensors.torch.save_file
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
