"""The perturbations of the candidates: drawn from a seed when they are needed, never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meta_trainer.hypergrad.flat_blocks import INTEGERS, Block, FlatBlocks
from meta_trainer.hypergrad.problem import identity

NoiseFunction = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]
"""A function ``(k, theta) -> [epsilon_k for each tensor of theta]``."""

Noise = str | NoiseFunction
"""A name of :data:`NOISE_NAMES`, or a function."""

NOISE_NAMES = ("sign", "normal", "optimizer", "guided")


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


@dataclass(frozen=True)
class Layout:
    """How the candidates lie about the unperturbed parameters.

    Attributes:
        antithetic: Every second candidate is the mirror image of the one before: what is even in the perturbation
            drops out of their difference.
        orthogonal: Random signs are multiplied by the rows of a Hadamard matrix, so that no two directions share a
            component: K of them see K dimensions.
        include_unperturbed: The first candidate has no perturbation.
    """

    antithetic: bool = False
    orthogonal: bool = False
    include_unperturbed: bool = False

    def place(self, k: int) -> tuple[int, float]:
        """Number of the direction of candidate `k`, and how far it goes along it: 1, -1 or 0."""
        if self.include_unperturbed:
            if k == 0:
                return 0, 0.0
            k -= 1
        return (k // 2, 1.0 - 2.0 * (k % 2)) if self.antithetic else (k, 1.0)


INDEPENDENT = Layout()
"""Every candidate has a direction of its own."""


@dataclass(frozen=True)
class Guide:
    r"""A known direction for the candidates.

    Attributes:
        direction: Flat blocks at each call.
        factor: What makes the direction a perturbation for :math:`\sigma = 1`.
        slope: Of the validation loss along that perturbation.
        share: Of the variance along it, in (0, 1]; random directions have the rest.
    """

    direction: Callable[[], Iterator[Tensor]]
    factor: Tensor
    slope: Tensor
    share: float = 1.0

    def distances(self, num_candidates: int, layout: Layout) -> list[float]:
        """How far each candidate goes along the direction: evenly spaced both ways, of mean square 1."""
        number = num_candidates - layout.include_unperturbed
        steps = [float(number - 1 - 2 * (j // 2)) * (1 - 2 * (j % 2)) for j in range(number)] if number > 1 else [1.0]
        norm = math.sqrt(sum(step**2 for step in steps) / number)
        return [0.0] * layout.include_unperturbed + [step / norm for step in steps]


class Perturbations(Sequence[Iterator[Tensor]]):
    r"""The K perturbations :math:`\epsilon_k` of one hypergradient.

    Each is an iterator over its flat blocks, aligned with `blocks`; a block is valid until the next one is asked for. A
    named distribution has zero mean and standard deviation `sigma`, times `scale`; it is drawn anew from its seed at
    every access: the k-th item is the same each time, and memory holds no copy of it. Independent items are the same
    for any K. A function is called once for each candidate, at construction, and its tensors are used as they are.

    Args:
        noise: A name of :data:`NOISE_NAMES` or a function.
        theta: The tensors to perturb, at their unperturbed values.
        num_candidates: K.
        sigma: Standard deviation of a named distribution; a function's tensors are not scaled.
        seed: Seed of a named distribution.
        layout: Of a named distribution.
        scale: Gives the flat blocks of a factor on every random perturbation; None for 1.
        guide: The direction of ``"guided"`` perturbations.
        offset: Gives the flat blocks of a displacement that every combination begins with; None for none.

    Raises:
        ValueError: If the name is unknown, or a function's tensors do not match `theta`.
    """

    def __init__(
        self,
        noise: Noise,
        theta: Sequence[Tensor],
        num_candidates: int,
        sigma: float | Tensor,
        seed: int,
        layout: Layout = INDEPENDENT,
        scale: Callable[[], Iterator[Tensor]] | None = None,
        guide: Guide | None = None,
        offset: Callable[[], Iterator[Tensor]] | None = None,
    ) -> None:
        check_noise_name(noise)
        self.blocks = FlatBlocks(theta)
        self._num_candidates, self._layout, self._sigma = num_candidates, layout, sigma
        self._fill = _normal if noise == "normal" else _sign
        self._scale, self._guide, self._offset = scale, guide, offset
        # One seed per direction, so that each can be redrawn without the ones before it.
        root = torch.Generator().manual_seed(seed)
        self._seeds = [int(torch.randint(2**63 - 1, (), generator=root)) for _ in range(num_candidates)]
        points = [t.detach() for t in theta]
        self._given = None if isinstance(noise, str) else [_call(noise, k, points) for k in range(num_candidates)]

    def __len__(self) -> int:
        """K."""
        return self._num_candidates

    def __getitem__(self, k: int) -> Iterator[Tensor]:  # type: ignore[override]
        """Flat blocks of the perturbation of candidate `k`."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        if self._given is not None:
            return self.blocks.flatten(self._given[k])
        if self._guide is None:
            return self._random(k, self._sigma)
        return self._guided(k, self._guide)

    def combination(
        self, weights: Tensor, observe: Callable[[Sequence[Tensor]], object] = lambda parts: None
    ) -> Iterator[Tensor]:
        r"""Flat blocks of :math:`\sum_k w_k \epsilon_k`, after the offset, which the caller may overwrite.

        Args:
            weights: ``[K]``.
            observe: Called with the K perturbations of each block, before their sum is given.
        """
        buffers = _Buffers(self.blocks)
        offsets = iter(()) if self._offset is None else self._offset()
        for block, *parts in zip(self.blocks, *self, strict=True):
            observe(parts)
            total = buffers[block][: block.numel]
            torch.mul(parts[0], weights[0].to(total), out=total)
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                total.addcmul_(part, weight.to(total))
            if self._offset is not None:
                total.add_(next(offsets))
            yield total

    def scores(self, vector: Sequence[Tensor], over_shards: Callable[[Tensor], Tensor] = identity) -> Tensor:
        """Inner products ``[K]`` of the perturbations with the gradient that guides them.

        Args:
            vector: The gradient, aligned with theta.
            over_shards: Sum over all parts of theta.
        """
        if self._guide is not None and self._guide.share == 1:
            distances = self._guide.slope.new_tensor(self._guide.distances(len(self), self._layout))
            return self._guide.slope * distances * self._sigma
        products = []
        for part, *parts in zip(self.blocks.flatten(vector), *self, strict=True):
            products.append(torch.stack([torch.dot(part, other) for other in parts]))
        return over_shards(self.blocks.sum_of(products, len(self)))

    def variance(self, weights: Tensor) -> Tensor:
        r"""Expected variance over the candidates, as a share of :math:`\sigma^2` and in each direction.

        Candidates that share a direction or stay in place vary less than independent ones.

        Args:
            weights: ``[K]``.
        """
        share, places = 0.0, [self._layout.place(k) for k in range(len(self))]
        directed = weights.new_zeros(())
        if self._guide is not None:
            share, distances = self._guide.share, weights.new_tensor(self._guide.distances(len(self), self._layout))
            directed = weights @ distances.square() - (weights @ distances).square()
        sides = weights.new_tensor([side for _, side in places])
        directions = torch.tensor([direction for direction, _ in places], device=weights.device)
        means = weights.new_zeros(len(self)).index_add(0, directions, weights * sides)
        return share * directed + (1 - share) * (weights @ sides.square() - means.square().sum())

    def _random(self, k: int, sigma: float | Tensor) -> Iterator[Tensor]:
        direction, side = self._layout.place(k)
        seed = self._seeds[direction]
        if self._layout.orthogonal:
            # One draw for all, seen through different rows of a Hadamard matrix. As these begin with the same sign,
            # every direction has another sign of its own: candidates would agree on too many elements without.
            seed, side = self._seeds[0], side * (1 - 2 * (seed % 2))
        generators = {d: torch.Generator(d).manual_seed(seed) for d in {block.device for block in self.blocks}}
        buffers = _Buffers(self.blocks)
        scales = iter(()) if self._scale is None else self._scale()
        for block in self.blocks:
            out = buffers[block]
            self._fill(out, 1.0 if isinstance(sigma, Tensor) else sigma, generators[block.device])
            if self._layout.orthogonal:
                _flip(out, direction)
            out = out[: block.numel]
            if isinstance(sigma, Tensor):
                out.mul_(sigma)
            if side != 1.0:
                out.mul_(side)
            if self._scale is not None:
                out.mul_(next(scales))
            yield out

    def _guided(self, k: int, guide: Guide) -> Iterator[Tensor]:
        distance = guide.factor * (guide.distances(len(self), self._layout)[k] * self._sigma * guide.share**0.5)
        buffers = _Buffers(self.blocks)
        random = iter(()) if guide.share == 1 else self._random(k, self._sigma * (1 - guide.share) ** 0.5)
        for block, direction in zip(self.blocks, guide.direction(), strict=True):
            out = torch.mul(direction, distance, out=buffers[block][: block.numel])
            yield out if guide.share == 1 else out.add_(next(random))


