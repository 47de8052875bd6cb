"""The training arguments of a run with a meta module."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from meta_trainer.hypergrad import AUTO, DEFAULT_SIGMA, NOISE_NAMES, Layout, check_evograd_settings
from meta_trainer.hypergrad.checks import is_integer, is_not_negative, is_positive

ESTIMATORS = ("evograd", "t1t2", "finite_difference")
INNER_STEPS = ("sgd", "optimizer", "normalized")
MODEL_OPTIMIZERS = ("lomo", "adalomo", "galore", "apollo")
SCHEDULES_OF_A_METRIC = ("reduce_lr_on_plateau", "greedy")
SCHEDULES_WITH_SETTINGS = ("warmup_stable_decay", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
GUARDS = ("none", "ascent", "change")
LARGEST_SEED = 2**32 - 1  # numpy's
LARGEST_RATE = 3e37  # Adam divides it by 0.1 at first, and single precision ends at 3.4e38


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
    sigma: float | None = field(
        default=None,
        metadata={
            "help": "evograd: standard deviation of the perturbations, their length for noise=guided; none: 1e-3, and "
            "for noise=guided what changes the meta loss by a thousandth, or 1e-2 with bf16 or fp16."
        },
    )
    # HfArgumentParser takes the second of three types.
    temperature: float | str | None = field(
        default=0.05,
        metadata={
            "help": "evograd: temperature of the softmax over candidate losses; 'auto': their standard deviation."
        },
    )
    noise: str = field(
        default="sign",
        metadata={"help": f"evograd: kind of perturbations: one of {', '.join(NOISE_NAMES)}."},
    )
    antithetic: bool = field(
        default=False, metadata={"help": "evograd: candidates come in pairs of opposite perturbations."}
    )
    orthogonal: bool = field(
        default=False, metadata={"help": "evograd: perturbations of different directions have no component in common."}
    )
    include_unperturbed: bool = field(
        default=False, metadata={"help": "evograd: the first candidate is the model itself."}
    )
    relative_sigma: bool = field(
        default=False, metadata={"help": "evograd: sigma is in units of each parameter tensor's root mean square."}
    )
    guidance: float = field(
        default=1.0,
        metadata={"help": "evograd, noise=guided: share of the variance along the validation gradient, above 0."},
    )
    inner_step: str = field(
        default="sgd",
        metadata={
            "help": "The step that the hypergradient looks through: 'sgd', plain gradient descent; 'optimizer', the "
            "base optimizer's own next step (SGD, Adam, AdamW); or 'normalized', a step of given length, which does "
            "not reward harder training, for one more pass of the train batch. The last one needs guided noise, finite "
            "differences or T1-T2."
        },
    )
    share_candidates: bool = field(
        default=False,
        metadata={
            "help": "Several processes deal the candidates out among themselves and evaluate them on the train batch "
            "of the first process, instead of all candidates on a batch of their own each."
        },
    )
    perturb: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Scope of the inner step: 'all' trainable parameters, the 'head' (all outside the base model), or "
            "patterns of parameter names such as 'classifier.*'."
        },
    )
    meta_every: int = field(default=1, metadata={"help": "Optimizer steps per meta step."})
    meta_delay_steps: float = field(
        default=0,
        metadata={
            "help": "Optimizer steps before the first meta step, a share of all when below 1: what a model gets wrong "
            "says little of its examples before it has learned something, and no meta step costs nothing."
        },
    )
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the meta module."})
    meta_optim: str = field(
        default="adamw_torch", metadata={"help": "Optimizer of the meta module, by a name that `optim` takes."}
    )
    meta_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the meta module."})
    meta_adam_epsilon: float = field(
        default=1e-8,
        metadata={"help": "Epsilon of an Adam as meta optimizer; hypergradients are far smaller than gradients."},
    )
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
    meta_guard: str | None = field(
        default=None,
        metadata={
            "help": "What to take out of the hypergradient, as a single inner step rewards it and training does not: "
            "'ascent', what raises the training objective, the default with noise=guided but for "
            "inner_step=normalized; 'change', what raises or lowers it; 'none', the default otherwise."
        },
    )
    meta_trust_region: float = field(
        default=0.0,
        metadata={
            "help": "Largest relative change of the training objective by one update of the meta module, to first "
            "order; longer steps are shortened. 0 for no limit."
        },
    )
    meta_max_skipped: int = field(
        default=20,
        metadata={
            "help": "Number of meta steps in a row that are skipped, as they lead to no finite numbers, before the run "
            "stops with an error; 0 for no limit. Loss scaling in fp16 skips some of the first steps by design."
        },
    )
    per_device_meta_batch_size: int = field(default=8, metadata={"help": "Size of a meta batch on each device."})

    def __post_init__(self) -> None:
        """Check the meta settings, then those of `TrainingArguments`."""
        if isinstance(self.perturb, str):
            self.perturb = [self.perturb]
        self._choose_defaults()
        self.check_meta_settings()
        super().__post_init__()

    def check_meta_settings(self) -> None:
        """Raise a ValueError if a meta setting is out of range, or does not go with the others."""
        if isinstance(self.temperature, str) and self.temperature != AUTO:
            self.temperature = _number("temperature", self.temperature)
        self._check_names()
        self._check_ranges()
        self._check_trainer_settings()

    def _choose_defaults(self) -> None:
        guided = self.hypergradient == "evograd" and self.noise == "guided"
        if self.sigma is None and self.noise != "guided":
            self.sigma = DEFAULT_SIGMA
        # Steps along precise hypergradients add up, also those that only a single inner step is better for. One of
        # given length has no such reward.
        if self.meta_guard is None:
            self.meta_guard = "ascent" if guided and self.inner_step != "normalized" else "none"

    def _check_names(self) -> None:
        for name, value, known in (
            ("hypergradient", self.hypergradient, ESTIMATORS),
            ("noise", self.noise, NOISE_NAMES),
            ("inner_step", self.inner_step, INNER_STEPS),
            ("meta_guard", self.meta_guard, GUARDS),
            ("meta_optim", self.meta_optim, tuple(str(o.value) for o in OptimizerNames)),
            ("meta_lr_scheduler_type", self.meta_lr_scheduler_type, tuple(str(s.value) for s in SchedulerType)),
        ):
            if str(value) not in known:
                raise ValueError(f"`{name}` should be one of {', '.join(known)}, got {value!r}.")
        # An enum of text prints as its name.
        schedule = SchedulerType(self.meta_lr_scheduler_type).value
        if schedule in SCHEDULES_OF_A_METRIC + SCHEDULES_WITH_SETTINGS:
            needed = "a metric to follow" if schedule in SCHEDULES_OF_A_METRIC else "settings of its own"
            raise ValueError(
                f"`meta_lr_scheduler_type` should be a schedule of the step alone, got {schedule!r}, which needs "
                f"{needed}. The default is 'constant'."
            )
        if any(str(self.meta_optim).startswith(kind) for kind in MODEL_OPTIMIZERS):
            raise ValueError(
                f"`meta_optim` should be an optimizer that does not depend on a model, got {self.meta_optim!r}. The "
                "default is 'adamw_torch'."
            )
        if not isinstance(self.perturb, list | tuple) or not all(isinstance(p, str) for p in self.perturb):
            raise ValueError(f"`perturb` should be 'all', 'head' or a list of name patterns, got {self.perturb!r}.")
        if not self.perturb or not all(self.perturb):
            raise ValueError("`perturb` should be 'all', 'head' or a list of name patterns, got an empty one.")
        if len(self.perturb) > 1 and {"all", "head"} & set(self.perturb):
            raise ValueError(f"`perturb` should be 'all' or 'head' alone, or name patterns, got both: {self.perturb}.")

    def _check_ranges(self) -> None:
        layout = Layout(self.antithetic, self.orthogonal, self.include_unperturbed)
        check_evograd_settings(
            self.num_candidates, self.sigma, self.temperature, self.noise, layout, self.guidance, self.relative_sigma
        )
        for name in ("meta_every", "per_device_meta_batch_size"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` should be a positive, whole number, got {getattr(self, name)!r}.")
        if not is_positive(self.meta_adam_epsilon):
            raise ValueError(f"`meta_adam_epsilon` should be a positive number, got {self.meta_adam_epsilon!r}.")
        for name in (
            "meta_delay_steps", "meta_learning_rate", "meta_weight_decay", "meta_warmup_steps", "meta_max_grad_norm",
            "meta_trust_region", "meta_max_skipped",
        ):  # fmt: skip
            if not is_not_negative(getattr(self, name)):
                raise ValueError(f"`{name}` should be zero or a positive number, got {getattr(self, name)!r}.")
        if self.meta_learning_rate > LARGEST_RATE:
            raise ValueError(
                f"`meta_learning_rate` should be at most {LARGEST_RATE:g}, got {self.meta_learning_rate!r}."
            )
        if not is_integer(self.meta_max_skipped):
            raise ValueError(f"`meta_max_skipped` should be a whole number, got {self.meta_max_skipped!r}.")
        if not is_integer(self.seed) or not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"`seed` should be a whole number from 0 to {LARGEST_SEED}, got {self.seed!r}.")
        if self.scales_hypergradient and not is_positive(self.learning_rate):
            raise ValueError(
                f"`learning_rate` should be a positive number with hypergradient={self.hypergradient!r}, "
                f"noise={self.noise!r} and temperature={self.temperature!r}, got {self.learning_rate!r}: it is "
                "the length of the inner step. Choose a positive one, or 'evograd' with blind noise and a temperature "
                "in numbers, which does without."
            )
        if self.hypergradient == "evograd" and self.inner_step == "optimizer" and self.noise in ("sign", "normal"):
            raise ValueError(
                f"inner_step='optimizer' needs noise='optimizer' or 'guided' with hypergradient='evograd', got "
                f"{self.noise!r}."
            )
        if self.hypergradient == "evograd" and self.inner_step == "normalized" and self.noise != "guided":
            raise ValueError(
                f"inner_step='normalized' needs noise='guided' with hypergradient='evograd', got {self.noise!r}."
            )
        if self.inner_step == "normalized" and self.temperature == AUTO:
            raise ValueError(
                "inner_step='normalized' looks along directions in which the training loss does not change to first "
                "order, so that there is no spread of losses for temperature='auto' to follow. Give a number."
            )
        if not isinstance(self.share_candidates, bool):
            raise ValueError(f"`share_candidates` should be True or False, got {self.share_candidates!r}.")
        if self.share_candidates and self.hypergradient == "t1t2":
            raise ValueError("`share_candidates` needs candidates, of which hypergradient='t1t2' has none.")
        if (self.follows_optimizer or self.inner_step == "normalized") and (self.relative_sigma or self.guidance < 1):
            raise ValueError(
                f"`relative_sigma` and `guidance` do not go with inner_step={self.inner_step!r}, which has a scale of "
                "its own."
            )

    def _check_trainer_settings(self) -> None:
        """Those that a meta step computes with and Trainer takes as they come."""
        if self.data_seed is not None and (not is_integer(self.data_seed) or not 0 <= self.data_seed <= LARGEST_SEED):
            raise ValueError(f"`data_seed` should be a whole number from 0 to {LARGEST_SEED}, got {self.data_seed!r}.")
        if not is_not_negative(self.learning_rate):
            raise ValueError(f"`learning_rate` should be zero or a positive number, got {self.learning_rate!r}.")
        if not is_not_negative(self.label_smoothing_factor) or self.label_smoothing_factor > 1:
            raise ValueError(
                f"`label_smoothing_factor` should be a number from 0 to 1, got {self.label_smoothing_factor!r}."
            )
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` should be a positive, whole number, got {getattr(self, name)!r}.")

    @property
    def follows_optimizer(self) -> bool:
        """Whether the inner step is the base optimizer's."""
        shaped = self.hypergradient == "evograd" and self.noise == "optimizer"
        return shaped or self.inner_step == "optimizer"

    @property
    def needs_train_grads(self) -> bool:
        """Whether the update of the meta module looks at the training objective."""
        return self.meta_guard != "none" or bool(self.meta_trust_region)

    @property
    def is_blind(self) -> bool:
        """Whether candidates lie in random directions."""
        return self.hypergradient == "evograd" and (self.noise != "guided" or self.guidance < 1)

    @property
    def scales_hypergradient(self) -> bool:
        """Whether the hypergradient has the scale of an inner step, and not that of the paper's formula."""
        if self.hypergradient != "evograd" or self.follows_optimizer:
            return True
        # Guided perturbations are so short that sigma^2 / tau would be no step to speak of.
        return self.temperature == AUTO or self.noise == "guided"

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


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`{name}` should be a positive number or {AUTO!r}, got {text!r}.") from None
