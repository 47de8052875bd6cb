"""Learned feature-wise transformation (LFT): noise of learned size on the channels of hidden layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_trainer.hypergrad.checks import is_integer, is_number
from meta_trainer.modules.checks import check_size
from meta_trainer.modules.meta_module import Batch, MetaModule
from meta_trainer.modules.representation_transform import find_layer

RESIDUAL_NORMS = ("*.layer.1.normalization", "*.shortcut.normalization")
"""In the basic ResNets of transformers: the last normalization of every residual block, and that of its shortcut."""

_SIZES = ("num_features", "num_channels", "normalized_shape", "out_channels", "out_features")
"""Where layers of torch keep their number of channels."""


class FeatureWiseTransform(MetaModule):
    r"""Scale and shift every channel of some layers by Gaussian noise of learned size, in training only.

    The output z of a layer becomes :math:`\gamma z + \beta` with

    .. math:: \gamma = 1 + \mathrm{softplus}(\theta_\gamma)\,\epsilon, \qquad
        \beta = \mathrm{softplus}(\theta_\beta)\,\epsilon', \qquad \epsilon, \epsilon' \sim N(0, 1),

    one draw for each channel and forward pass, shared by all examples and positions: features then vary from step to
    step as they do from one domain to another. All candidates of a meta step see the same draw.

    Args:
        layers: Where to transform, each with its number of channels. A name is that of a submodule; a number counts the
            model's blocks, see :class:`RepresentationTransform`. :func:`find_channels` finds them by patterns.
        channel_dim: Dimension of the channels: 1 for images ``[B, C, H, W]``, -1 for hidden states ``[B, T, H]``.
        scale: Initial :math:`\theta_\gamma`; also that of the hand-tuned transformation, which does not learn.
        shift: Initial :math:`\theta_\beta`, likewise.

    Raises:
        ValueError: If `layers` is empty or names a layer twice, or a size or a number is none.

    References:
        Tseng et al., `Cross-Domain Few-Shot Classification via Learned Feature-Wise Transformation
        <https://arxiv.org/abs/2001.08735>`_, ICLR 2020.
    """

    def __init__(
        self, layers: Sequence[tuple[int | str, int]], channel_dim: int = 1, scale: float = 0.3, shift: float = 0.5
    ) -> None:
        super().__init__()
        _check_layers(layers)
        if not is_integer(channel_dim):
            raise ValueError(f"`channel_dim` should be a whole number, got {channel_dim!r}.")
        for name, value in (("scale", scale), ("shift", shift)):
            if not is_number(value):
                raise ValueError(f"`{name}` should be a number, got {value!r}.")
        self.layers = [layer for layer, _ in layers]
        self.channel_dim = channel_dim
        # One tensor [C] for each layer.
        self.scales = nn.ParameterList(torch.full((channels,), float(scale)) for _, channels in layers)
        self.shifts = nn.ParameterList(torch.full((channels,), float(shift)) for _, channels in layers)

    @contextmanager
    def attach(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Hook the noise, drawn from the global generator, after its layers for one forward pass."""
        with ExitStack() as stack:
            for layer, scale, shift in zip(self.layers, self.scales, self.shifts, strict=True):
                hook = _affine_hook(scale, shift, self.channel_dim)
                stack.callback(find_layer(model, layer).register_forward_hook(hook).remove)
            yield

    def check_model(self, model: nn.Module) -> None:
        """Find every layer in `model`, with the number of channels that it should have."""
        for layer, scale in zip(self.layers, self.scales, strict=True):
            channels = _channels(find_layer(model, layer))
            if channels is not None and channels != len(scale):
                raise ValueError(
                    f"`layers` of a FeatureWiseTransform gives layer {layer!r} {len(scale)} channels, and the model "
                    f"has {channels} there. Build the transformation for this model."
                )

    def summary(self) -> dict[str, Tensor]:
        """Mean standard deviations of the scales and of the shifts, over all channels."""
        return {
            "mean_scale_noise": F.softplus(torch.cat([*self.scales]).detach()).mean(),
            "mean_shift_noise": F.softplus(torch.cat([*self.shifts]).detach()).mean(),
        }


def find_channels(model: nn.Module, patterns: Sequence[str] = RESIDUAL_NORMS) -> list[tuple[str, int]]:
    """The submodules of `model` that match any of the patterns, and how many channels each has.

    Args:
        model: The base model.
        patterns: Of names of submodules, with the wildcards of `fnmatch`.

    Raises:
        ValueError: If a pattern matches nothing, or a submodule whose number of channels is not known.
    """
    named = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            norms = [name for name, module in named.items() if hasattr(module, "running_mean")]
            raise ValueError(
                f"The pattern {pattern!r} matches no submodule of {type(model).__name__}. Its normalizations are "
                f"{', '.join(norms[:8]) or 'none that keep statistics'}{', ...' if len(norms) > 8 else ''}."
            )
    found = [(name, _channels(m)) for name, m in named.items() if any(fnmatchcase(name, p) for p in patterns)]
    if unknown := [name for name, channels in found if channels is None]:
        raise ValueError(
            f"The number of channels of {', '.join(unknown)} is not known: layers to transform should be "
            "normalizations, convolutions or linear maps. Give others, with their channels, as `layers` of a "
            "FeatureWiseTransform."
        )
    return [(name, channels) for name, channels in found if channels is not None]


def random_affine(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of gamma and beta, ``[C]`` each, from the raw sizes of their noise."""
    gamma = 1 + F.softplus(scale) * torch.randn_like(scale)
    return gamma, F.softplus(shift) * torch.randn_like(shift)


def _affine_hook(scale: Tensor, shift: Tensor, channel_dim: int) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not -hidden.dim() <= channel_dim < hidden.dim() or hidden.shape[channel_dim] != len(scale):
            raise ValueError(
                f"A FeatureWiseTransform expects {len(scale)} channels in dimension {channel_dim} of what "
                f"{type(module).__name__} gives, got shape {list(hidden.shape)}."
            )
        shape = [1] * hidden.dim()
        shape[channel_dim] = -1
        gamma, beta = (drawn.to(hidden.dtype).view(shape) for drawn in random_affine(scale, shift))
        # One operator: autograd keeps the output of the layer and nothing else of its size.
        transformed = torch.addcmul(beta, hidden, gamma)
        return (transformed, *output[1:]) if isinstance(output, tuple) else transformed

    return hook


def _channels(module: nn.Module) -> int | None:
    for name in _SIZES:
        size: Any = getattr(module, name, None)
        # That of a LayerNorm is a tuple.
        size = size[-1] if isinstance(size, tuple) and size else size
        if is_integer(size):
            return int(size)
    return None


def _check_layers(layers: Any) -> None:
    pairs = isinstance(layers, Sequence) and all(isinstance(p, Sequence) and len(p) == 2 for p in layers)
    if not pairs or not all(isinstance(layer, str) or is_integer(layer) for layer, _ in layers):
        raise ValueError(f"`layers` should be a list of pairs of a layer and its number of channels, got {layers!r}.")
    names = [layer for layer, _ in layers]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`layers` should name at least one layer, each once, got {names}.")
    for layer, channels in layers:
        check_size(f"channels of layer {layer!r}", channels)
