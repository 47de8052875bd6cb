"""What each of two processes does in `test_two_processes.py`: FOLDER, where `scenarios.json` names the runs."""

import json
import os
import sys
from pathlib import Path

import torch
from runs import new_run, report
from torch.nn.parallel import DistributedDataParallel


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for name, (settings, resume) in json.loads((folder / "scenarios.json").read_text()).items():
        # What ran before must not matter: a process of its own would find other random numbers.
        torch.manual_seed(99 + rank)
        trainer = new_run(folder / name, **settings)
        trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
        found = report(trainer)
        found["world_size"] = trainer.args.world_size
        found["wrapped"] = isinstance(trainer.model_wrapped, DistributedDataParallel)
        found["meta_steps"] = trainer._num_meta_steps
        torch.save(found, folder / name / f"rank-{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    # The process group may hang at the interpreter's exit.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
