"""What the engines' checkpoints look like."""

from __future__ import annotations

from pathlib import Path

PATTERNS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
"""Names under which Trainer, FSDP with a full and with a sharded state, and DeepSpeed keep the optimizer's state."""


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds the state of the base optimizer, by whichever engine it was written."""
    return any(any(checkpoint.glob(pattern)) for pattern in PATTERNS)
