"""EvoGrad in one dimension, section 4.1 of the paper: estimated beside true hypergradients.

    python scripts/illustration_1d.py       # pictures and numbers in docs/figures; about a minute on one core

Training loss (x − 1)² + λx², validation loss (x − 1/2)². The training loss has the curvature a = 2(1 + λ) and its
minimum at x*(λ) = 1/(1 + λ), so that the true hypergradient is (λ − 1)/(λ + 1)³ and the best λ is 1.

Estimates and truth are compared as they are, like in the paper, although the ones are derivatives through a single
inner step, of size σ²/τ for narrow noise, and the other through all steps to x*. The paper's σ²/τ = 2 is longer than
the step to the minimum, 1/a, but many candidates find the minimum and do not go past it: at x* the limit of their
estimates is a/(a + τ/σ²) times the true hypergradient, 0.8 to 0.92 times for λ in [0, 2].

Guided candidates lie σ to either side of x along the validation gradient, and their estimate has no randomness. Two
candidates cannot find a minimum between them: at x* they give exactly aσ²/τ times the true hypergradient. Their σ is
therefore chosen such that σ²/τ = 1/a at the best λ; the paper's σ would make them 4 to 12 times too long.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from meta_trainer.hypergrad import BilevelProblem, evograd
from meta_trainer.report import COLOURS, environment

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
BLACK, GREY = COLOURS[-1], "0.4"
TICKS = (-1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1)

SIGMA, TEMPERATURE = 1.0, 0.5
LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0)
BEST_X, BEST_LAMBDA = 0.5, 1.0

LEARNING_RATE, STEPS = 0.1, 5  # of both x and λ
STARTS = ((-1.8, 0.2), (-0.9, 1.2), (0.9, 0.8), (1.3, 0.2), (1.5, 1.7))  # those of the authors' code
TRAJECTORIES = 3  # from each start, with different random numbers
TRUTH = "truth"

POINTS: dict[str, Callable[[float], tuple[float, float]]] = {
    "x = x*(λ)": lambda lam: (optimum(lam), 0.0),
    "x ~ N(0, 1)": lambda lam: (0.0, 1.0),
}
"""Mean and standard deviation of the x of estimates: that of the true hypergradient, and that of the authors' code."""


@dataclass(frozen=True)
class Estimator:
    """EvoGrad with the settings of one panel."""

    name: str
    num_candidates: int
    sigma: float
    noise: str
    colour: str

    @property
    def title(self) -> str:
        """Name and settings."""
        return f"{self.name}, σ = {self.sigma:.2g}"

    def __call__(self, x: float, lam: float, seed: int) -> float:
        """Estimate the hypergradient at (x, λ)."""
        found = evograd(problem(x, lam), self.num_candidates, self.sigma, TEMPERATURE, self.noise, seed)
        return found.grads[0].item()


ESTIMATORS = (
    Estimator("K = 2", 2, SIGMA, "normal", COLOURS[0]),
    Estimator("K = 10", 10, SIGMA, "normal", COLOURS[1]),
    Estimator("K = 100", 100, SIGMA, "normal", COLOURS[2]),
    Estimator("guided, K = 2", 2, math.sqrt(TEMPERATURE / 4), "guided", COLOURS[3]),
)


@dataclass(frozen=True)
class Estimates:
    """Repeated estimates of one estimator, and how far they are from the truth.

    Attributes:
        point: A name of :data:`POINTS`.
        estimator: Its name.
        mean: Over repetitions, for each of :data:`LAMBDAS`.
        std: Standard deviation likewise.
        rms_error: Of a single estimate, over repetitions and lambdas.
        right_signs: Share of estimates that point to the best λ, where they could: λ is not 1.
    """

    point: str
    estimator: str
    mean: list[float]
    std: list[float]
    rms_error: float
    right_signs: float


@dataclass(frozen=True)
class Trajectory:
    """The points (x, λ) that an estimator of that name, or the truth, leads through."""

    estimator: str
    points: list[tuple[float, float]]


def problem(x: float, lam: float) -> BilevelProblem:
    """State the problem at (x, λ)."""
    theta, meta = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, lam))
    return BilevelProblem(
        theta=[theta],
        meta_params=[meta],
        train_loss=lambda: (theta - 1) ** 2 + meta * theta**2,
        val_loss=lambda: (theta - BEST_X) ** 2,
    )


def optimum(lam: float) -> float:
    """Minimum x* of the training loss."""
    return 1 / (1 + lam)


def true_hypergradient(lam: float) -> float:
    """Derivative of the validation loss at x* by λ."""
    return (lam - 1) / (lam + 1) ** 3


