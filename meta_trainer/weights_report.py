"""What a run says about the weights of its training examples: a table to sort, a score and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from meta_trainer.example_weights import UNKNOWN, ExampleWeights, ranking_auc
from meta_trainer.modules.meta_weight_net import WEIGHT_AT_LOSS
from meta_trainer.report import COLOURS, SUMMARY

TRAINING_WEIGHTS = "training_weights.parquet"
PICTURE = "weights.png"
IS_CORRUPTED = "is_corrupted"
MOST_CURVES = 8
WEIGHT_LABEL = "weight, relative to the mean of all examples"


def report_weights(
    found: ExampleWeights,
    labels: Dataset,
    classes: Mapping[int, str],
    history: Sequence[dict[str, float]],
    folder: Path,
) -> dict[str, float]:
    """Write the table and the picture of the weights into a folder.

    Args:
        found: Weights of the training examples.
        labels: Their origin and labels: see `Task.training_labels`.
        classes: Names of the model's classes.
        history: ``trainer.state.log_history``.
        folder: Where to write.

    Returns:
        How well the corrupted examples were found, by name: see `detection_scores`.

    Raises:
        ValueError: If `labels` are neither as many as the weights nor as many as the examples.
    """
    table = weights_table(found, labels, classes)
    pyarrow.parquet.write_table(table, folder / TRAINING_WEIGHTS)
    columns = {name: table[name].to_numpy() for name in ("loss", "weight", IS_CORRUPTED) if name in table.column_names}
    is_corrupted = columns.get(IS_CORRUPTED)
    draw_weights(columns["loss"], columns["weight"], is_corrupted, history, folder / PICTURE)
    return {} if is_corrupted is None else detection_scores(columns["loss"], columns["weight"], is_corrupted)


def weights_table(found: ExampleWeights, labels: Dataset, classes: Mapping[int, str]) -> pyarrow.Table:
    """The rows of `labels` with prediction, loss and weight, the most suspicious first.

    That is the lowest weight, and of equal weights the highest loss.

    Raises:
        ValueError: If the rows are neither as many as the weights nor as many as the examples.
    """
    if len(labels) != len(found.weights):
        found = found.per_example()
    if len(labels) != len(found.weights):
        raise ValueError(f"Expected labels of {len(found.weights)} examples, got {len(labels)}: these are other data.")
    table: pyarrow.Table = labels.with_format("arrow")[:]
    if (found.predictions != UNKNOWN).all():
        names = [classes[int(prediction)] for prediction in found.predictions]
        place = table.column_names.index("label") + 1 if "label" in table.column_names else table.num_columns
        table = table.add_column(place, "predicted_label", pyarrow.array(names))
    table = table.append_column("loss", pyarrow.array(found.losses))
    table = table.append_column("weight", pyarrow.array(found.weights))
    return table.take(pyarrow.array(np.lexsort((-found.losses, found.weights))))


def detection_scores(losses: np.ndarray, weights: np.ndarray, is_corrupted: np.ndarray) -> dict[str, float]:
    """How well low weights tell corrupted from clean examples, and high losses, which need no meta module.

    Returns:
        The areas under the ROC curve, ``corrupted_auc`` and ``corrupted_auc_by_loss``; nothing unless there are
        examples of both kinds.
    """
    scores = {
        "corrupted_auc": ranking_auc(-weights, is_corrupted),
        "corrupted_auc_by_loss": ranking_auc(losses, is_corrupted),
    }
    return {name: score for name, score in scores.items() if math.isfinite(score)}


def draw_weights(
    losses: np.ndarray,
    weights: np.ndarray,
    is_corrupted: np.ndarray | None,
    history: Sequence[dict[str, float]],
    path: Path,
) -> None:
    """Draw the learned weight against the loss over training, and the final weights of the examples, as a PNG.

    Weights are divided by their mean over the examples: of normalised weights only the ratios matter, and 1 is the
    weight of every example in plain training. Without a logged function of the loss, its panel is left out; without
    any finite weight, the picture.

    Args:
        losses: ``[N]``.
        weights: ``[N]``.
        is_corrupted: ``[N]``, or None where that is not known.
        history: ``trainer.state.log_history``.
        path: File to write.
    """
    finite = np.isfinite(losses) & np.isfinite(weights)
    if not finite.any():
        return
    losses, weights = losses[finite], weights[finite]
    is_corrupted = None if is_corrupted is None else is_corrupted[finite]
    curves = _curves(history)
    panels: list[Callable[[Axes], None]] = []
    if curves:
        panels.append(lambda axes: _draw_curves(axes, curves, losses))
    panels.append(lambda axes: _draw_histogram(axes, _relative(weights, weights), is_corrupted))
    figure = Figure(figsize=(5.2 * len(panels), 4), layout=ConstrainedLayoutEngine(w_pad=0.1))
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def _relative(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    mean = float(np.mean(weights))
    return values / mean if mean > 0 else values


def _curves(history: Sequence[dict[str, float]]) -> list[tuple[float, dict[float, float]]]:
    """Step, and weight by loss, of a few moments, the first and the last among them; of curves alike, the last one."""
    prefix = SUMMARY + WEIGHT_AT_LOSS
    logged = [
        (row["step"], {float(key.removeprefix(prefix)): value for key, value in row.items() if key.startswith(prefix)})
        for row in history
    ]
    curves = [(step, curve) for step, curve in logged if curve]
    # Before the first meta step they are all the same.
    curves = [now for now, later in zip_longest(curves, curves[1:]) if later is None or later[1] != now[1]]
    chosen = np.linspace(0, len(curves) - 1, min(len(curves), MOST_CURVES)).round().astype(int)
    return [curves[i] for i in chosen]


def _draw_curves(axes: Axes, curves: Sequence[tuple[float, dict[float, float]]], losses: np.ndarray) -> None:
    for i, (step, curve) in enumerate(curves):
        at, values = np.array(sorted(curve)), np.array([curve[loss] for loss in sorted(curve)])
        # The mean over the examples as they are in the end; the losses of earlier moments are not kept.
        relative = _relative(values, np.interp(losses, at, values))
        # Dark to light would lose the last and most important one on white.
        colour = colormaps["viridis_r"](0.1 + 0.9 * i / max(1, len(curves) - 1))
        axes.plot(at, relative, color=colour, marker="o", markersize=4, linewidth=1.8, label=f"step {step:g}")
    axes.axhline(1, color="0.6", linewidth=1, linestyle=":")
    axes.set(title="Learned weight of an example, early to late", xlabel="loss of the example", ylabel=WEIGHT_LABEL)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _draw_histogram(axes: Axes, weights: np.ndarray, is_corrupted: np.ndarray | None) -> None:
    bins = np.linspace(0, max(1e-9, float(weights.max())) * 1.001, 41)
    options: dict[str, Any] = {"bins": bins, "alpha": 0.6}
    title = "Weights of the training examples"
    if is_corrupted is None or is_corrupted.all() or not is_corrupted.any():
        axes.hist(weights, color=COLOURS[0], **options)
        axes.set_ylabel("examples")
    else:
        # Shares, as one kind may be much rarer than the other.
        for kind, name, colour in (
            (~is_corrupted, "right label", COLOURS[0]),
            (is_corrupted, "wrong label", COLOURS[1]),
        ):
            number = int(kind.sum())
            axes.hist(
                weights[kind], weights=np.full(number, 1 / number), color=colour, label=f"{name} ({number})", **options
            )
        axes.set_ylabel("share of the examples of a kind")
        # Learned weights gather at both ends.
        axes.legend(frameon=False, fontsize="small", loc="upper center")
        title = f"Wrong labels are found with AUC {ranking_auc(-weights, is_corrupted):.3f}"
    axes.axvline(1, color="0.6", linewidth=1, linestyle=":")
    axes.set(title=title, xlabel=WEIGHT_LABEL)
