"""What a meta step runs on: engines, attention and kernels that it does not go with are refused before training."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.utils import DynamoBackend, has_compiled_regions, is_compiled_module
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils import is_sagemaker_dp_enabled, is_sagemaker_mp_enabled, logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.modules import MetaModule
from meta_trainer.sharding import check_engine_settings

logger = logging.get_logger(__name__)

STEPS_WITHIN_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
"""Optimizers whose gradient hooks move the parameters during any backward pass, also that of a meta step."""


def check_engine(trainer: Trainer, model: nn.Module, args: MetaTrainingArguments, meta_module: MetaModule) -> None:
    """Raise an error if a meta step does not run on what the trainer runs on.

    Args:
        trainer: Already set up.
        model: The base model.
        args: Its settings.
        meta_module: What is to be learned.

    Raises:
        NotImplementedError: If an engine, attention or kernel is one that meta steps do not run on.
        ValueError: If settings do not go together.
    """
    refuse_engines(trainer)
    check_engine_settings(trainer, model, args, meta_module)
    args.check_activation_checkpointing()
    _check_reentrant(model)
    if args.optim in STEPS_WITHIN_BACKWARD:
        name = OptimizerNames(args.optim).value
        raise NotImplementedError(
            f"optim={name!r} moves the parameters within every backward pass, also in that of a meta step, which has "
            "to leave them where they are. Choose another optimizer."
        )
    if args.hypergradient == "t1t2":
        _check_second_derivatives(model, args)
    if meta_module.has_loss_door:
        _check_logits(args, meta_module)
    if meta_module.has_forward_door and is_compiled(trainer, model):
        raise NotImplementedError(
            f"{type(meta_module).__name__} works by hooks, but a compiled model keeps those of its first forward pass, "
            "or none. Leave out `torch_compile`."
        )
    if args.fp16 and args.device.type == "cpu":
        logger.warning("fp16=True has no effect on the CPU: everything runs in float32. Choose bf16=True instead.")


def refuse_engines(trainer: Trainer) -> None:
    """Raise a NotImplementedError if the model is split, replicated or placed by other means than one process each."""
    for used, engine in _refused(trainer):
        if used:
            raise NotImplementedError(
                f"A meta step does not run under {engine}. Start one process per device with `accelerate launch`."
            )


def _refused(trainer: Trainer) -> Iterator[tuple[bool, str]]:
    yield trainer.args.n_gpu > 1, "torch.nn.DataParallel"
    yield bool(trainer.is_fsdp_xla_enabled), "FSDP of torch_xla"
    yield trainer.args.device.type == "xla", "torch_xla"
    yield is_sagemaker_mp_enabled(), "SageMaker's model parallelism"
    yield is_sagemaker_dp_enabled(), "SageMaker's data parallelism"
    yield trainer.is_model_parallel, "a `device_map` over several devices"
    yield trainer.get_tp_size() > 1, "tensor parallelism"
    yield trainer.get_cp_size() > 1, "context parallelism"
    yield trainer.get_sp_size() > 1, "sequence parallelism"
    # Older releases of transformers do not know it.
    yield getattr(trainer, "is_distributed_loading_by_transformers", False), "sharding by `from_pretrained`"


def is_compiled(trainer: Trainer, model: nn.Module) -> bool:
    """Whether the model runs compiled in the base step: by the settings, the environment, or from the beginning."""
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return True
    return is_compiled_module(model) or has_compiled_regions(model) or _is_compiled_inside(model)


def _is_compiled_inside(model: nn.Module) -> bool:
    """Whether a part of it was compiled in place, by its method `compile`, which no unwrapping takes off."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def _check_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and settings.get("use_reentrant"):
            raise ValueError(
                "Activation checkpointing of the model should have use_reentrant=False, got True: a meta step takes "
                "gradients with `torch.autograd.grad`, which reentrant checkpointing does not support."
            )


def _check_second_derivatives(model: nn.Module, args: MetaTrainingArguments) -> None:
    for name in _attention_implementations(model):
        # From the Hub, as 'owner/kernel', come kernels with a first derivative of their own.
        if any(mark in name for mark in ("flash", "flex", "/")):
            raise NotImplementedError(
                f"hypergradient='t1t2' needs second derivatives, which attn_implementation={name!r} does not have. "
                "Load the model with attn_implementation='sdpa' or 'eager', or choose another estimator."
            )
    if args.use_liger_kernel:
        raise NotImplementedError(
            "hypergradient='t1t2' needs second derivatives, which Liger kernels do not have. Leave out "
            "`use_liger_kernel`, or choose another estimator."
        )
    if _is_compiled_inside(model):
        raise NotImplementedError(
            "hypergradient='t1t2' needs second derivatives, which a compiled model does not have. Compile by "
            "torch_compile=True, which a meta step takes off, or choose another estimator."
        )


def _attention_implementations(model: nn.Module) -> list[str]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = {getattr(config, "_attn_implementation", None) for config in configs}
    return sorted(str(name) for name in names if name is not None)


def _check_logits(args: MetaTrainingArguments, meta_module: MetaModule) -> None:
    config = args.liger_kernel_config or {}
    if args.use_liger_kernel and config.get("fused_linear_cross_entropy", True):
        raise ValueError(
            f"{type(meta_module).__name__} weighs examples, but Liger's fused loss gives their average only and no "
            "logits. Pass liger_kernel_config={'fused_linear_cross_entropy': False}."
        )
