"""How well estimated hypergradients agree with exact ones, in numbers."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from meta_trainer.report import environment

Number = tuple[float, float]
"""A mean and its standard error; that of a single value is 0."""

RESAMPLES = 400
"""Of the bootstrap."""


@dataclass(frozen=True)
class SubjectRow:
    """What was judged.

    Attributes:
        size: Name of the model's size.
        parameters: Number of the model's parameters.
        theta: Number of those that the inner step moves.
        scope: Which these are.
        meta_params: Name of the meta-parameters.
        num_meta_params: Their number.
        effective_dimension: Of the exact hypergradients, see :func:`effective_dimension`.
        agreement: Mean cosine between the exact hypergradients of different batches.
        batches: Number of batches.
        train_loss: Objective at the end of the training.
        val_loss: Mean over the meta batches.
        learning_rate: Of the training.
        example_weights: Meta-Weight-Net's weight by loss.
    """

    size: str
    parameters: int
    theta: int
    scope: str
    meta_params: str
    num_meta_params: int
    effective_dimension: float
    agreement: float
    batches: int
    train_loss: float
    val_loss: float
    learning_rate: float
    example_weights: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A setting's hypergradients of many batches beside the exact ones.

    Attributes:
        size: Name of the model's size.
        scope: What the inner step moves.
        meta_params: Name of the meta-parameters.
        group: Of the setting.
        setting: Its name.
        value: Of what a sweep varies; None outside sweeps.
        passes: Cost in passes over a batch.
        cosines: With the exact one, one for each batch.
        projections: Inner products with the exact one, over its squared norm: 1 is the right length.
        largest_weights: Of any candidate, one for each batch.
        largest_scores: Absolute slopes of the validation loss along a candidate's perturbation, one for each batch.
        cosine_of_mean: Between the means over all batches, and its error by the bootstrap.
    """

    size: str
    scope: str
    meta_params: str
    group: str
    setting: str
    value: float | None
    passes: int
    cosines: list[float]
    projections: list[float]
    largest_weights: list[float]
    largest_scores: list[float]
    cosine_of_mean: Number

    @property
    def cosine(self) -> Number:
        """Mean cosine with the exact hypergradient of the same batch."""
        return mean_and_error(self.cosines)

    @property
    def right_signs(self) -> Number:
        """Share of batches whose inner product with the exact hypergradient is positive."""
        share = mean(float(cosine > 0) for cosine in self.cosines)
        return share, math.sqrt(share * (1 - share) / len(self.cosines))

    @property
    def projection(self) -> Number:
        """Mean length along the exact hypergradient, relative to its own."""
        return mean_and_error(self.projections)

    @property
    def largest_weight(self) -> Number:
        """Mean weight of the heaviest candidate."""
        return mean_and_error(self.largest_weights)

    @classmethod
    def of(cls, found: Sequence[Tensor], exact: Sequence[Tensor], **rest: Any) -> "Row":
        """Compare hypergradients, one of each for every batch."""
        return cls(
            cosines=[cosine(h, e) for h, e in zip(found, exact, strict=True)],
            projections=[float(h @ e / e.square().sum()) for h, e in zip(found, exact, strict=True)],
            cosine_of_mean=cosine_of_means(torch.stack(list(found)), torch.stack(list(exact))),
            **rest,
        )

    def content(self) -> dict[str, Any]:
        """All of it, and the means with their errors."""
        numbers = {name: getattr(self, name) for name in ("cosine", "right_signs", "projection", "largest_weight")}
        return {**asdict(self), "summary": _summary(numbers)}


