"""What each of two processes does in `test_distributed.py`."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import HiddenShift, meta_trainer, snapshot, tiny_bert, weight_net
from torch.nn.parallel import DistributedDataParallel

from meta_trainer import MetaTrainer


class Listener(MetaTrainer):
    """Keeps the meta batches of this process."""

    def _meta_step_batches(self, inputs):
        batch, meta_batch = super()._meta_step_batches(inputs)
        self.meta_batches.append(meta_batch["input_ids"].tolist())
        return batch, meta_batch

    meta_batches: list


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    # Each process starts from a meta module of its own: the trainer has to make them agree.
    trainer = meta_trainer(
        folder,
        [weight_net(seed=rank), HiddenShift()],
        tiny_bert(),
        kind=Listener,
        gradient_accumulation_steps=2,
        per_device_meta_batch_size=3,
        meta_learning_rate=0.05,
        hypergradient=sys.argv[2],
        save_strategy="steps",
        save_steps=4,
    )
    trainer.meta_batches = []
    trainer.train()
    report = {
        "world_size": trainer.args.world_size,
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "meta_steps": trainer._num_meta_steps,
        "meta_batches": trainer.meta_batches,
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
    main(Path(sys.argv[1]))