def limit(lam: float, mean: float, std: float) -> float:
    r"""Expected hypergradient of infinitely many candidates with the paper's noise.

    Weighed by :math:`\exp(-\ell_T / \tau)`, Gaussian candidates are Gaussian again: with
    :math:`s = 1 / (a + \tau / \sigma^2)` they have the variance :math:`s \tau` and the mean
    :math:`m = x + s a (x^* - x)`. As :math:`dm / d\lambda = -Cov(x, x^2) / \tau = -2 s m`, the hypergradient is
    :math:`-4 s m (m - 1/2)`.

    Args:
        lam: λ.
        mean: Mean of x.
        std: Standard deviation of x.
    """
    curvature = 2 * (1 + lam)
    step = 1 / (curvature + TEMPERATURE / SIGMA**2)
    m = mean + step * curvature * (optimum(lam) - mean)
    variance = ((1 - step * curvature) * std) ** 2
    return -4 * step * (m * (m - BEST_X) + variance)


def estimate(repetitions: int, rng: random.Random) -> Iterator[Estimates]:
    """Estimate hypergradients at every point, with every estimator, for every λ."""
    truth = np.array([[true_hypergradient(lam)] for lam in LAMBDAS])
    for point, moments in POINTS.items():
        for estimator in ESTIMATORS:
            values = np.empty((len(LAMBDAS), repetitions))
            for row, lam in zip(values, LAMBDAS, strict=True):
                row[:] = [estimator(rng.gauss(*moments(lam)), lam, rng.getrandbits(63)) for _ in row]
            yield Estimates(
                point=point,
                estimator=estimator.name,
                mean=values.mean(axis=1).tolist(),
                std=values.std(axis=1).tolist(),
                rms_error=float(np.sqrt(((values - truth) ** 2).mean())),
                right_signs=float((values * truth > 0)[truth[:, 0] != 0].mean()),
            )


def trajectory(start: tuple[float, float], hypergradient: Callable[[float, float], float]) -> list[tuple[float, float]]:
    """Take turns with gradient descent in x and in λ; the hypergradient is that at the new x."""
    x, lam = start
    points = [start]
    for _ in range(STEPS):
        x -= LEARNING_RATE * (2 * (x - 1) + 2 * lam * x)
        lam -= LEARNING_RATE * hypergradient(x, lam)
        points.append((x, lam))
    return points


def trajectories(rng: random.Random) -> Iterator[Trajectory]:
    """Follow the truth once, and each estimator several times, from every start.

    The truth is that at the λ of its own trajectory; the authors' code takes it at the λ of EvoGrad's.
    """
    for start in STARTS:
        yield Trajectory(TRUTH, trajectory(start, lambda x, lam: true_hypergradient(lam)))
    for estimator in ESTIMATORS:

        def hypergradient(x: float, lam: float, estimator: Estimator = estimator) -> float:
            return estimator(x, lam, rng.getrandbits(63))

        for start in STARTS * TRAJECTORIES:
            yield Trajectory(estimator.name, trajectory(start, hypergradient))


def draw_estimates(estimates: Sequence[Estimates], repetitions: int) -> Figure:
    """Mean and standard deviation of the estimates beside the true curve: a row for each point."""
    figure, panels = _figure(rows=len(POINTS), height=6.0)
    lambdas = np.linspace(LAMBDAS[0], LAMBDAS[-1], 201)
    for axes, estimator, found in zip(panels.flat, ESTIMATORS * len(POINTS), estimates, strict=True):
        moments = POINTS[found.point]
        axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        axes.plot(lambdas, [true_hypergradient(lam) for lam in lambdas], color=BLACK)
        if estimator.noise == "normal":
            axes.plot(lambdas, [limit(lam, *moments(lam)) for lam in lambdas], ":", color=BLACK)
        low, high = np.subtract(found.mean, found.std), np.add(found.mean, found.std)
        axes.vlines(LAMBDAS, low, high, color=estimator.colour, linewidth=7, alpha=0.35)
        axes.plot(LAMBDAS, found.mean, "o", color=estimator.colour)
        # Linear about zero and logarithmic beyond: large values and small signs can both be read.
        axes.set_yscale("asinh", linear_width=0.04)
        axes.set_yticks(TICKS, [f"{tick:g}".replace("-", "−") for tick in TICKS])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(title=estimator.title, xlabel="λ", ylabel=f"hypergradient at {found.point}")
        axes.label_outer()
    for axes in panels[1:].flat:
        axes.set_title("")
    _legend(
        figure,
        {
            "true hypergradient": Line2D([], [], color=BLACK),
            "limit of many candidates": Line2D([], [], color=BLACK, linestyle=":"),
            f"mean of {repetitions} estimates": Line2D([], [], color=GREY, marker="o", linestyle=""),
            "± standard deviation": Line2D([], [], color=GREY, linewidth=7, alpha=0.35),
        },
    )
    return figure


