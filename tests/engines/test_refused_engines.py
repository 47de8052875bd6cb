"""Engines that a meta step does not run on are refused at construction."""

import pytest
from tiny import HiddenShift, arguments, meta_trainer, tiny_bert, weight_net
from transformers import Trainer, TrainingArguments

from meta_trainer import MetaTrainer, engines
from meta_trainer.engines import refuse_engines

REFUSED = r"A meta step does not run under {}\. Start one process per device with `accelerate launch`"


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        ("get_tp_size", "tensor parallelism"),
        ("get_cp_size", "context parallelism"),
        ("get_sp_size", "sequence parallelism"),
    ],
)
def test_splitting_the_tensors_is_refused(tmp_path, monkeypatch, method, engine):
    monkeypatch.setattr(Trainer, method, lambda self: 2)
    with pytest.raises(NotImplementedError, match=REFUSED.format(engine)):
        meta_trainer(tmp_path)


def test_a_model_on_several_devices_is_refused(tmp_path):
    model = tiny_bert()
    model.hf_device_map = {"bert": "cuda:0", "classifier": "cuda:1"}
    with pytest.raises(NotImplementedError, match=REFUSED.format("a `device_map` over several devices")):
        meta_trainer(tmp_path, model=model)


def test_a_model_that_was_sharded_while_loading_is_refused(tmp_path):
    trainer = meta_trainer(tmp_path)
    trainer.is_distributed_loading_by_transformers = True
    with pytest.raises(NotImplementedError, match=REFUSED.format("sharding by `from_pretrained`")):
        refuse_engines(trainer)


def test_data_parallelism_within_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match=REFUSED.format(r"torch\.nn\.DataParallel")):
        meta_trainer(tmp_path)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("is_sagemaker_mp_enabled", "SageMaker's model parallelism"),
        ("is_sagemaker_dp_enabled", "SageMaker's data parallelism"),
    ],
)
def test_sagemaker_is_refused(tmp_path, monkeypatch, name, engine):
    monkeypatch.setattr(engines, name, lambda: True)
    with pytest.raises(NotImplementedError, match=REFUSED.format(engine)):
        meta_trainer(tmp_path)


def test_fsdp_of_torch_xla_is_refused(tmp_path):
    trainer = meta_trainer(tmp_path)
    trainer.is_fsdp_xla_enabled = True
    with pytest.raises(NotImplementedError, match=REFUSED.format("FSDP of torch_xla")):
        refuse_engines(trainer)


def test_without_a_meta_module_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_tp_size", lambda self: 2)
    MetaTrainer(tiny_bert(), arguments(tmp_path, TrainingArguments, optim="lomo"))


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_optimizers_that_step_within_the_backward_pass_are_refused(tmp_path, optim):
    with pytest.raises(NotImplementedError, match=f"optim='{optim}' moves the parameters within every backward pass"):
        meta_trainer(tmp_path, optim=optim)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw", "apollo_adamw_layerwise"])
def test_a_meta_optimizer_that_depends_on_a_model_is_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"`meta_optim` should be an optimizer that does not depend .*got '{optim}'"):
        arguments(tmp_path, meta_optim=optim)


def test_liger_kernels_are_refused_where_second_derivatives_or_logits_are_needed(tmp_path):
    with pytest.raises(NotImplementedError, match="second derivatives, which Liger kernels do not have"):
        meta_trainer(tmp_path, HiddenShift(), use_liger_kernel=True, hypergradient="t1t2")
    with pytest.raises(ValueError, match=r"MetaWeightNet weighs examples.*'fused_linear_cross_entropy': False"):
        meta_trainer(tmp_path, weight_net(), use_liger_kernel=True)
    meta_trainer(tmp_path, HiddenShift(), use_liger_kernel=True)
    unfused = {"fused_linear_cross_entropy": False}
    meta_trainer(tmp_path, weight_net(), use_liger_kernel=True, liger_kernel_config=unfused)


@pytest.mark.parametrize("settings", [{"fp16": True}, {"bf16": True}, {}])
def test_half_precision_without_effect_is_warned_about(tmp_path, monkeypatch, settings):
    heard = []
    monkeypatch.setattr(engines.logger, "warning", heard.append)
    meta_trainer(tmp_path, **settings)
    assert ["fp16=True has no effect on the CPU" in message for message in heard] == [True] * ("fp16" in settings)
