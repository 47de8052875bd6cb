"""What each of two processes does in `test_sharded.py`: FOLDER ENGINE; its findings go to FOLDER/ENGINE-RANK.pt."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from tiny import (
    NUM_META,
    HiddenShift,
    IdentityModule,
    arguments,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from meta_trainer import MetaTrainer, MetaTrainingArguments, estimation
from meta_trainer.hypergrad import evograd

WRAP = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "reshard_after_forward": True,
}


def zero_config(stage: int) -> dict[str, Any]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # One threshold for parameters that stay whole, so that there are parameters of both kinds.
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 60}
    return {
        **dict.fromkeys(names, "auto"),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def engine_settings(engine: str, folder: Path) -> dict[str, Any]:
    if engine.startswith("fsdp2"):
        kind = "SHARDED_STATE_DICT" if engine == "fsdp2_sharded" else "FULL_STATE_DICT"
        return {"fsdp": "full_shard", "fsdp_config": {**WRAP, "state_dict_type": kind}}
    if engine.startswith("zero"):
        file = folder / f"{engine}-{os.environ['RANK']}.json"
        file.write_text(json.dumps(zero_config(int(engine[-1]))))
        return {"deepspeed": str(file)}
    return {}


def let_fsdp_run_on_the_cpu() -> None:
    """Accelerate chooses FSDP for accelerators only, though FSDP2 runs with gloo."""
    original = accelerate_state.AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = patched  # type: ignore[method-assign]


class Recorder(MetaTrainer):
    """Keeps the hypergradients; breaks its second meta step off on request, "between" passes or "inside" of one."""

    breaks = ""
    is_late = False
    refusal = ""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.is_late and getattr(self, "num_batches", 0) % 2 == 1:
            try:
                super().meta_step(model, inputs)
            except ValueError as error:
                self.refusal = str(error)
        self.num_batches = getattr(self, "num_batches", 0) + 1
        return super().training_step(model, inputs, num_items_in_batch)

    def meta_step(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        self.results: list[Any] = getattr(self, "results", [])
        self.num_evaluations = 0
        try:
            self.results.append(super().meta_step(model, inputs))
        except ArithmeticError:
            # Trainer's step goes on; the meta step has to have left no trace.
            self.results.append(None)
        return self.results[-1]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.num_evaluations = getattr(self, "num_evaluations", 0) + 1
        due = self.num_evaluations == 2 and len(self.results) == 1
        if due and self.breaks == "inside":
            model = self.accelerator.unwrap_model(self.model_wrapped)
            hook = model.bert.encoder.layer[0].output.register_forward_hook(_fail)
            try:
                return super().compute_loss(*args, **kwargs)
            finally:
                hook.remove()
        loss = super().compute_loss(*args, **kwargs)
        return _fail() if due and self.breaks == "between" else loss


def _fail(*call: Any) -> Any:
    raise ArithmeticError("on purpose")


def cut(engine: str, whole: Tensor) -> Tensor:
    """This process's part of a parameter, by the layout that the engines document."""
    rank = dist.get_rank()
    if engine.startswith("fsdp2"):
        chunks = torch.chunk(whole, 2)
        return chunks[rank] if rank < len(chunks) else whole[:0]
    if engine == "zero3":
        length = -(-whole.numel() // 2)
        return whole.flatten()[rank * length : (rank + 1) * length]
    return whole


@contextmanager
def given_noise(engine: str, names: list[str] | None) -> Iterator[None]:
    """Perturb by the same tensors, however the parameters are spread."""
    parameters = dict(tiny_bert().named_parameters())
    shapes = [p.shape for name, p in parameters.items() if names is None or name in names]

    def noise(k: int, theta: list[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7 + k)
        return [0.01 * cut(engine, torch.randn(shape, generator=generator)) for shape in shapes]

    def patched(problem: Any, number: int, sigma: float, temperature: float, kind: str, *args: Any, **kw: Any) -> Any:
        return evograd(problem, number, sigma, temperature, noise)

    estimation.evograd = patched  # type: ignore[assignment]
    try:
        yield
    finally:
        estimation.evograd = evograd


def whole(trainer: Any) -> dict[str, Tensor]:
    """All parameters, gathered."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    gathered = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            # By hand: DeepSpeed's own gathering may give parts that are stale.
            pieces = [torch.empty_like(parameter.ds_tensor.data) for _ in range(2)]
            dist.all_gather(pieces, parameter.ds_tensor.data)
            gathered[name] = torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape).clone()
        elif isinstance(parameter, DTensor):
            gathered[name] = parameter.full_tensor().detach().clone()
        else:
            gathered[name] = parameter.detach().clone()
    return gathered


class Child:
    """The runs of one process under one engine."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.number = 0

    def train(
        self,
        modules: Callable[[], Any] | None = None,
        dropout: float = 0.0,
        resume: str | None = None,
        folder: str | None = None,
        breaks: str = "",
        freezes: bool = False,
        is_late: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        self.number += 1
        kind = TrainingArguments if modules is None else MetaTrainingArguments
        output = self.folder / self.engine / (folder or f"run-{self.number}")
        defaults = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "logging_steps": 1}
        args = arguments(output, kind, **{**defaults, **settings, **engine_settings(self.engine, self.folder)})
        data: dict[str, Any] = {"train_dataset": sentences(24, 1)}
        model = tiny_bert(dropout)
        model.bert.embeddings.requires_grad_(not freezes)
        trainer: Any
        if modules is None:
            trainer = Trainer(model, args, **data)
        else:
            meta = {"meta_module": modules(), "meta_dataset": sentences(NUM_META, 2)}
            trainer = Recorder(model, args, **data, **meta)
            trainer.breaks, trainer.is_late = breaks, is_late
        trainer.train(resume_from_checkpoint=resume)
        return self.report(trainer)

    def report(self, trainer: Any) -> dict[str, Any]:
        fields = ("train_losses", "scores", "val_loss", "weights", "val_loss_change")
        results = getattr(trainer, "results", [])
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        return {
            "world_size": dist.get_world_size(),
            "wrapper": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__],
            "spread": sorted({type(p).__name__ for p in model.parameters()} | _marks(model)),
            "results": [r and {**{f: getattr(r, f) for f in fields}, "grads": list(r.grads)} for r in results],
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "refusal": getattr(trainer, "refusal", ""),
            "theta": whole(trainer),
            "lambda": {} if not hasattr(trainer, "results") else snapshot(trainer.meta_module),
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        }


def _marks(model: nn.Module) -> set[str]:
    return {"ds_tensor"} if any(hasattr(p, "ds_tensor") for p in model.parameters()) else set()


def both() -> list[Any]:
    return [weight_net(), HiddenShift()]


def no_shift() -> HiddenShift:
    """Goes through its door, where it adds zero."""
    module = HiddenShift()
    nn.init.zeros_(module.shift)
    return module


HEAD = ["classifier.weight", "classifier.bias"]


def scenarios(child: Child) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if child.engine in ("ddp", "zero1", "zero2"):
        found["t1t2"] = child.train(both, hypergradient="t1t2")
        found["dealt_out"] = child.train(both, noise="guided", share_candidates=True)
    if child.engine != "fsdp2_sharded":
        given = {"num_candidates": 3, "temperature": 0.05}
        with given_noise(child.engine, None):
            found["given"] = child.train(both, **given)
            found["given_shift"] = child.train(HiddenShift, gradient_accumulation_steps=2, **given)
        with given_noise(child.engine, HEAD):
            found["given_head"] = child.train(both, perturb=["head"], **given)
        found["guided"] = child.train(both, noise="guided")
        found["finite_difference"] = child.train(both, hypergradient="finite_difference")
        found["frozen"] = child.train(both, noise="guided", freezes=True)
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        found["checkpointed"] = child.train(both, noise="guided", **checkpointing)
        found["sign"] = child.train(both, relative_sigma=True, antithetic=True, num_candidates=4, sigma=0.05)
        for steps in (1, 2):
            settings = {"dropout": 0.1, "gradient_accumulation_steps": steps, "optim": "adamw_torch"}
            still = {**settings, "meta_learning_rate": 0.0}
            found[f"plain_{steps}"] = child.train(**settings)
            found[f"identity_{steps}"] = child.train(IdentityModule, **still)
            found[f"shift_{steps}"] = child.train(no_shift, hypergradient="finite_difference", **still)
            found[f"head_{steps}"] = child.train(no_shift, perturb=["head"], **still)
            found[f"between_{steps}"] = child.train(no_shift, breaks="between", **still)
            found[f"inside_{steps}"] = child.train(no_shift, breaks="inside", noise="guided", **still)
        found["late"] = child.train(no_shift, is_late=True, **still)
        if not child.engine.startswith("zero"):
            found["accumulated"] = child.train(both, gradient_accumulation_steps=2, noise="guided")
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "noise": "guided", "meta_learning_rate": 0.05}
    saved |= {"optim": "adamw_torch", "dropout": 0.1}
    found["straight"] = child.train(both, folder="straight", **saved)
    checkpoint = child.folder / child.engine / "straight" / "checkpoint-2"
    found["resumed"] = child.train(both, folder="resumed", resume=str(checkpoint), **saved)
    return found


def main(folder: Path, engine: str) -> None:
    torch.set_num_threads(1)
    if engine.startswith("fsdp2"):
        let_fsdp_run_on_the_cpu()
    found = scenarios(Child(engine, folder))
    torch.save(found, folder / f"{engine}-{os.environ['RANK']}.pt")
    dist.barrier()
    sys.stdout.flush()
    # The process group may hang at the interpreter's exit.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
