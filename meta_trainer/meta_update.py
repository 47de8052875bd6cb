"""One update of the meta module, and what becomes of those that lead to no finite numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.guard import guarded, shorten_step
from meta_trainer.hypergrad import Hypergradient
from meta_trainer.meta_optimizer import StepBack, all_finite, apply_hypergradient

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MetaUpdate:
    """What an update came to.

    Attributes:
        norm: Of the hypergradient, guarded and before clipping.
        skipped: Why the meta module is as it was, or None if it is not.
        step_share: What a trust region left of the step, or None without one.
    """

    norm: Tensor
    skipped: str | None = None
    step_share: Tensor | None = None


def update_meta_module(
    result: Hypergradient,
    train_grads: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: MetaTrainingArguments,
) -> MetaUpdate:
    """Step along a hypergradient within the limits that `args` set.

    Everything that is decided here depends on averages over replicas, so that all of them decide the same.

    Args:
        result: The hypergradient.
        train_grads: Those of `result`, in the mean over replicas.
        parameters: The meta-parameters.
        optimizer: Of the meta-parameters.
        scaler: Of the meta losses.
        args: The settings.

    Returns:
        What came of it. Parameters and optimizer hold finite numbers only, if they did before.
    """
    grads = result.grads
    if args.meta_guard != "none":
        grads = guarded(grads, train_grads, ascent_only=args.meta_guard == "ascent")
    # A loss that is not finite has no gradient to speak of, also where the estimate does not show it.
    flaw = 0 * result.val_loss + (0 * result.train_losses).sum()
    grads = tuple(grad + flaw.to(grad) for grad in grads)
    back = StepBack(parameters, optimizer)
    norm, stepped = apply_hypergradient(parameters, grads, optimizer, scaler, args.meta_max_grad_norm)
    if not stepped:
        return MetaUpdate(norm, _reason(result))
    share = None
    if args.meta_trust_region:
        objective = result.train_losses.mean()
        share = shorten_step(parameters, back.values, train_grads, objective * args.meta_trust_region)
    if not all_finite(parameters, optimizer):
        back.take()
        return MetaUpdate(norm, f"a step along a hypergradient of norm {float(norm):.1e} leads to no finite numbers")
    return MetaUpdate(norm, step_share=share)


class SkippedSteps:
    """Counts the meta steps that were skipped.

    Args:
        limit: Number in a row that ends the run; 0 for none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = self.in_all = 0

    def taken(self) -> None:
        """Take note of a step that was not skipped."""
        self.in_a_row = 0

    def skipped(self, number: int, reason: str, model: nn.Module) -> None:
        """Take note of one that was.

        Args:
            number: Of the meta step.
            reason: Why.
            model: The base model, which may be to blame.

        Raises:
            ValueError: If there were too many in a row.
        """
        self.in_a_row += 1
        self.in_all += 1
        logger.warning(f"Meta step {number} is skipped, the meta module stays as it was: {reason}.")
        if self._limit and self.in_a_row >= self._limit:
            raise ValueError(
                f"{self.in_a_row} meta steps in a row were skipped (`meta_max_skipped`), the last for this reason: "
                f"{reason}. {_advice(model)}"
            )

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to count on."""
        return {"in_a_row": self.in_a_row, "in_all": self.in_all}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.in_a_row, self.in_all = state["in_a_row"], state["in_all"]


def _reason(result: Hypergradient) -> str:
    parts = {"the meta loss": result.val_loss, "the training loss": result.train_losses}
    broken = [name for name, tensor in parts.items() if not bool(torch.isfinite(tensor).all())]
    if not broken:
        return "the losses are finite, but their hypergradient is not"
    return f"{' and '.join(broken)} {'is' if len(broken) == 1 else 'are'} not finite"


def _advice(model: nn.Module) -> str:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return (
                f"The model itself holds numbers that are not finite, in {name!r} first: it diverged in a step of its "
                "own. Look for NaN or infinity in the train data, lower `learning_rate`, and resume from a checkpoint "
                "of before."
            )
    return (
        "The model's parameters are finite. Look for NaN or infinity in the train and meta data, and for a logarithm, "
        "root or quotient at zero in the loss or the meta module; lower `meta_learning_rate`; choose bf16 instead of "
        "fp16."
    )