@dataclass(frozen=True)
class Spread:
    """A setting's estimates of the same hypergradients over many seeds of the noise, scaled to a unit projection.

    Attributes:
        size: Name of the model's size.
        meta_params: Name of the meta-parameters.
        setting: Its name.
        seeds: Number of estimates of each hypergradient.
        projection: Of the estimates on the exact ones over the latter's squared norm, in the mean over all batches.
        squared_biases: Squared distance of the mean from the exact one over its squared norm, one for each batch,
            without what scatter adds to it: negative values are zero within the error.
        squared_scatters: Mean squared distance of an estimate from the mean, likewise.
    """

    size: str
    meta_params: str
    setting: str
    seeds: int
    projection: float
    squared_biases: list[float]
    squared_scatters: list[float]

    @property
    def bias(self) -> Number:
        """Root of the mean squared bias; zero where scatter hides it."""
        return _root(mean_and_error(self.squared_biases))

    @property
    def scatter(self) -> Number:
        """Root of the mean squared scatter."""
        return _root(mean_and_error(self.squared_scatters))

    @classmethod
    def of(cls, estimates: Sequence[Tensor], exact: Sequence[Tensor], **names: Any) -> "Spread":
        """Compare ``[S, H]`` estimates of each batch with its exact hypergradient ``[H]``."""
        squares = [e.square().sum() for e in exact]
        pairs = list(zip(estimates, exact, squares, strict=True))
        # One inner step has one rate, so that the scale is the same for every batch.
        projection = mean(float(h.mean(dim=0) @ e / square) for h, e, square in pairs)
        biases, scatters = [], []
        for h, e, square in pairs:
            scaled = h / projection
            center = scaled.mean(dim=0)
            scatter = (scaled - center).square().sum() / (len(h) - 1)
            biases.append(float(((center - e).square().sum() - scatter / len(h)) / square))
            scatters.append(float(scatter / square))
        return cls(
            seeds=len(estimates[0]), projection=projection, squared_biases=biases, squared_scatters=scatters, **names
        )

    def content(self) -> dict[str, Any]:
        """All of it, and the roots with their errors."""
        return {**asdict(self), "summary": _summary({"bias": self.bias, "scatter": self.scatter})}


@dataclass(frozen=True)
class Study:
    """All that was found.

    Attributes:
        subjects: What was judged.
        rows: How well every setting agrees with the exact hypergradients.
        spreads: Bias and scatter of repeated estimates.
    """

    subjects: list[SubjectRow] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    spreads: list[Spread] = field(default_factory=list)

    def __add__(self, other: "Study") -> "Study":
        """Both, one after the other."""
        return Study(self.subjects + other.subjects, self.rows + other.rows, self.spreads + other.spreads)

    def write(self, path: Path, settings: dict[str, Any]) -> None:
        """Write all numbers, the settings and the environment as JSON."""
        content = {
            "environment": environment(),
            "settings": settings,
            "subjects": [asdict(subject) for subject in self.subjects],
            "rows": [row.content() for row in self.rows],
            "spreads": [row.content() for row in self.spreads],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read what :meth:`write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            [SubjectRow(**subject) for subject in content["subjects"]],
            [Row(**_fields(Row, row)) for row in content["rows"]],
            [Spread(**_fields(Spread, row)) for row in content["spreads"]],
        )


def _fields(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    return {item.name: content[item.name] for item in fields(kind)}


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two vectors; that of zero, which says nothing, is 0."""
    norms = left.norm() * right.norm()
    return float(left @ right / norms) if norms > 0 else 0.0


def cosine_of_means(found: Tensor, exact: Tensor) -> Number:
    """Cosine between the means of ``[N, H]`` vectors, and its standard error by the bootstrap over batches."""
    number = len(found)
    chosen = torch.randint(number, (RESAMPLES, number), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, number, dtype=found.dtype).scatter_add(
        1, chosen, torch.ones_like(chosen, dtype=found.dtype)
    )
    counts = torch.cat([torch.ones(1, number, dtype=found.dtype), counts])  # [1 + R, N]

    def products(left: Tensor, right: Tensor) -> Tensor:
        return ((counts @ (left @ right.T)) * counts).sum(dim=1)  # [1 + R]

    norms = (products(found, found) * products(exact, exact)).sqrt()
    cosines = torch.where(norms > 0, products(found, exact) / norms, 0.0)
    return float(cosines[0]), float(cosines[1:].std())


def effective_dimension(vectors: Sequence[Tensor]) -> float:
    r"""Number of directions that unit vectors take: :math:`(\sum_i \mu_i)^2 / \sum_i \mu_i^2`.

    The :math:`\mu_i` are the eigenvalues of their matrix of inner products: 1 for vectors along one line, N for N
    orthogonal ones.
    """
    cosines = _cosines(vectors)
    return float(cosines.trace() ** 2 / cosines.square().sum())


def agreement(vectors: Sequence[Tensor]) -> float:
    """Mean cosine between different vectors."""
    number = len(vectors)
    return float((_cosines(vectors).sum() - number) / (number * (number - 1)))


def _cosines(vectors: Sequence[Tensor]) -> Tensor:
    directions = torch.stack([vector / vector.norm() for vector in vectors])  # [N, H]
    return directions @ directions.T


def mean_and_error(values: Sequence[float]) -> Number:
    """Mean and its standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean(values), error


def _summary(numbers: dict[str, Number]) -> dict[str, dict[str, float]]:
    return {name: {"mean": value, "error": error} for name, (value, error) in numbers.items()}


def _root(square: Number) -> Number:
    value, error = square
    root = math.sqrt(max(value, 0.0))
    # Near zero the root is not linear.
    return root, error / (2 * root) if root > 0 else math.sqrt(error)
