"""What the hypergradients of a run say about themselves, and the warnings that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.hypergrad import Hypergradient

logger = logging.get_logger(__name__)

SATURATED, FLAT = 0.95, 0.01
"""Largest weight of a candidate, and its distance from the smallest, beyond which there is a warning."""

UNMOVED = 1e-8
"""Slope of the validation loss along a perturbation, relative to that loss, below which there is a warning."""

OVERSTEPPED = 0.01
"""Relative change of the training objective by one update of the meta module, above which there is a warning."""


class Diagnostics:
    """Statistics of successive hypergradients, kept on their device.

    Args:
        args: The settings, which decide what is worth a warning.
        decay: Of the running averages, per meta step.
    """

    def __init__(self, args: MetaTrainingArguments, decay: float = 0.95) -> None:
        self._args, self._decay = args, decay
        self._num_seen = 0
        self._last: Tensor | None = None
        self._mean = self._square = torch.zeros(())
        self._warned: set[str] = set()

    def observe(self, result: Hypergradient) -> dict[str, Tensor]:
        """Take in a finite hypergradient; gives its statistics, scalars on its device, by name."""
        flat = torch.cat([grad.detach().flatten().float() for grad in result.grads])
        weights = result.weights
        statistics = {
            "loss": result.val_loss,
            "loss_change": result.val_loss_change,
            "loss_slope": result.scores.abs().max() / result.val_loss.abs(),
            "max_candidate_weight": weights.max(),
            "candidate_weight_range": weights.max() - weights.min(),
            "effective_candidates": 1 / weights.square().sum(),
        }
        if len(weights) > 1:
            # The logarithm of a weight is a loss over the temperature, up to a constant.
            statistics["loss_spread"] = weights.log().std()
        if self._last is not None:
            statistics["cosine_to_last"] = torch.nn.functional.cosine_similarity(flat, self._last.to(flat), dim=0)
        self._average(flat)
        if self._num_seen > 1:
            statistics["signal_to_noise"] = self._signal_to_noise()
        self._last = flat
        return statistics

    def check(self, means: Mapping[str, float]) -> None:
        """Warn, once of each kind, where the means of the statistics since the last log show that something is wrong.

        Args:
            means: By name, as they are logged.
        """
        args = self._args
        of_evograd = args.hypergradient == "evograd"
        remedy = f"`temperature`, now {args.temperature}, or let temperature='auto' follow the losses."
        largest = means.get("meta/max_candidate_weight", 0.5)
        if of_evograd and largest > SATURATED:
            self._warn(
                f"The softmax over candidates is saturated: the largest weight is {largest:.3f} in the mean, so that "
                f"hypergradients vanish. Raise {remedy}"
            )
        width = means.get("meta/candidate_weight_range", 1.0)
        # In the scale of an inner step, equal weights do no harm: the difference of the losses counts all the same.
        if of_evograd and width < FLAT and not args.scales_hypergradient:
            self._warn(
                f"The softmax over candidates is flat: weights differ by {width:.1e} in the mean, so that candidates "
                f"are not selected and hypergradients are tiny. Lower {remedy}"
            )
        slope = means.get("meta/loss_slope", 1.0)
        if slope < UNMOVED:
            self._warn(
                f"The meta loss does not react to the inner step: its relative slope is {slope:.1e}. Check that "
                f"`perturb`, now {args.perturb}, names parameters that it depends on, and that the meta batches are "
                "not solved already."
            )
        share = means.get("meta/overlap", 0.0)
        if share > 0:
            self._warn(
                f"Train and meta batches overlap: {share:.1%} of the meta examples are in their train batch, too. What "
                "is learned from them does not generalize. Take the meta set, or what repeats it, out of the training "
                "set."
            )
        change = means.get("meta/objective_change", 0.0)
        if change > OVERSTEPPED:
            self._warn(
                f"The meta module outruns the model: one update changes the training objective by {change:.0%} in the "
                f"mean. Lower `meta_learning_rate`, now {args.meta_learning_rate}."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same averages."""
        return {"num_seen": self._num_seen, "last": self._last, "mean": self._mean, "square": self._square}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._num_seen, self._last = state["num_seen"], state["last"]
        self._mean, self._square = state["mean"], state["square"]

    def _average(self, flat: Tensor) -> None:
        self._num_seen += 1
        # Plain means at first, exponential ones later.
        share = max(1 / self._num_seen, 1 - self._decay)
        self._mean = self._mean.to(flat).lerp(flat, share) if self._num_seen > 1 else flat.clone()
        self._square = self._square.to(flat).lerp(flat.square().sum(), share)

    def _signal_to_noise(self) -> Tensor:
        """Norm of the mean over the standard deviation of a single hypergradient, free of bias for pure noise."""
        # The mean of n hypergradients still has 1/n of their variance.
        share = max(1 / self._num_seen, (1 - self._decay) / (1 + self._decay))
        signal = (self._mean.square().sum() - share * self._square).clamp(min=0) / (1 - share)
        noise = (self._square - signal).clamp(min=torch.finfo(signal.dtype).tiny)
        return (signal / noise).sqrt()

    def _warn(self, message: str) -> None:
        kind = message.split(":")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)
