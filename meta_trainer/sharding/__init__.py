"""Engines that spread the parameters over the processes: FSDP2 and ZeRO-3, as the meta step sees them."""

from meta_trainer.sharding.checkpoints import holds_optimizer
from meta_trainer.sharding.engine import ShardingEngine, local_part, recovering
from meta_trainer.sharding.finding import find_engine
from meta_trainer.sharding.refusals import check_engine_settings

__all__ = ["ShardingEngine", "check_engine_settings", "find_engine", "holds_optimizer", "local_part", "recovering"]
