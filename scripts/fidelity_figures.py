"""What the study shows: its tables, in the terminal or for a document, and its pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from pathlib import Path

import numpy as np
from fidelity_measures import Number, Row, Study
from fidelity_problems import EXAMPLES, NETWORK
from fidelity_settings import SIGN_SIGMA
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox
from rich.box import SIMPLE_HEAD
from rich.table import Table

from meta_trainer.report import COLOURS

KINDS = (NETWORK, EXAMPLES)
"""Meta-parameters that the pictures show, a row of panels for each."""

FAMILIES = {
    "guided": ("guided",),
    "finite difference": ("finite difference",),
    "T1-T2": ("T1-T2",),
    "guided, half": ("guided, half",),
    "signs": tuple(f"sign, K={k}" for k in (2, 4, 8, 16)),
    "antithetic,\northogonal": tuple(f"antithetic, orthogonal, K={k}" for k in (2, 4, 8, 16)),
}
"""What the picture of costs shows: label, and settings on one line."""

SHORT = {NETWORK: ", net", EXAMPLES: ", examples"}
"""Of the columns of tables that show both."""

CANDIDATES_OF = {5: "K=2", 7: "K=4", 11: "K=8", 19: "K=16"}
SERIES = {
    "guided": ("sigma", "guided", "-", COLOURS[0]),
    "guided,\nbfloat16": ("bfloat16", "guided", "--", COLOURS[5]),
    "signs, K=2": ("sigma", "sign, K=2", "-", COLOURS[1]),
    "signs, K=8": ("sigma", "sign, K=8", "-", COLOURS[2]),
}
"""Lines of the picture of sigma: label, then group, beginning of the settings' names, style and colour."""

AUTOMATIC, MEASURED = "guided, sigma=automatic", 1e-4
"""Guided noise of the default's length, and of the length beside which that is measured."""

LABEL_PLACES = [
    ((dx, dy), alignment)
    for dy in (0, 13, -13, 26, -26, 39, -39, 52, -52, 65, -65)
    for dx, alignment in ((9, "left"), (-9, "right"), *(((0, "center"),) if dy else ()))
]
"""Where a label may stand beside its point, in points, best first."""


