"""Memory over a long run."""

import gc
from typing import Any

import psutil
import pytest
import torch
from runs import new_run
from transformers import TrainerCallback

pytestmark = pytest.mark.slow


class Watch(TrainerCallback):
    """Live tensors and resident memory, in MiB, at every hundredth step."""

    def __init__(self) -> None:
        self.tensors: list[int] = []
        self.resident: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 100 == 0:
            gc.collect()
            self.tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            self.resident.append(psutil.Process().memory_info().rss / 2**20)


@pytest.mark.parametrize(
    "settings",
    [
        {"perturb": ["head"]},
        {"estimator": "guided", "meta_guard": "change", "gradient_accumulation_steps": 2, "meta_every": 2},
    ],
    ids=["shared forward passes", "guided, accumulated"],
)
def test_memory_is_flat_over_two_thousand_steps(tmp_path, settings):
    defaults = {"max_steps": 2000, "logging_steps": 50, "per_device_train_batch_size": 2, "dropout": 0.1}
    trainer = new_run(tmp_path, **{**defaults, **settings})
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert trainer._num_meta_steps == 2000 // settings.get("meta_every", 1)
    assert max(watch.tensors[-5:]) == max(watch.tensors[:5]), watch.tensors
    # Log entries and the allocator's pools grow a little at first.
    assert watch.resident[-1] - watch.resident[4] < 8, watch.resident
