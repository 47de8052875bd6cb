import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.meter import LiveBytes, StepMeter

MIB = 2**20


def tensor_of_mib(size: int) -> torch.Tensor:
    return torch.zeros(size * MIB, dtype=torch.uint8)


def test_live_bytes_counts_a_tensor_until_it_is_freed():
    with LiveBytes() as counter:
        first = tensor_of_mib(1)
        del first
        second = tensor_of_mib(3)
        del second
        third = tensor_of_mib(2)
    assert counter.peak == 3 * MIB
    assert counter.live == 2 * MIB
    del third
    assert counter.live == 0


def test_live_bytes_adds_up_what_is_alive_together():
    with LiveBytes() as counter:
        kept = [tensor_of_mib(1) for _ in range(4)]
        del kept[0]
        kept.append(tensor_of_mib(1))
    assert counter.peak == counter.live == 4 * MIB


def test_live_bytes_counts_views_and_in_place_results_once():
    before = tensor_of_mib(1)
    with LiveBytes() as counter:
        tensor = tensor_of_mib(2)
        views = [tensor.view(2, -1), tensor[1:], tensor.detach(), before[3:]]
        tensor.add_(1)
        before.mul_(2)
        torch._foreach_add_([tensor, before], 1)
        del tensor
        assert counter.live == 2 * MIB  # the views keep it alive
    assert len(views) == 4
    assert counter.peak == 2 * MIB


def test_live_bytes_sees_the_activations_that_autograd_keeps():
    weight = torch.randn(256, 256, requires_grad=True)
    size = weight.nbytes
    with LiveBytes() as counter:
        hidden = weight.exp().exp().exp()  # each result is saved for its own backward
        assert counter.live == 3 * size
        hidden.sum().backward()
        del hidden
        assert counter.live == size  # the gradient
    assert counter.peak >= 4 * size


def test_live_bytes_passes_over_sparse_tensors():
    indices = torch.tensor([[0, 1]])
    with LiveBytes() as counter:
        torch.sparse_coo_tensor(indices, torch.ones(2), (4,), check_invariants=False).coalesce()
    assert counter.peak < 1024


class Allocator(nn.Module):
    """A regression whose forward pass takes a known time and a known number of bytes."""

    def __init__(self, raises_at: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.calls = 0
        self.raises_at = raises_at

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        buffer = tensor_of_mib(4 if self.calls == 3 else 8)
        if self.calls == self.raises_at:
            raise ArithmeticError("in the middle of a step")
        del buffer
        time.sleep(0.2 if self.calls <= 3 else 0.01)
        return {"loss": (self.linear(x) - labels).square().mean()}


def trainer_with(meter: TrainerCallback, model: nn.Module, tmp_path, max_steps: int) -> Trainer:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 4
    return Trainer(model=model, args=args, train_dataset=data, callbacks=[meter])


def test_step_meter_times_the_later_steps_and_takes_the_memory_of_the_third(tmp_path):
    meter = StepMeter()
    trainer_with(meter, Allocator(), tmp_path, max_steps=8).train()
    assert 10 <= meter.step_ms < 150
    # 4 MiB is the third call's buffer; the rest of the step is a few hundred bytes
    assert 4 <= meter.peak_memory_mib < 4.01
    assert _get_current_dispatch_mode() is None


def test_step_meter_does_not_change_the_training(tmp_path):
    weights = []
    for meter in (StepMeter(), TrainerCallback()):
        torch.manual_seed(0)
        model = Allocator()
        trainer_with(meter, model, tmp_path, max_steps=4).train()
        weights.append(model.linear.weight.detach())
    assert torch.equal(*weights)


def test_step_meter_is_nan_when_too_few_steps_were_taken(tmp_path):
    meter = StepMeter()
    assert math.isnan(meter.step_ms)
    assert math.isnan(meter.peak_memory_mib)
    trainer_with(meter, Allocator(), tmp_path, max_steps=3).train()
    assert math.isnan(meter.step_ms)
    assert meter.peak_memory_mib >= 4


@pytest.mark.parametrize(
    ("settings", "max_steps", "step"),
    [
        ({}, 20, 3),
        ({"meta_delay_steps": 4}, 20, 7),
        ({"meta_delay_steps": 0.5}, 20, 13),
        ({"meta_every": 4}, 20, 9),
        ({"meta_delay_steps": 0.5, "meta_every": 2}, 20, 15),
    ],
)
def test_step_meter_takes_the_memory_of_the_third_step_that_holds_a_meta_step(tmp_path, settings, max_steps, step):
    args = MetaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    meter = StepMeter()
    meter.on_train_begin(args, TrainerState(max_steps=max_steps), TrainerControl())
    for number in range(1, step + 1):
        meter.on_step_begin(args, TrainerState(), TrainerControl())
        assert (_get_current_dispatch_mode() is not None) == (number == step)
        meter.on_step_end(args, TrainerState(), TrainerControl())
    resumed = TrainerState(max_steps=max_steps, global_step=step - 2)
    meter.on_train_begin(args, resumed, TrainerControl())
    assert meter._memory_step <= 3 + 2 * (args.meta_every - 1)


def test_step_meter_measures_the_last_training(tmp_path):
    meter = StepMeter()
    trainer_with(meter, Allocator(), tmp_path, max_steps=5).train()
    trainer_with(meter, Allocator(), tmp_path, max_steps=2).train()
    assert math.isnan(meter.step_ms)
    assert math.isnan(meter.peak_memory_mib)


def test_step_meter_as_a_context_manager_leaves_no_mode_behind_when_a_step_raises(tmp_path):
    with pytest.raises(ArithmeticError, match="middle of a step"), StepMeter() as meter:
        trainer_with(meter, Allocator(raises_at=3), tmp_path, max_steps=5).train()
    assert _get_current_dispatch_mode() is None


def test_step_meter_closes_the_mode_of_an_interrupted_training_in_the_next_one(tmp_path):
    meter = StepMeter()
    with pytest.raises(ArithmeticError, match="middle of a step"):
        trainer_with(meter, Allocator(raises_at=3), tmp_path, max_steps=5).train()
    trainer_with(meter, Allocator(), tmp_path, max_steps=5).train()
    assert _get_current_dispatch_mode() is None
    assert meter.step_ms >= 10


def test_step_meter_reads_the_allocator_on_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * MIB)
    args = SimpleNamespace(device=torch.device("cuda", 0))
    meter = StepMeter()
    for _ in range(4):
        meter.on_step_begin(args, TrainerState(), TrainerControl())
        assert _get_current_dispatch_mode() is None
        meter.on_step_end(args, TrainerState(), TrainerControl())
    assert calls == [*["synchronize"] * 5, "reset", *["synchronize"] * 3]
    assert meter.peak_memory_mib == 3
    assert meter.step_ms >= 0