@dataclass(frozen=True)
class TextTable:
    """A table before it is laid out; its first column holds names, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, box=SIMPLE_HEAD)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        lines = [self.headings, ("---", *["---:"] * (len(self.headings) - 1)), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(study: Study) -> Iterator[TextTable]:
    """Every table: what was judged, an overview, then group by group, and bias and scatter."""
    yield _subjects(study)
    yield from _overview(study)
    for (size, scope, module), rows in groupby(study.rows, key=lambda row: (row.size, row.scope, _module(row))):
        of_case = sorted(rows, key=lambda row: row.group)
        names = list(dict.fromkeys(row.group for row in study.rows))
        for group in names:
            chosen = [row for row in of_case if row.group == group]
            if chosen:
                yield _group(f"{size}, {module}, {scope}: {group}", chosen)
    if study.spreads:
        yield _spreads(study)


def _module(row: Row) -> str:
    return NETWORK if row.meta_params in KINDS else row.meta_params


def _subjects(study: Study) -> TextTable:
    headings = ("model", "scope", "θ", "λ", "dim λ", "effective dim", "agreement", "batches", "train loss", "meta loss")
    rows = [
        (
            s.size, s.scope, f"{s.theta:,}", s.meta_params, f"{s.num_meta_params:,}", f"{s.effective_dimension:.1f}",
            f"{s.agreement:.2f}", str(s.batches), f"{s.train_loss:.2f}", f"{s.val_loss:.2f}",
        )
        for s in study.subjects
    ]  # fmt: skip
    return TextTable("What is judged", headings, rows)


def _overview(study: Study) -> Iterator[TextTable]:
    chosen = [row for row in study.rows if row.group == "estimators"]
    columns = list(dict.fromkeys((row.size, row.scope, row.meta_params) for row in chosen))
    if not chosen:
        return
    found = {(row.size, row.scope, row.meta_params, row.setting): row for row in chosen}
    settings = list(dict.fromkeys(row.setting for row in chosen))
    passes = {row.setting: row.passes for row in reversed(chosen)}
    rows = [
        (name, str(passes[name]), *(_short(found[*column, name].cosine) for column in columns)) for name in settings
    ]
    headings = ("setting", "passes", *(f"{size}, {scope}, {kind}" for size, scope, kind in columns))
    yield TextTable("Cosine with the exact hypergradient", headings, rows)


def _group(title: str, rows: Sequence[Row]) -> TextTable:
    kinds = list(dict.fromkeys(row.meta_params for row in rows))
    headings = ["setting", "passes"]
    for kind in kinds:
        name = SHORT.get(kind, "")
        headings += [f"cosine{name}", *([f"of the mean{name}"] if kind != EXAMPLES else []), f"right signs{name}"]
    cells = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        numbers = [number for row in own for number in _numbers(row)]
        cells.append((setting, str(own[0].passes), *numbers, f"{own[0].largest_weight[0]:.3f}"))
    return TextTable(title, (*headings, "largest weight"), cells)


def _numbers(row: Row) -> list[str]:
    # In another batch, the i-th weight is that of another example.
    of_mean = [_short(row.cosine_of_mean)] if row.meta_params != EXAMPLES else []
    return [_long(row.cosine), *of_mean, _short(row.right_signs)]


def _spreads(study: Study) -> TextTable:
    rows = [
        (s.setting, s.size, s.meta_params, str(s.seeds), f"{s.projection:.3g}", _short(s.bias), _short(s.scatter))
        for s in study.spreads
    ]
    headings = ("setting", "model", "λ", "estimates", "projection", "bias", "scatter")
    return TextTable("Bias and scatter, relative to the exact hypergradient", headings, rows)


def _short(number: Number) -> str:
    return f"{number[0]:.2f} ± {number[1]:.2f}"


def _long(number: Number) -> str:
    return f"{number[0]:.3f} ± {number[1]:.3f}"


def draw(study: Study, folder: Path) -> list[Path]:
    """Draw what there are numbers for, as PNG; return where the pictures are."""
    rows = [row for row in study.rows if row.scope == "all" and row.meta_params in KINDS]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, group, draw_figure in (
        ("fidelity", "estimators", _draw_costs),
        ("sigma", "sigma", _draw_sigmas),
    ):
        sizes = list(dict.fromkeys(row.size for row in rows if row.group == group))
        if sizes:
            paths.append(folder / f"estimators_{name}.png")
            draw_figure(rows, sizes).savefig(paths[-1], format="png", dpi=150)
    return paths


def _figure(sizes: Sequence[str], rows: Sequence[Row]) -> tuple[Figure, np.ndarray]:
    """Panels with common axes: a column for each size, a row for each kind of meta-parameters."""
    figure = Figure(figsize=(1.2 + 4 * len(sizes), 7.6), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    panels = figure.subplots(len(KINDS), len(sizes), sharex=True, sharey=True, squeeze=False)
    lowest = min(row.cosine[0] for row in rows)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        axes.tick_params(labelsize=11)
        axes.set_ylim(min(lowest, 0.0) - 0.15, 1.15)
    for axes, size in zip(panels[0], sizes, strict=True):
        axes.set_title(f"{size} parameters", fontsize=13)
    for axes, kind in zip(panels[:, 0], KINDS, strict=True):
        axes.set_ylabel(f"cosine, {kind}", fontsize=12)
    return figure, panels


def _draw_costs(rows: Sequence[Row], sizes: Sequence[str]) -> Figure:
    """Cosine against cost, with the Pareto front."""
    shown = [row for row in rows if row.group == "estimators"]
    figure, panels = _figure(sizes, shown)
    lines = []
    for axes, own in _cells(panels, sizes, shown):
        by_name = {row.setting: row for row in own}
        front = pareto_front([(row.passes, row.cosine[0]) for row in own])
        axes.step(*zip(*front, (20, front[-1][1]), strict=True), where="post", color="0.8", linewidth=5, zorder=0)
        axes.set_xscale("log")
        axes.set_xticks([5, 7, 8, 11, 19], [f"{cost}\n{CANDIDATES_OF.get(cost, '')}" for cost in (5, 7, 8, 11, 19)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(3.9, 23)
        for (label, settings), colour in zip(FAMILIES.items(), COLOURS, strict=False):
            line = [by_name[name] for name in settings]
            lines.append(Line(axes, label, colour, [row.passes for row in line], [row.cosine for row in line]))
            lines[-1].draw("D-" if label == "finite difference" else "o-", 7)
    for axes in panels[-1]:
        axes.set_xlabel("cost, in passes over a batch (a base step: 3)", fontsize=12)
    figure.suptitle("Bars: standard errors. Grey: the Pareto front.", fontsize=12)
    _label(figure, lines)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, quality), the points that no other is both as cheap and better than; in order of cost."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def _draw_sigmas(rows: Sequence[Row], sizes: Sequence[str]) -> Figure:
    """Cosine against the standard deviation of the perturbations; large points are defaults."""
    figure, panels = _figure(sizes, [row for row in rows if row.value is not None])
    lines = []
    for axes, of_panel in _cells(panels, sizes, rows):
        axes.set_xscale("log")
        axes.set_xlim(5e-7, 1.0)
        for label, (group, beginning, style, colour) in SERIES.items():
            own = [r for r in of_panel if r.group == group and r.setting.startswith(f"{beginning}, sigma=")]
            values = {row.value: row.cosine for row in own if row.value is not None}
            if values:
                lines.append(Line(axes, label, colour, list(values), list(values.values())))
                lines[-1].draw(f"o{style}", 4)
                axes.plot(*_default(own), "o", color=colour, markersize=10)
    for axes in panels[-1]:
        axes.set_xlabel("sigma (large point: the default)", fontsize=12)
    figure.suptitle("Bars: standard errors.", fontsize=12)
    _label(figure, lines)
    return figure


def _default(rows: Sequence[Row]) -> tuple[float, float]:
    """Sigma and cosine of the default among the rows of a series; that of guided noise is the median of its lengths."""
    by_name = {row.setting: row for row in rows}
    if AUTOMATIC not in by_name:
        return next((SIGN_SIGMA, row.cosine[0]) for row in rows if row.value == SIGN_SIGMA)
    automatic, measured = by_name[AUTOMATIC], next(row for row in rows if row.value == MEASURED)
    # Along one direction, scores are as long as the perturbations.
    ratios = np.divide(automatic.largest_scores, measured.largest_scores)
    return MEASURED * float(np.median(ratios)), automatic.cosine[0]


def _cells(panels: np.ndarray, sizes: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[Axes, list[Row]]]:
    """Every panel and what it shows."""
    for i, kind in enumerate(KINDS):
        for j, size in enumerate(sizes):
            yield panels[i, j], [row for row in rows if (row.meta_params, row.size) == (kind, size)]


@dataclass(frozen=True)
class Line:
    """Points of one colour, and what is written beside one of them."""

    axes: Axes
    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[Number]

    def draw(self, style: str, size: float) -> None:
        """Draw the points with their errors; diamonds are hollow, around others."""
        hollow = style.startswith("D")
        self.axes.errorbar(
            self.x,
            [value for value, _ in self.y],
            [error for _, error in self.y],
            fmt=style,
            color=self.colour,
            markersize=11 if hollow else size,
            fillstyle="none" if hollow else "full",
            linewidth=1.5,
        )

    def places(self) -> list[tuple[float, float]]:
        """Points, the last one first."""
        return [(x, value) for x, (value, _) in zip(self.x, self.y, strict=True)][::-1]

    def obstacles(self) -> Iterator[Bbox]:
        """Small boxes, in pixels, along the line and its errors."""
        paths = [self.places(), *([(x, v - e), (x, v + e)] for x, (v, e) in zip(self.x, self.y, strict=True))]
        for path in paths:
            corners = self.axes.transData.transform(path)
            for start, end in pairwise([corners[0], *corners]):
                for share in np.linspace(0, 1, 12):
                    point = start + share * (end - start)
                    yield Bbox([point - 4, point + 4])


def _label(figure: Figure, lines: Sequence[Line]) -> None:
    """Write each label beside a point of its line, the last one if possible, where nothing else is."""
    # Only the finished layout tells which labels would overlap.
    figure.draw_without_rendering()
    taken: dict[Axes, list[Bbox]] = {}
    for line in lines:
        taken.setdefault(line.axes, []).extend(line.obstacles())
    for line in lines:
        label = line.axes.annotate(line.label, (0, 0), (0, 0), textcoords="offset points", va="center", fontsize=12)
        label.set(color=[0.7 * part for part in to_rgb(line.colour)], linespacing=0.9)  # darker, to be read
        for point, (offset, alignment) in product(line.places(), LABEL_PLACES):
            label.xy, label.xyann = point, offset
            label.set_horizontalalignment(alignment)
            box = label.get_window_extent()
            if line.axes.bbox.count_contains(box.corners()) == 4 and not any(map(box.overlaps, taken[line.axes])):
                break
        taken[line.axes].append(box)


def markdown(study: Study) -> str:
    """All tables, for a document."""
    return "\n\n".join(table.markdown() for table in tables(study))