def check_noise_name(noise: Noise) -> None:
    """Raise ValueError for a name that is not one of :data:`NOISE_NAMES`."""
    if not callable(noise) and noise not in NOISE_NAMES:
        names = ", ".join(repr(name) for name in NOISE_NAMES)
        raise ValueError(f"`noise` should be one of {names} or a function, got {noise!r}.")


def _flip(out: Tensor, row: int) -> None:
    """Multiply by a row of a Hadamard matrix, over and over: the sign is the parity of the bits that indices share."""
    if row:
        period = 2 ** row.bit_length()
        shared = torch.arange(period, device=out.device) & row
        parity = torch.stack([(shared >> bit) & 1 for bit in range(row.bit_length())]).sum(dim=0) % 2
        signs = (1 - 2 * parity).to(out)
        whole = len(out) // period * period
        out[:whole].view(-1, period).mul_(signs)
        out[whole:].mul_(signs[: len(out) - whole])


def _call(noise: NoiseFunction, k: int, theta: Sequence[Tensor]) -> list[Tensor]:
    epsilon = list(noise(k, theta))
    expected, found = [list(t.shape) for t in theta], [list(e.shape) for e in epsilon]
    if expected != found:
        raise ValueError(
            f"`noise` should return one tensor for each tensor of theta, of shapes {expected}, got {found} "
            f"for candidate {k}."
        )
    return [e.detach().to(device=t.device, dtype=t.dtype) for e, t in zip(epsilon, theta, strict=True)]


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
