"""The training arguments of a run with a meta module."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from meta_trainer.hypergrad import NOISE_NAMES

ESTIMATORS = ("evograd", "t1t2", "finite_difference")


@dataclass
class MetaTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` and what a meta step needs besides.

    The fields of `TrainingArguments` set the base step. Those below set the meta step; every default of an estimator is
    the EvoGrad paper's.

    Raises:
        ValueError: If a setting is out of range, names nothing known or does not go with the others.
    """

    hypergradient: str = field(
        default="evograd", metadata={"help": f"Estimator of the hypergradient: one of {', '.join(ESTIMATORS)}."}
    )
    num_candidates: int = field(default=2, metadata={"help": "evograd: number K of perturbed candidates, at least 2."})
    sigma: float = field(default=1e-3, metadata={"help": "evograd: standard deviation of the perturbations."})
    temperature: float = field(
        default=0.05, metadata={"help": "evograd: temperature of the softmax over candidate losses."}
    )
    noise: str = field(
        default="sign",
        metadata={"help": f"evograd: distribution of the perturbations: one of {', '.join(NOISE_NAMES)}."},
    )
    perturb: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Scope of the inner step: 'all' trainable parameters, the 'head' (all outside the base model), or "
            "patterns of parameter names such as 'classifier.*'."
        },
    )
    meta_every: int = field(default=1, metadata={"help": "Optimizer steps per meta step."})
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the meta module."})
    meta_optim: str = field(
        default="adamw_torch", metadata={"help": "Optimizer of the meta module, by a name that `optim` takes."}
    )
    meta_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the meta module."})
    meta_lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "Schedule of the meta learning rate, by a name that `lr_scheduler_type` takes."},
    )
    meta_warmup_steps: float = field(
        default=0,
        metadata={"help": "Meta steps of linear warm-up; a share of all meta steps when below 1."},
    )
    meta_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Norm to which the hypergradient is clipped; 0 for no clipping."}
    )
    per_device_meta_batch_size: int = field(default=8, metadata={"help": "Size of a meta batch on each device."})

    def __post_init__(self) -> None:
        """Check the meta settings, then those of `TrainingArguments`."""
        if isinstance(self.perturb, str):
            self.perturb = [self.perturb]
        self._check_names()
        self._check_ranges()
        super().__post_init__()

    def _check_names(self) -> None:
        for name, value, known in (
            ("hypergradient", self.hypergradient, ESTIMATORS),
            ("noise", self.noise, NOISE_NAMES),
            ("meta_optim", self.meta_optim, tuple(str(o.value) for o in OptimizerNames)),
            ("meta_lr_scheduler_type", self.meta_lr_scheduler_type, tuple(str(s.value) for s in SchedulerType)),
        ):
            if str(value) not in known:
                raise ValueError(f"`{name}` should be one of {', '.join(known)}, got {value!r}.")
        if not self.perturb or not all(self.perturb):
            raise ValueError("`perturb` should be 'all', 'head' or a list of name patterns, got an empty one.")
        if len(self.perturb) > 1 and {"all", "head"} & set(self.perturb):
            raise ValueError(f"`perturb` should be 'all' or 'head' alone, or name patterns, got both: {self.perturb}.")

    def _check_ranges(self) -> None:
        if self.num_candidates < 2:
            raise ValueError(
                f"`num_candidates` should be at least 2, got {self.num_candidates}: a single "
                "candidate has weight 1 whatever its loss, so that the meta module would learn nothing."
            )
        for name in ("sigma", "temperature", "meta_every", "per_device_meta_batch_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` should be a positive number, got {getattr(self, name)}.")
        for name in ("meta_learning_rate", "meta_weight_decay", "meta_warmup_steps", "meta_max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` should be zero or a positive number, got {getattr(self, name)}.")
        if self.hypergradient != "evograd" and not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                f"`learning_rate` should be a positive number with hypergradient={self.hypergradient!r}, got "
                f"{self.learning_rate}: it is the length of the inner step. Choose a positive one, or 'evograd', "
                "which does without."
            )

    def check_activation_checkpointing(self) -> None:
        """Raise a ValueError for reentrant checkpointing, which a meta step does not go with."""
        # Older releases of transformers have the second name only.
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            settings = getattr(self, f"{name}_kwargs", None)
            if getattr(self, name, False) and isinstance(settings, dict) and settings.get("use_reentrant"):
                raise ValueError(
                    f"`{name}_kwargs` should have use_reentrant=False, got {settings['use_reentrant']!r}: a meta step "
                    "takes gradients with `torch.autograd.grad`, which reentrant checkpointing does not support."
                )

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments, **settings: Any) -> MetaTrainingArguments:
        """Give plain `TrainingArguments` the meta settings, at their defaults where `settings` has no other.

        Raises:
            ValueError: If `args` are of a subclass with fields of its own.
        """
        plain = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        unknown = sorted(plain.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"{type(args).__name__} has the fields {unknown}, which {cls.__name__} has not. "
                f"Derive your arguments from both: class Arguments({cls.__name__}, {type(args).__name__})."
            )
        return cls(**{**plain, **settings})
