"""What meta steps do not do under DeepSpeed and FSDP: refused before training starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.modules import MetaModule

logger = logging.get_logger(__name__)


def check_engine_settings(
    trainer: Trainer, model: nn.Module, args: MetaTrainingArguments, meta_module: MetaModule
) -> None:
    """Raise a NotImplementedError for settings that do not go with the engine a trainer runs on.

    Args:
        trainer: Already set up.
        model: The base model.
        args: Its settings.
        meta_module: What is to be learned.
    """
    reasons: Iterator[tuple[bool, str]] = iter(())
    engine = ""
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        engine, reasons = f"DeepSpeed ZeRO-{plugin.zero_stage}", _under_deepspeed(plugin, model, args, meta_module)
    elif trainer.is_fsdp_enabled:
        engine, reasons = "FSDP", _under_fsdp(trainer, args, meta_module)
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        logger.warning("FSDP was asked for, but accelerate does not use it on this device: every process has a copy.")
    for found, reason in reasons:
        if found:
            raise NotImplementedError(f"A meta step does not run under {engine} with {reason}")


def _under_deepspeed(
    plugin: Any, model: nn.Module, args: MetaTrainingArguments, meta_module: MetaModule
) -> Iterator[tuple[bool, str]]:
    config = plugin.deepspeed_config
    yield from _of_the_optimizer(args)
    yield (
        args.fp16 or _is_enabled(config.get("fp16")),
        "float16 parameters, which round perturbations away. Choose bf16, or train in float32.",
    )
    yield (
        args.gradient_accumulation_steps > 1 and meta_module.has_loss_door and meta_module.has_normalizer,
        f"gradient accumulation and {type(meta_module).__name__}, whose normalizer is not known before the last "
        "micro-batch, while DeepSpeed owns the gradients. Choose larger batches, DDP or FSDP2.",
    )
    if plugin.zero_stage == 3:
        yield from _of_shards(args, meta_module)
        yield from _under_zero3(config.get("zero_optimization", {}), model)
    if args.bf16 or _is_enabled(config.get("bf16")):
        logger.warning(
            "DeepSpeed keeps bfloat16 parameters, and most models compute their loss in the same precision, which "
            "does not tell candidates of short perturbations apart. Choose a large `sigma`, or train in float32."
        )


def _under_zero3(zero: dict[str, Any], model: nn.Module) -> Iterator[tuple[bool, str]]:
    offload = zero.get("offload_param") or {}
    yield offload.get("device") == "nvme", "parameters on NVMe. Offload them to the CPU, or not at all."
    yield (zero.get("zero_hpz_partition_size") or 1) > 1, "secondary shards. Leave out `zero_hpz_partition_size`."
    quantised = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
    yield any(zero.get(name) for name in quantised), f"quantised weights. Leave out {' and '.join(quantised)}."
    yield (zero.get("mics_shard_size") or -1) > 0, "MiCS. Leave out `mics_shard_size`."
    yield bool(zero.get("zenflow")), "ZenFlow. Leave out `zenflow`."
    leaves = bool(zero.get("leaf_module")) or any(getattr(module, "_z3_leaf", False) for module in model.modules())
    yield leaves, "leaf modules, whose parameters are gathered at once."


def _under_fsdp(trainer: Trainer, args: MetaTrainingArguments, meta_module: MetaModule) -> Iterator[tuple[bool, str]]:
    plugin = trainer.accelerator.state.fsdp_plugin
    yield plugin.fsdp_version != 2, "version 1 of it. Set `fsdp_version: 2`."
    yield _offloads(plugin.cpu_offload), "parameters on the CPU. Set `fsdp_offload_params: false`."
    mesh = getattr(trainer.accelerator, "parallelism_config", None)
    yield getattr(mesh, "dp_replicate_size", 1) > 1, "replicated shards. Leave out `dp_replicate_size`."
    yield (
        str(trainer.accelerator.mixed_precision) != "no",
        f"{trainer.accelerator.mixed_precision}, in which it also rounds the loss, so that candidates cannot be told "
        "apart. Train in float32 (on recent devices with tf32=True), or choose DDP.",
    )
    yield from _of_the_optimizer(args)
    yield from _of_shards(args, meta_module)


def _of_the_optimizer(args: MetaTrainingArguments) -> Iterator[tuple[bool, str]]:
    yield (
        args.follows_optimizer,
        "inner_step='optimizer' or noise='optimizer', as the engine spreads the optimizer's states. Choose "
        "inner_step='sgd' and another noise.",
    )


def _of_shards(args: MetaTrainingArguments, meta_module: MetaModule) -> Iterator[tuple[bool, str]]:
    yield (
        args.hypergradient == "t1t2",
        "hypergradient='t1t2', which differentiates twice through whole parameters. Choose 'evograd' or "
        "'finite_difference'.",
    )
    yield (
        args.inner_step == "normalized",
        "inner_step='normalized', which reads the gradient of whole parameters. Choose 'sgd' or 'optimizer'.",
    )
    yield (
        args.share_candidates,
        "`share_candidates`, as all processes evaluate every candidate together. Leave it out.",
    )
    yield (
        meta_module.reads_base_model,
        f"{type(meta_module).__name__}, which reads whole parameters after the forward pass. Choose DDP or ZeRO-2.",
    )
    yield args.torch_compile, "`torch_compile`, whose graphs keep gathered parameters. Leave it out."


def _offloads(policy: Any) -> bool:
    return bool(policy) if isinstance(policy, bool) else "CPU" in type(policy).__name__


def _is_enabled(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled") is True