def draw_trajectories(paths: Sequence[Trajectory]) -> Figure:
    """Paths through the plane of x and λ, over the validation loss: a panel for each estimator."""
    figure, panels = _figure(rows=1, height=4.2)
    lambdas, x = np.linspace(-0.3, 2, 101), np.linspace(-2, 2, 401)
    true: dict[str, Any] = {"color": BLACK, "linewidth": 6, "alpha": 0.3, "solid_capstyle": "round"}
    start: dict[str, Any] = {"marker": "o", "color": "white", "markeredgecolor": BLACK, "linestyle": ""}
    best: dict[str, Any] = {**start, "marker": "*", "color": COLOURS[4], "markersize": 16}
    for axes, estimator in zip(panels[0], ESTIMATORS, strict=True):
        axes.imshow((x[None] - BEST_X) ** 2, extent=(-2, 2, -0.3, 2), aspect="auto", cmap="Greys", vmax=14)
        axes.plot([optimum(lam) for lam in lambdas], lambdas, ":", color=BLACK, linewidth=1)
        for path in paths:
            if path.estimator == TRUTH:
                axes.plot(*zip(*path.points, strict=True), **true)
        for path in paths:
            if path.estimator == estimator.name:
                axes.plot(*zip(*path.points, strict=True), ".-", color=estimator.colour, linewidth=1.2)
        axes.plot(*zip(*STARTS, strict=True), **start)
        axes.plot(BEST_X, BEST_LAMBDA, **best)
        axes.set(title=estimator.title, xlabel="x", ylabel="λ", xlim=(-2, 2), ylim=(-0.3, 2))
        axes.label_outer()
    _legend(
        figure,
        {
            "start": Line2D([], [], **start),
            "best λ and its x": Line2D([], [], **best),
            f"{STEPS} steps along the true hypergradient": Line2D([], [], **true),
            f"{STEPS} steps along estimates, {TRAJECTORIES} times": Line2D([], [], color=GREY, marker="."),
            "x*(λ)": Line2D([], [], color=BLACK, linestyle=":", linewidth=1),
            "validation loss: dark is high": Patch(facecolor="0.75"),
        },
    )
    return figure


def _figure(rows: int, height: float) -> tuple[Figure, np.ndarray]:
    """Panels with common axes, a column for each estimator."""
    figure = Figure(figsize=(13.2, height), layout=ConstrainedLayoutEngine(w_pad=0.08))
    panels = figure.subplots(rows, len(ESTIMATORS), sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Figure, entries: dict[str, Artist]) -> None:
    """Explain all panels at once, in no estimator's colour."""
    columns = len(entries) if len(entries) < 5 else 3
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, handlelength=2.5
    )


def summary(estimates: Sequence[Estimates], paths: Sequence[Trajectory]) -> str:
    """Say how far the estimates are from the truth, a line for each estimator and point."""
    lines = [
        f"{found.point:12} {found.estimator:14} rms error {found.rms_error:.3f}, right signs {found.right_signs:.0%}"
        for found in estimates
    ]
    ends = {path.points[0]: path.points[-1][1] for path in paths if path.estimator == TRUTH}
    for estimator in ESTIMATORS:
        errors = [path.points[-1][1] - ends[path.points[0]] for path in paths if path.estimator == estimator.name]
        lines.append(
            f"trajectories {estimator.name:14} rms error of the last λ {np.sqrt(np.mean(np.square(errors))):.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, estimate, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the pictures and the numbers")
    parser.add_argument("--repetitions", type=int, default=100, help="estimates for each λ")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error(f"--repetitions should be at least 1, got {options.repetitions}")

    torch.set_num_threads(1)  # numbers, not tensors
    rng = random.Random(options.seed)
    estimates, paths = list(estimate(options.repetitions, rng)), list(trajectories(rng))
    print(summary(estimates, paths))
    options.output.mkdir(parents=True, exist_ok=True)
    figures = {"estimates": draw_estimates(estimates, options.repetitions), "trajectories": draw_trajectories(paths)}
    for name, figure in figures.items():
        figure.savefig(options.output / f"illustration_{name}.png", format="png", dpi=150)
    content = {
        "environment": environment(),
        "settings": {"repetitions": options.repetitions, "seed": options.seed},
        "lambdas": LAMBDAS,
        "truth": [true_hypergradient(lam) for lam in LAMBDAS],
        "estimates": [asdict(found) for found in estimates],
        "trajectories": [asdict(path) for path in paths],
    }
    (options.output / "illustration_1d.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
