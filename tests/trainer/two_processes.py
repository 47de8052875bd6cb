"""What each of two processes does in `test_distributed.py`: FOLDER SETTINGS, the second as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import HiddenShift, meta_trainer, snapshot, tiny_bert, weight_net
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meta_trainer import MetaTrainer, shared_forward


class SentBytes(TorchDispatchMode):
    """Counts the bytes that collective operations are given."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


class Listener(MetaTrainer):
    """Keeps the meta batches of this process and counts what it sends."""

    meta_batches: list
    sent_bytes: list

    def _meta_step_batches(self, inputs):
        batch, meta_batch = super()._meta_step_batches(inputs)
        self.meta_batches.append(meta_batch["input_ids"].tolist())
        return batch, meta_batch

    def meta_step(self, model, inputs):
        with SentBytes() as sent:
            result = super().meta_step(model, inputs)
        self.sent_bytes.append(sent.total)
        return result


def main(folder: Path, general_path: bool = False, **settings) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    if general_path:
        shared_forward.independent_calls = lambda *args: ()
    # Each process starts from a meta module of its own: the trainer has to make them agree.
    trainer = meta_trainer(
        folder,
        [weight_net(seed=rank), HiddenShift()],
        tiny_bert(),
        kind=Listener,
        gradient_accumulation_steps=2,
        per_device_meta_batch_size=3,
        meta_learning_rate=0.05,
        save_strategy="steps",
        save_steps=4,
        **settings,
    )
    trainer.meta_batches, trainer.sent_bytes = [], []
    trainer.train()
    report = {
        "world_size": trainer.args.world_size,
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "meta_steps": trainer._num_meta_steps,
        "meta_batches": trainer.meta_batches,
        "sent_bytes": trainer.sent_bytes,
        "lambda_size": sum(p.numel() for p in trainer.meta_parameters),
        "theta_size": sum(p.numel() for p in trainer.model.parameters()),
        "shared": trainer._shared_forward._plan.by_base_step != (),
        "lambda": {name: tensor.tolist() for name, tensor in snapshot(trainer.meta_module).items()},
        "theta": {name: tensor.tolist() for name, tensor in snapshot(trainer.model).items()},
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    sys.stdout.flush()
    # The process group may hang at the interpreter's exit.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
