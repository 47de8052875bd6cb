"""Learned weights of data sources: how much each domain of a mixture counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_trainer.modules.meta_module import Batch, MetaModule
from meta_trainer.modules.per_loss import per_loss
from meta_trainer.modules.weighted_mean import weighted_mean

DOMAIN_COLUMN = "domain"
"""Batch column, integers ``[B]``: the number of the domain that an example comes from."""


class DomainWeights(MetaModule):
    r"""Weigh each example by where it comes from: one learned weight per domain.

    The weights are :math:`w = D \cdot softmax(\text{logits})`, one at first and in the mean over the D domains. The
    objective :math:`\sum_i w_{d(i)} \ell_i / \sum_i w_{d(i)}`, over all examples of an optimizer step, is the same for
    all multiples of :math:`w`: the softmax leaves that multiple out of what is learned, so that weights are compared
    with each other and not with the learning rate.

    Losses of tokens get the weight of their example; a domain counts as much as it has tokens.

    Args:
        domains: Their names. The column holds numbers from 0 in this order, as texts cannot be collated: whoever makes
            the data set or the collator encodes them.
        column: Name of the batch column of numbers, ``[B]``, needed in training batches only.

    Raises:
        ValueError: If there are fewer than two domains, a name is no text or is there twice, or `column` is no name.
    """

    def __init__(self, domains: Sequence[str], column: str = DOMAIN_COLUMN) -> None:
        super().__init__()
        names = isinstance(domains, list | tuple) and all(isinstance(name, str) for name in domains)
        if not names or len(set(domains)) < len(domains) or len(domains) < 2:
            raise ValueError(f"`domains` should be a list of at least two names, each once, got {domains!r}.")
        if not isinstance(column, str) or not column:
            raise ValueError(f"`column` should be the name of a batch column, got {column!r}.")
        self.domains, self.column = list(domains), column
        self.logits = nn.Parameter(torch.zeros(len(domains)))

    @property
    def batch_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column of numbers."""
        return (self.column,)

    def forward(self, domain: Tensor) -> Tensor:
        """Weights, of the same shape, of the numbers of domains."""
        # A lookup that refuses negative numbers as well, on every device.
        return F.embedding(domain, self.all_weights().unsqueeze(1)).squeeze(-1)

    def all_weights(self) -> Tensor:
        """Weight of each domain, ``[D]``, in their order; one in the mean."""
        return len(self.domains) * torch.softmax(self.logits, dim=0)

    def reduce(self, losses: Tensor, batch: Batch, outputs: Any) -> Tensor:
        """Weighted mean of the losses ``[N]`` of examples or tokens."""
        return weighted_mean(self.example_weights(losses, batch), losses)

    def normalizer(self, losses: Tensor, batch: Batch) -> Tensor:
        """Sum of the weights."""
        return self.example_weights(losses, batch).sum()

    def summary(self) -> dict[str, Tensor]:
        """Weight of each domain."""
        return {f"weight_{name}": weight for name, weight in zip(self.domains, self.all_weights(), strict=True)}

    def example_weights(self, losses: Tensor, batch: Batch) -> Tensor:
        """Weight of the domain that each of the losses belongs to, ``[N]``."""
        domain = self._numbers(batch)
        domain = per_loss(domain, losses, batch, "DomainWeights", f"{len(domain)} examples")
        return self(domain).to(losses.dtype)

    def _numbers(self, batch: Batch) -> Tensor:
        """The column ``[B]``, checked."""
        expected = f"`{self.column}` of integers of shape [B], the numbers of the domains {self.domains}"
        if self.column not in batch:
            raise ValueError(
                f"DomainWeights expects a column {expected}, in every training batch, got the columns {sorted(batch)}."
            )
        domain = batch[self.column]
        is_tensor = isinstance(domain, Tensor)
        if not is_tensor or domain.dim() != 1 or domain.is_floating_point() or domain.dtype == torch.bool:
            found = f"{domain.dtype} of shape {list(domain.shape)}" if is_tensor else repr(domain)
            raise ValueError(f"DomainWeights expects a column {expected}, got {found}.")
        # An accelerator would have to be waited for; there, the lookup fails by itself.
        if domain.device.type == "cpu":
            unknown = domain[(domain < 0) | (domain >= len(self.domains))]
            if len(unknown):
                raise ValueError(f"DomainWeights expects a column {expected}, got the number {unknown[0].item()}.")
        return domain.long()
