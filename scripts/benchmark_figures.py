"""What the benchmark shows: its rows as a JSON file, as tables and as pictures."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_methods import METHODS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox
from rich.box import SIMPLE_HEAD
from rich.table import Table

from meta_trainer.report import COLOURS, environment

AXES = {"sizes": "hidden size", "candidates": "candidates K", "meta_every": "steps per meta step"}
"""What a sweep varies; the sweep over methods and modules varies no number."""

MODULE_TITLES = {
    "mwn": "MetaWeightNet (loss)",
    "rtn": "RepresentationTransform (last layer)",
    "hook": "feature-wise noise (every layer)",
}
HEADINGS = ("method", "ms", "time ×", "quartiles", "CPU ×", "step MiB", "step ×", "peak GiB", "peak ×")

LABEL_PLACES = [
    ((dx, dy), alignment)
    for dy in (0, 12, -12, 24, -24, 36, -36)
    for dx, alignment in ((8, "left"), (-8, "right"), *(((0, "center"),) if dy else ()))
]
"""Where a label may stand beside its point, in points, best first."""

COLOUR_OF = dict(zip((method.name for method in METHODS), (COLOURS[-1], *COLOURS[:-1], "#7F7F7F"), strict=True))
"""Of each method, in every picture; black for the plain step."""


@dataclass(frozen=True)
class Row:
    """Cost of a training iteration of one method, beside a plain step of the same rounds.

    Attributes:
        shape: Name of the model's shape.
        sweep: Name of the sweep.
        module: Name of the meta module.
        value: Of what the sweep varies; None in the sweep over methods.
        method: Name of the method.
        cycle: Steps after which meta steps repeat; what is said about time are averages over as many.
        wall_ms: Wall time of each round's step, in milliseconds.
        cpu_ms: CPU time likewise.
        plain_wall_ms: Wall time of the plain step in the same rounds.
        plain_cpu_ms: CPU time likewise.
        step_bytes: Peak of the bytes of one step above those alive before it; of a step with a meta step.
        held_bytes: Parameters, buffers and optimizer states, which live from step to step.
        plain_step_bytes: Those of the plain step.
        plain_held_bytes: Those of the plain training.
    """

    shape: str
    sweep: str
    module: str
    value: int | None
    method: str
    cycle: int
    wall_ms: list[float]
    cpu_ms: list[float]
    plain_wall_ms: list[float]
    plain_cpu_ms: list[float]
    step_bytes: int
    held_bytes: int
    plain_step_bytes: int
    plain_held_bytes: int

    @property
    def time_ms(self) -> list[float]:
        """Quartiles of the wall time of an iteration."""
        return _quartiles(self._cycles(self.wall_ms))

    @property
    def time_ratio(self) -> list[float]:
        """Quartiles of the wall time as a multiple of the plain step's."""
        return _quartiles(self._cycles(self.wall_ms) / self._cycles(self.plain_wall_ms))

    @property
    def cpu_ratio(self) -> list[float]:
        """Quartiles of the CPU time as a multiple of the plain step's."""
        return _quartiles(self._cycles(self.cpu_ms) / self._cycles(self.plain_cpu_ms))

    @property
    def step_memory_ratio(self) -> float:
        """Memory above what was held before the step, as a multiple of the plain step's."""
        return self.step_bytes / self.plain_step_bytes

    @property
    def peak_bytes(self) -> int:
        """What is held and what the step needs above it."""
        return self.held_bytes + self.step_bytes

    @property
    def peak_memory_ratio(self) -> float:
        """Peak memory as a multiple of the plain training's."""
        return self.peak_bytes / (self.plain_held_bytes + self.plain_step_bytes)

    @property
    def label(self) -> str:
        """What tells this row's group from the others of its sweep."""
        return self.module if self.value is None else str(self.value)

    def _cycles(self, times: Sequence[float]) -> np.ndarray:
        """Mean time of a step in each whole cycle."""
        return np.asarray(times).reshape(-1, self.cycle).mean(axis=1)


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])]


SUMMARY = ("time_ms", "time_ratio", "cpu_ratio", "step_memory_ratio", "peak_bytes", "peak_memory_ratio")
"""Properties of a row that the JSON file holds beside the raw numbers."""


