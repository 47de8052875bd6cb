"""MetaXL's representation transformation network (RTN)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from meta_trainer.hypergrad.checks import is_integer
from meta_trainer.modules.checks import check_size
from meta_trainer.modules.meta_module import REFERENCES, Batch, MetaModule

SOURCE_COLUMN = "is_source"
"""Batch column, boolean ``[B]``: whether an example is of the source language."""


INITIALIZATIONS = ("xavier", "identity")


class RepresentationTransform(MetaModule):
    r"""Transform the hidden states of source examples towards the target language.

    After layer :math:`l`, the hidden state of a source example becomes
    :math:`h + \alpha_l\,\mathrm{RTN}_l(\mathrm{stop}(h))` with :math:`\alpha = softmax` over the transformed layers (1
    for a single one). Target examples pass unchanged. The network is a bottleneck of two linear layers whose last
    channel is a sigmoid gate on all the others. It reads the same :math:`h` for every candidate of a meta step: as the
    base step does not differentiate through it, the inner step must not either.

    Args:
        hidden_size: Size of the hidden states.
        bottleneck_size: Size of the bottleneck.
        layers: Where to transform. A name is that of a submodule, such as ``"roberta.encoder.layer.11"``; a number
            counts the model's blocks from 1, as the paper does, or from the end when negative: -1 is the last.

        initialization: ``"xavier"`` as in the official code, where source states start out with a random residual that
            the model has to learn to live with; or ``"identity"``, where they start out unchanged.

    Raises:
        ValueError: If `layers` is empty or holds a layer twice, a size is no positive, whole number, or the
            initialization is unknown.

    References:
        Xia et al., `MetaXL: Meta Representation Transformation for Low-resource Cross-lingual Learning
        <https://arxiv.org/abs/2104.07908>`_, NAACL 2021; settings of the EvoGrad paper's code.
    """

    batch_columns: ClassVar[tuple[str, ...]] = (SOURCE_COLUMN,)

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 384,
        layers: Sequence[int | str] = (-1,),
        initialization: str = "xavier",
    ) -> None:
        super().__init__()
        if initialization not in INITIALIZATIONS:
            raise ValueError(f"`initialization` should be one of {', '.join(INITIALIZATIONS)}, got {initialization!r}.")
        check_size("hidden_size", hidden_size)
        check_size("bottleneck_size", bottleneck_size)
        known = isinstance(layers, Sequence) and all(isinstance(layer, str) or is_integer(layer) for layer in layers)
        if not known or isinstance(layers, str):
            raise ValueError(f"`layers` should be a list of names and whole numbers, got {layers!r}.")
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"`layers` should name at least one layer, each once, got {list(layers)}.")
        self.layers = list(layers)
        self.networks = nn.ModuleList(GatedBottleneck(hidden_size, bottleneck_size, initialization) for _ in layers)
        self.layer_logits = nn.Parameter(torch.zeros(len(layers)))

    @contextmanager
    def attach(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Hook the networks after their layers for one forward pass over `batch`."""
        if SOURCE_COLUMN not in batch:
            raise ValueError(
                f"RepresentationTransform expects a boolean column `{SOURCE_COLUMN}` of shape [B] in every "
                f"training batch, got the columns {sorted(batch)}. Let the data collator add it."
            )
        is_source = batch[SOURCE_COLUMN]
        if not isinstance(is_source, Tensor) or is_source.dim() != 1:
            found = f"shape {list(is_source.shape)}" if isinstance(is_source, Tensor) else repr(is_source)
            raise ValueError(f"`{SOURCE_COLUMN}` should be a tensor of booleans of shape [B], got {found}.")
        is_source = is_source.bool()[:, None, None]  # [B, 1, 1]
        alphas = torch.softmax(self.layer_logits, dim=0)  # [L]
        references = batch.get(REFERENCES, {})
        with ExitStack() as stack:
            for layer, network, alpha in zip(self.layers, self.networks, alphas, strict=True):
                hook = _residual_hook(network, alpha, is_source, references)
                stack.callback(find_layer(model, layer).register_forward_hook(hook).remove)
            yield

    def check_model(self, model: nn.Module) -> None:
        """Find every layer in `model`."""
        for layer in self.layers:
            find_layer(model, layer)


class GatedBottleneck(nn.Module):
    """``Linear - ReLU - Linear`` whose last output channel gates the others. Shape: ``[..., H]`` to ``[..., H]``."""

    def __init__(self, hidden_size: int, bottleneck_size: int, initialization: str = "xavier") -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size + 1)
        for linear in (self.down, self.up):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        if initialization == "identity":
            nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Transform hidden states ``[..., H]``, times a scalar."""
        transformed = self.up(torch.relu(self.down(hidden)))  # [..., H + 1]
        # With the scalar on the gate, autograd keeps no copy of the unscaled result.
        return transformed[..., :-1] * (scale * torch.sigmoid(transformed[..., -1:]))


def find_layer(model: nn.Module, layer: int | str) -> nn.Module:
    """Submodule of `model` by name, or its n-th block by number, counted from 1 or from the end.

    Raises:
        ValueError: If there is no such submodule or block.
    """
    if isinstance(layer, str):
        names = dict(model.named_modules())
        if layer not in names:
            raise ValueError(f"The model has no submodule {layer!r}. Its blocks are {_block_lists(model)}.")
        return names[layer]
    blocks = _blocks(model)
    if not 1 <= abs(layer) <= len(blocks):
        raise ValueError(
            f"`layers` (of a recipe, `rtn_layers`) counts the model's {len(blocks)} blocks from 1, or from -1 at the "
            f"end, got {layer}."
        )
    return blocks[layer - 1 if layer > 0 else layer]


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks: as long as the configuration says, else the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    matching = [blocks for blocks in lists if len(blocks) == depth] or sorted(lists, key=len, reverse=True)
    if not matching:
        raise ValueError(f"{type(model).__name__} has no list of blocks to count. Name the submodules in `layers`.")
    return matching[0]


def _block_lists(model: nn.Module) -> list[str]:
    return [f"{name}.0..{len(m) - 1}" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]


def _residual_hook(
    network: nn.Module, alpha: Tensor, is_source: Tensor, references: dict[Any, Tensor]
) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output  # [B, T, H]
        weight = next(network.parameters())  # [bottleneck, H]
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"`hidden_size` of a RepresentationTransform should be {hidden.shape[-1]}, the size of the states that "
                f"{type(module).__name__} gives, got {weight.shape[1]}."
            )
        read = references.setdefault(network, hidden.detach())
        residual = network(read.to(weight.dtype), alpha)
        transformed = torch.where(is_source, hidden + residual.to(hidden.dtype), hidden)
        return (transformed, *output[1:]) if isinstance(output, tuple) else transformed

    return hook
