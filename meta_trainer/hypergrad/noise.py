"""The perturbations of the candidates: drawn from a seed when they are needed, never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Noise = str | Callable[[int, Sequence[Tensor]], Sequence[Tensor]]
"""A name of :data:`NOISE_NAMES`, or a function ``(k, theta) -> [epsilon_k for each tensor of theta]``."""


def _sign(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(tensor).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(tensor).normal_(generator=generator)


_DISTRIBUTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"sign": _sign, "normal": _normal}

NOISE_NAMES = tuple(_DISTRIBUTIONS)


class Perturbations(Sequence[Sequence[Tensor]]):
    r"""The K perturbations :math:`\epsilon_k` of one hypergradient, each a list of tensors aligned with `theta`.

    A named distribution has zero mean and standard deviation `sigma`, and is drawn anew from its seed at every access:
    the k-th item is the same each time, and memory holds no copy of it. Items are the same for any K. A function is
    called once for each candidate, at construction, and its tensors are used as they are.

    Args:
        noise: A name of :data:`NOISE_NAMES` or a function.
        theta: The tensors to perturb, at their unperturbed values.
        num_candidates: K.
        sigma: Standard deviation of a named distribution; a function's tensors are not scaled.
        seed: Seed of a named distribution.

    Raises:
        ValueError: If the name is unknown, or a function's tensors do not match `theta`.
    """

    def __init__(self, noise: Noise, theta: Sequence[Tensor], num_candidates: int, sigma: float, seed: int) -> None:
        if isinstance(noise, str) and noise not in _DISTRIBUTIONS:
            names = ", ".join(repr(name) for name in NOISE_NAMES)
            raise ValueError(f"`noise` should be one of {names} or a function, got {noise!r}.")
        self._noise = noise
        self._theta = [t.detach() for t in theta]
        self._sigma = sigma
        # One seed per candidate, so that each can be redrawn without the ones before it.
        root = torch.Generator().manual_seed(seed)
        self._seeds = [int(torch.randint(2**63 - 1, (), generator=root)) for _ in range(num_candidates)]
        self._given = [] if isinstance(noise, str) else [self._call(noise, k) for k in range(num_candidates)]

    def __len__(self) -> int:
        """K."""
        return len(self._seeds)

    def __getitem__(self, k: int) -> list[Tensor]:  # type: ignore[override]
        """Perturbation of candidate `k`."""
        if not isinstance(self._noise, str):
            return self._given[k]
        draw, seed = _DISTRIBUTIONS[self._noise], self._seeds[k]
        generators = {d: torch.Generator(d).manual_seed(seed) for d in {t.device for t in self._theta}}
        return [draw(t, generators[t.device]).mul_(self._sigma) for t in self._theta]

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Perturbation of each candidate in turn."""
        return (self[k] for k in range(len(self)))

    def _call(self, noise: Callable[[int, Sequence[Tensor]], Sequence[Tensor]], k: int) -> list[Tensor]:
        epsilon = list(noise(k, self._theta))
        expected, found = [list(t.shape) for t in self._theta], [list(e.shape) for e in epsilon]
        if expected != found:
            raise ValueError(
                f"`noise` should return one tensor for each tensor of theta, of shapes {expected}, got {found} "
                f"for candidate {k}."
            )
        return [e.detach().to(device=t.device, dtype=t.dtype) for e, t in zip(epsilon, self._theta, strict=True)]
