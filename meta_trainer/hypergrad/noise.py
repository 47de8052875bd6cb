"""The perturbations of the candidates: drawn from a seed when they are needed, never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import INTEGERS, Block, FlatBlocks

Noise = str | Callable[[int, Sequence[Tensor]], Sequence[Tensor]]
"""A name of :data:`NOISE_NAMES`, or a function ``(k, theta) -> [epsilon_k for each tensor of theta]``."""


def _sign(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    """Plus or minus `sigma`, at the price of one random bit an element."""
    integers = INTEGERS[out.itemsize]
    bits = 8 * integers.itemsize
    words = torch.empty(len(out) // 64, dtype=torch.int64, device=out.device)
    words = words.random_(-(2**63), None, generator=generator).view(integers)  # [W]
    # Each shift brings another bit of every word to where a floating-point number has its sign.
    shifts = torch.arange(bits, dtype=integers, device=out.device)[:, None]
    table = torch.bitwise_left_shift(words, shifts, out=out.view(integers).view(bits, -1))  # [bits, W]
    magnitude = torch.tensor(sigma, dtype=out.dtype).view(integers).item()
    table.bitwise_and_(torch.iinfo(integers).min).bitwise_or_(magnitude)


def _normal(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    out.normal_(std=sigma, generator=generator)


_DISTRIBUTIONS: dict[str, Callable[[Tensor, float, torch.Generator], None]] = {"sign": _sign, "normal": _normal}

NOISE_NAMES = tuple(_DISTRIBUTIONS)


class Perturbations(Sequence[Iterator[Tensor]]):
    r"""The K perturbations :math:`\epsilon_k` of one hypergradient.

    Each is an iterator over its flat blocks, aligned with `blocks`; a block is valid until the next one is asked for. A
    named distribution has zero mean and standard deviation `sigma`, and is drawn anew from its seed at every access:
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
        self.blocks = FlatBlocks(theta)
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

    def __getitem__(self, k: int) -> Iterator[Tensor]:  # type: ignore[override]
        """Flat blocks of the perturbation of candidate `k`."""
        if not isinstance(self._noise, str):
            return self.blocks.flatten(self._given[k])
        return self._draw(self._seeds[k])

    def combination(
        self, weights: Tensor, observe: Callable[[Sequence[Tensor]], object] = lambda parts: None
    ) -> Iterator[Tensor]:
        r"""Flat blocks of :math:`\sum_k w_k \epsilon_k`, which the caller may overwrite.

        Args:
            weights: ``[K]``.
            observe: Called with the K perturbations of each block, before their sum is given.
        """
        buffers = _Buffers(self.blocks)
        for block, *parts in zip(self.blocks, *self, strict=True):
            observe(parts)
            total = buffers[block][: block.numel]
            torch.mul(parts[0], weights[0].to(total), out=total)
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                total.addcmul_(part, weight.to(total))
            yield total

    def _draw(self, seed: int) -> Iterator[Tensor]:
        fill = _DISTRIBUTIONS[str(self._noise)]
        generators = {d: torch.Generator(d).manual_seed(seed) for d in {block.device for block in self.blocks}}
        buffers = _Buffers(self.blocks)
        for block in self.blocks:
            fill(buffers[block], self._sigma, generators[block.device])
            yield buffers[block][: block.numel]

    def _call(self, noise: Callable[[int, Sequence[Tensor]], Sequence[Tensor]], k: int) -> list[Tensor]:
        epsilon = list(noise(k, self._theta))
        expected, found = [list(t.shape) for t in self._theta], [list(e.shape) for e in epsilon]
        if expected != found:
            raise ValueError(
                f"`noise` should return one tensor for each tensor of theta, of shapes {expected}, got {found} "
                f"for candidate {k}."
            )
        return [e.detach().to(device=t.device, dtype=t.dtype) for e, t in zip(epsilon, self._theta, strict=True)]


class _Buffers:
    """One buffer for all blocks of a kind, so that they stay in the cache; with room for whole words of random bits."""

    def __init__(self, blocks: FlatBlocks) -> None:
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for block in blocks:
            kind = (block.device, block.dtype)
            sizes[kind] = max(sizes.get(kind, 0), _whole_words(block))
        self._buffers = {kind: torch.empty(size, dtype=kind[1], device=kind[0]) for kind, size in sizes.items()}

    def __getitem__(self, block: Block) -> Tensor:
        return self._buffers[block.device, block.dtype][: _whole_words(block)]


def _whole_words(block: Block) -> int:
    return -(-block.numel // 64) * 64
