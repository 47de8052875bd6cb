"""Settings that meta steps do not run with under an engine are refused before training."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import HiddenShift, PointClassifier, arguments, weight_net
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from meta_trainer import LearnedWeightDecay
from meta_trainer.sharding import check_engine_settings


def trainer_under(fsdp: Any = None, deepspeed: Any = None, precision: str = "no", replicas: int = 1) -> Any:
    """What is looked at of a trainer."""
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    accelerator = SimpleNamespace(
        state=state, mixed_precision=precision, parallelism_config=SimpleNamespace(dp_replicate_size=replicas)
    )
    return SimpleNamespace(
        accelerator=accelerator, is_fsdp_enabled=fsdp is not None, is_deepspeed_enabled=deepspeed is not None
    )


def fsdp(version: int = 2, offload: Any = None) -> Any:
    return SimpleNamespace(fsdp_version=version, cpu_offload=offload or OffloadPolicy())


def zero(stage: int, config: dict[str, Any] | None = None, **zero_settings: Any) -> Any:
    settings = {"zero_optimization": {"stage": stage, **zero_settings}, **(config or {})}
    return SimpleNamespace(zero_stage=stage, deepspeed_config=settings)


def check(trainer: Any, folder: Any, module: Any = None, model: Any = None, **settings: Any) -> None:
    args = arguments(folder, **settings)
    check_engine_settings(trainer, model or PointClassifier(), args, module or HiddenShift())


GOES = [
    pytest.param(trainer_under(), {"hypergradient": "t1t2", "inner_step": "optimizer"}, id="ddp"),
    pytest.param(trainer_under(fsdp=fsdp()), {"gradient_accumulation_steps": 2}, id="fsdp2"),
    pytest.param(trainer_under(fsdp=fsdp()), {"noise": "guided"}, id="fsdp2-guided"),
    pytest.param(trainer_under(deepspeed=zero(1)), {"hypergradient": "t1t2"}, id="zero1"),
    pytest.param(trainer_under(deepspeed=zero(2)), {"share_candidates": True}, id="zero2"),
    pytest.param(trainer_under(deepspeed=zero(3)), {"hypergradient": "finite_difference"}, id="zero3"),
    pytest.param(
        trainer_under(deepspeed=zero(3, zero_hpz_partition_size=1, mics_shard_size=-1)), {"orthogonal": True}, id="off"
    ),
    pytest.param(trainer_under(deepspeed=zero(3, offload_param={"device": "none"})), {}, id="no-offload"),
]


@pytest.mark.parametrize(("trainer", "settings"), GOES)
def test_what_an_engine_supports_is_let_through(tmp_path, trainer, settings):
    check(trainer, tmp_path, **settings)


REFUSED = [
    (trainer_under(fsdp=fsdp(version=1)), {}, r"under FSDP with version 1 of it\. Set `fsdp_version: 2`"),
    (trainer_under(fsdp=fsdp(offload=CPUOffloadPolicy())), {}, "under FSDP with parameters on the CPU"),
    (trainer_under(fsdp=fsdp(), precision="bf16"), {}, "under FSDP with bf16, in which it also rounds the loss"),
    (trainer_under(fsdp=fsdp(), replicas=2), {}, "under FSDP with replicated shards"),
    (trainer_under(fsdp=fsdp()), {"hypergradient": "t1t2"}, "under FSDP with hypergradient='t1t2'"),
    (trainer_under(fsdp=fsdp()), {"noise": "optimizer"}, "under FSDP with inner_step='optimizer' or noise="),
    (
        trainer_under(fsdp=fsdp()),
        {"inner_step": "normalized", "noise": "guided"},
        "under FSDP with inner_step='normalized', which reads the gradient of whole parameters",
    ),
    (trainer_under(fsdp=fsdp()), {"share_candidates": True}, "under FSDP with `share_candidates`"),
    (trainer_under(deepspeed=zero(3)), {"hypergradient": "t1t2"}, "under DeepSpeed ZeRO-3 with hypergradient='t1t2'"),
    (trainer_under(fsdp=fsdp()), {"torch_compile": True}, "under FSDP with `torch_compile`"),
    (trainer_under(deepspeed=zero(3)), {"share_candidates": True}, "under DeepSpeed ZeRO-3 with `share_candidates`"),
    (
        trainer_under(deepspeed=zero(1)),
        {"inner_step": "optimizer", "noise": "guided"},
        "under DeepSpeed ZeRO-1 with inner_step='optimizer'",
    ),
    (trainer_under(deepspeed=zero(2, {"fp16": {"enabled": True}})), {}, "DeepSpeed ZeRO-2 with float16 parameters"),
    (trainer_under(deepspeed=zero(3, offload_param={"device": "nvme"})), {}, "with parameters on NVMe"),
    (trainer_under(deepspeed=zero(3, zero_hpz_partition_size=2)), {}, "with secondary shards"),
    (trainer_under(deepspeed=zero(3, zero_quantized_weights=True)), {}, "with quantised weights"),
    (trainer_under(deepspeed=zero(3, mics_shard_size=2)), {}, "with MiCS"),
    (trainer_under(deepspeed=zero(3, zenflow={"topk_ratio": 0.1})), {}, "with ZenFlow"),
    (trainer_under(deepspeed=zero(3, leaf_module={"classes": ["Experts"]})), {}, "with leaf modules"),
]


@pytest.mark.parametrize(("trainer", "settings", "message"), REFUSED)
def test_what_an_engine_does_not_support_is_refused(tmp_path, trainer, settings, message):
    with pytest.raises(NotImplementedError, match=message):
        check(trainer, tmp_path, **settings)


def test_leaf_modules_of_the_model_itself_are_refused(tmp_path):
    model = PointClassifier()
    model.body._z3_leaf = True
    with pytest.raises(NotImplementedError, match="with leaf modules"):
        check(trainer_under(deepspeed=zero(3)), tmp_path, model=model)


@pytest.mark.parametrize(
    ("trainer", "refused"),
    [
        (trainer_under(fsdp=fsdp()), True),
        (trainer_under(deepspeed=zero(3)), True),
        (trainer_under(deepspeed=zero(2)), False),
        (trainer_under(), False),
    ],
)
def test_a_loss_door_that_reads_the_model_needs_whole_parameters(tmp_path, trainer, refused):
    with (
        pytest.raises(NotImplementedError, match="with LearnedWeightDecay, which reads whole parameters")
        if refused
        else nullcontext()
    ):
        check(trainer, tmp_path, LearnedWeightDecay())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_normalizer_needs_gradients_that_deepspeed_keeps_to_itself(tmp_path, stage):
    trainer = trainer_under(deepspeed=zero(stage))
    check(trainer, tmp_path, weight_net())
    with pytest.raises(NotImplementedError, match="with gradient accumulation and MetaWeightNet, whose normalizer"):
        check(trainer, tmp_path, weight_net(), gradient_accumulation_steps=2)


def test_bfloat16_under_deepspeed_is_warned_about(tmp_path, caplog):
    check(trainer_under(deepspeed=zero(2, {"bf16": {"enabled": True}})), tmp_path)
    assert "DeepSpeed keeps bfloat16 parameters" in caplog.text


def test_fsdp_that_was_asked_for_in_vain_is_warned_about(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check(trainer_under(), tmp_path)
    assert "FSDP was asked for, but accelerate does not use it on this device" in caplog.text
