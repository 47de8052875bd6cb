"""Draw how the angle of a learned rotation was found, from the runs' results.

    python scripts/figure_rotation.py runs/rotation/30° --method "EvoGrad, guided"

The folder is that of a target of `recipes/rotation/grids/mnist.yaml`: one folder for each method, one in it for each
seed. The left panel has the angle over training of every seed and the true angle; beside it are digits to train on,
digits of the target, and the first ones as the learned rotation makes them.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meta_trainer import InputRotation
from meta_trainer.modules.input_rotation import rotate
from meta_trainer.recipe import read_recipe
from meta_trainer.report import COLOURS, SUMMARY
from meta_trainer.run import build_task

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "rotation.png"
ANGLE = f"{SUMMARY}angle"


@dataclass(frozen=True)
class Run:
    """A run of one seed: its folder, settings, and the learned angle over training.

    Attributes:
        folder: Where its results lie.
        settings: Its recipe, resolved.
        steps: Optimizer steps at which the angle was logged.
        angles: In degrees.
    """

    folder: Path
    settings: dict[str, Any]
    steps: list[int]
    angles: list[float]


def read_runs(folder: Path) -> list[Run]:
    """The runs of a method, seed by seed.

    Raises:
        ValueError: If there is none, or one has no learned angle.
    """
    runs = []
    for file in sorted(folder.glob("seed_*/results.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in content["results"][-1]["history"] if ANGLE in row]
        if not rows:
            raise ValueError(f"{file} should hold {ANGLE!r} in its history: no angle was learned in this run.")
        # Every run starts upright.
        steps, angles = [0, *(row["step"] for row in rows)], [0.0, *(row[ANGLE] for row in rows)]
        runs.append(Run(file.parent, content["settings"], steps, angles))
    if not runs:
        raise ValueError(f"{folder} should hold folders seed_*/ with a results.json, got none.")
    return runs


def digits(run: Run, number: int) -> dict[str, torch.Tensor]:
    """One digit of each of the first classes: as trained on, as in the target, and as the learned rotation turns it.

    Args:
        run: The run whose data and angle are shown.
        number: Of classes.

    Returns:
        ``[N, H, W]`` for each kind of image.
    """
    (run.folder / "shown.yaml").write_text(yaml.safe_dump(run.settings), encoding="utf-8")
    task = build_task(read_recipe(str(run.folder / "shown.yaml"), []), ["input_rotation"])
    (run.folder / "shown.yaml").unlink()
    labels = np.array(task.train_dataset["labels"][:])
    rows = task.train_dataset[[int(np.argmax(labels == label)) for label in range(number)]]
    images = rows["pixel_values"]  # [N, 1, H, W]
    module = InputRotation.from_pretrained(run.folder / "meta_module")
    target = math.radians(run.settings["rotate_target_degrees"] - run.settings["rotate_train_degrees"])
    with torch.no_grad():
        turned = module.transform_batch({"pixel_values": images})["pixel_values"]
    return {
        "train": images[:, 0],
        "target": rotate(images, torch.tensor(target))[:, 0],
        "train, as learned": turned[:, 0],
    }


def draw(runs: Sequence[Run], shown: dict[str, torch.Tensor], file: Path) -> None:
    """Draw angles and digits."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    number = len(shown["train"])
    grid = figure.add_gridspec(len(shown), 1 + number, width_ratios=[5.5, *[1] * number])
    _draw_angles(figure.add_subplot(grid[:, 0]), runs)
    axes = [[figure.add_subplot(grid[i, 1 + j]) for j in range(number)] for i in range(len(shown))]
    colours = dict(zip(shown, ("black", COLOURS[1], COLOURS[0]), strict=True))
    for row, (kind, images) in zip(axes, shown.items(), strict=True):
        for panel, image in zip(row, images, strict=True):
            panel.imshow(image.numpy(), cmap="gray_r")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color(colours[kind])
            panel.spines[:].set_linewidth(1.5)
        row[0].set_ylabel(kind.replace(", ", ",\n"), color=colours[kind], rotation=0, ha="right", va="center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _draw_angles(axes: Axes, runs: Sequence[Run]) -> None:
    truth = runs[0].settings["rotate_target_degrees"] - runs[0].settings["rotate_train_degrees"]
    axes.axhline(truth, color=COLOURS[1], linestyle="--", linewidth=1.5)
    axes.annotate(
        f"angle of the target: {truth:g}°", (1, truth), (0, -14), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="top", color=COLOURS[1],
    )  # fmt: skip
    for run in runs:
        axes.plot(run.steps, run.angles, color=COLOURS[0], alpha=0.6, linewidth=1.2)
    last = [run.angles[-1] for run in runs]
    deviation = f" ± {np.std(last, ddof=1):.1f}°" if len(last) > 1 else "°"
    axes.set(xlabel="optimizer step", ylabel="learned angle in degrees")
    axes.set_title(f"{len(runs)} seeds end at {np.mean(last):.1f}{deviation}", color=COLOURS[0], loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a target, with a folder for each method")
    parser.add_argument("--method", required=True, help="name of the method")
    parser.add_argument("--digits", type=int, default=5, help="classes to show")
    parser.add_argument("--output", type=Path, default=FIGURE, help="PNG to write")
    options = parser.parse_args()
    runs = read_runs(options.folder / options.method.replace(" ", "_"))
    draw(runs, digits(runs[0], options.digits), options.output)
    print(options.output)


if __name__ == "__main__":
    main()