def write_rows(rows: Sequence[Row], path: Path, settings: dict[str, Any]) -> None:
    """Write the rows, raw and summed up, the settings and the environment as JSON."""
    content = {
        "environment": environment(),
        "settings": settings,
        "rows": [{**asdict(row), "summary": {name: getattr(row, name) for name in SUMMARY}} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read the rows back; the summary follows from the raw numbers."""
    names = [field.name for field in fields(Row)]
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**{name: row[name] for name in names}) for row in rows]


def sweeps(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Each shape and sweep with its rows."""
    for (shape, sweep), group in groupby(rows, key=lambda row: (row.shape, row.sweep)):
        yield shape, sweep, list(group)


def rich_table(shape: str, sweep: str, rows: Sequence[Row]) -> Table:
    """Lay out one row a method, for the terminal."""
    table = Table(title=f"{shape}: {sweep}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (AXES.get(sweep, "module"), *HEADINGS):
        is_text = heading == "method"
        # Headings take two lines, so that the numbers fit a terminal of 80 columns.
        table.add_column(heading.replace(" ", "\n"), justify="left" if is_text else "right", no_wrap=not is_text)
    for label, group in groupby(rows, key=lambda row: row.label):
        for row in group:
            table.add_row(label, *_cells(row))
        table.add_section()
    return table


def markdown_table(sweep: str, rows: Sequence[Row]) -> str:
    """The same for a document."""
    headings = (AXES.get(sweep, "module"), *HEADINGS)
    lines = [headings, ("---:", "---", *["---:"] * (len(HEADINGS) - 1)), *((row.label, *_cells(row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> list[str]:
    low, median, high = row.time_ratio
    return [
        row.method,
        f"{row.time_ms[1]:.1f}",
        f"{median:.2f}",
        f"{low:.2f}–{high:.2f}",
        f"{row.cpu_ratio[1]:.2f}",
        f"{row.step_bytes / 2**20:.1f}",
        f"{row.step_memory_ratio:.2f}",
        f"{row.peak_bytes / 2**30:.2f}",
        f"{row.peak_memory_ratio:.2f}",
    ]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw one picture for each shape and sweep, as PNG; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shape, sweep, group in sweeps(rows):
        figure = _draw_curves(group, AXES[sweep]) if sweep in AXES else _draw_scatter(group)
        figure.suptitle(f"Cost of a training iteration, {shape}", fontsize="medium")
        paths.append(folder / f"{shape}_{sweep}.png")
        figure.savefig(paths[-1], format="png", dpi=150)
    return paths


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.4 * panels, 4.0), layout=ConstrainedLayoutEngine(w_pad=0.1))
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curves(rows: Sequence[Row], xlabel: str) -> Figure:
    """Time, memory of a step and peak memory against what the sweep varies, a line for each method."""
    ratios: dict[str, Callable[[Row], list[float]]] = {
        "time of an iteration": lambda row: row.time_ratio,
        "memory of a step": lambda row: [row.step_memory_ratio] * 3,
        "peak memory": lambda row: [row.peak_memory_ratio] * 3,
    }
    figure, panels = _figure(len(ratios))
    for axes, (title, ratio) in zip(panels, ratios.items(), strict=True):
        for method in dict.fromkeys(row.method for row in rows):
            own = [row for row in rows if row.method == method]
            values = [row.value for row in own if row.value is not None]
            low, median, high = zip(*(ratio(row) for row in own), strict=True)
            style = "--" if method == "plain" else "o-"
            axes.plot(values, median, style, color=COLOUR_OF[method], markersize=4, label=method)
            axes.fill_between(values, low, high, color=COLOUR_OF[method], alpha=0.15, linewidth=0)
        _label_values(axes, sorted({row.value for row in rows if row.value is not None}))
        axes.set(title=title, xlabel=xlabel, ylabel="× plain step")
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _label_values(axes: Axes, values: Sequence[int]) -> None:
    """Label the measured values alone, evenly spaced where each doubles the one before."""
    if all(after == 2 * before for before, after in pairwise(values)):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_scatter(rows: Sequence[Row]) -> Figure:
    """Time against memory, a labelled point for each method and a panel for each module; cheap is lower left."""
    modules = list(dict.fromkeys(row.module for row in rows))
    figure, panels = _figure(len(modules))
    for axes, module in zip(panels, modules, strict=True):
        own = [row for row in rows if row.module == module]
        for row in own:
            low, median, high = row.time_ratio
            colour, height = COLOUR_OF[row.method], row.step_memory_ratio
            axes.plot([low, high], [height, height], color=colour, linewidth=1)
            axes.plot(median, height, "o", color=colour, markersize=6)
        axes.set(title=MODULE_TITLES[module], xlabel="time, × plain step", ylabel="memory of a step, × plain step")
        axes.set_xlim(0, 1.25 * max(row.time_ratio[2] for row in own))
        axes.set_ylim(0, 1.15 * max(row.step_memory_ratio for row in own))
    # Only the finished layout tells which labels would overlap.
    figure.draw_without_rendering()
    for axes, module in zip(panels, modules, strict=True):
        _label_points(axes, [row for row in rows if row.module == module])
    return figure


def _label_points(axes: Axes, rows: Sequence[Row]) -> None:
    """Write each method beside its point, at the first place that no other label or point takes."""
    ends = [[(row.time_ratio[side], row.step_memory_ratio) for row in rows] for side in (0, 2)]
    lefts, rights = (axes.transData.transform(end) for end in ends)
    taken = [Bbox([left - 5, right + 5]) for left, right in zip(lefts, rights, strict=True)]  # in pixels
    for row in rows:
        point = (row.time_ratio[1], row.step_memory_ratio)
        label = axes.annotate(row.method, point, (0, 0), textcoords="offset points", va="center", fontsize="small")
        label.set_color(COLOUR_OF[row.method])
        for label.xyann, alignment in LABEL_PLACES:
            label.set_horizontalalignment(alignment)
            box = label.get_window_extent()
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not any(map(box.overlaps, taken)):
                break
        taken.append(box)
