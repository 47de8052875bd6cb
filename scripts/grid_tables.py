"""The tables of a grid: from what its runs reached to Markdown. No number in them is typed by hand."""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """What one run reached.

    Attributes:
        method: The method's name in the tables.
        target: What it was run on.
        seed: Of the run.
        recipe: Name of its recipe.
        overrides: The settings that it changed.
        scores: Metrics on the test set, and the last values of what the meta module logged.
        step_ms: Median time of an optimizer step.
        peak_memory_mib: Peak memory of a step.
        steps: Optimizer steps.
        seconds: Of the training.
        environment: Versions, device and threads.
    """

    method: str
    target: str
    seed: int
    recipe: str
    overrides: dict[str, Any]
    scores: dict[str, float]
    step_ms: float
    peak_memory_mib: float
    steps: int
    seconds: float
    environment: dict[str, str]


@dataclass(frozen=True)
class Presentation:
    """How a grid's runs are shown.

    Attributes:
        metric: The score that is compared, in percent of 1 and higher for better.
        groups: Targets that go into one table and are averaged, by its heading; all targets by default.
        baselines: Methods that all others, and the baselines after them, are compared with, pair by pair; the first
            method by default.
        columns: More columns, by their heading: a metric, or a value that the meta module logs.
        percent: Whether the metric is a fraction that is shown in percent.
        paper: For the overview: `row` (what the paper calls it), `module`, `group` (a heading of `groups` or a target;
            all targets by default), `numbers` (the paper's) and `remark` (where it falls short; none by default).
        front_page: For the page that the project is entered by: `application`, in words, and `learned`, the method that
            is shown. Group and module are those of `paper`.
    """

    metric: str = "accuracy"
    groups: dict[str, list[str]] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    percent: bool = True
    paper: dict[str, str] = field(default_factory=dict)
    front_page: dict[str, str] = field(default_factory=dict)


def markdown_tables(
    runs: Sequence[Run], methods: Sequence[str], targets: Sequence[str], presentation: Presentation
) -> str:
    """A table for each group of targets, what the methods gained over the baselines, and every row's command.

    What has not been run yet, be it a group, a target or a method, is left out.

    Args:
        runs: Those that have ended.
        methods: In the order of the rows.
        targets: In the order of the columns.
        presentation: What to show.
    """
    groups = presentation.groups or {"": list(targets)}
    parts = []
    for heading, names in groups.items():
        own = [run for run in runs if run.target in names]
        if not own:
            continue
        rows = [method for method in methods if any(run.method == method for run in own)]
        columns = [target for target in names if any(run.target == target for run in own)]
        if heading:
            parts.append(f"**{heading}**\n")
        parts.append(_table(own, rows, columns, presentation))
        parts.append("\n".join([*_differences(own, rows, presentation), _devices(own)]) + "\n")
    return "\n".join([*parts, _commands(runs, methods)])


def _table(runs: Sequence[Run], methods: Sequence[str], targets: Sequence[str], presentation: Presentation) -> str:
    """Mean and standard deviation over seeds for each method and target, and what a step costs.

    Costs are medians over the targets that every method ran on, so that rows can be compared.
    """
    averaged = ["mean"] if len(targets) > 1 else []
    headings = ["method", *targets, *averaged, *presentation.columns, "ms per step", "peak MiB"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    ran = {method: {run.target for run in runs if run.method == method} for method in methods}
    common = set.intersection(*(names for names in ran.values() if names)) if any(ran.values()) else set()
    for method in methods:
        own = [run for run in runs if run.method == method]
        values = [_scores(own, target, presentation) for target in targets]
        mean = [f"{statistics.mean(map(statistics.mean, values)):.2f}" if all(values) else ""] if averaged else []
        more = [_figures([run.scores[key] for run in own if run.scores.get(key) is not None])
                for key in presentation.columns.values()]  # fmt: skip
        costs = [_median([getattr(run, key) for run in own if run.target in common])
                 for key in ("step_ms", "peak_memory_mib")]  # fmt: skip
        lines.append(f"| {' | '.join([method, *map(_mean_and_deviation, values), *mean, *more, *costs])} |")
    return "\n".join([*lines, ""])


def _differences(runs: Sequence[Run], methods: Sequence[str], presentation: Presentation) -> list[str]:
    """Every method against each baseline, on the same targets and seeds."""
    scores = {(r.method, r.target, r.seed): _scores([r], r.target, presentation) for r in runs}
    baselines = presentation.baselines or list(methods[:1])
    lines = []
    for place, baseline in enumerate(baselines):
        for method in methods:
            pairs = [
                (value[0], reference[0])
                for (name, target, seed), value in scores.items()
                if name == method and value and (reference := scores.get((baseline, target, seed)))
            ]
            if method in baselines[: place + 1] or len(pairs) < 2:
                continue
            differences = [value - reference for value, reference in pairs]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            lines.append(
                f"{method} − {baseline}: {statistics.mean(differences):+.2f} ± {error:.2f} "
                f"(standard error over {len(differences)} pairs of target and seed).  "
            )
    return lines


def _devices(runs: Sequence[Run]) -> str:
    """Where the runs were made."""
    return f"Device: {', '.join(sorted({run.environment['device'] for run in runs}))}."


def _commands(runs: Sequence[Run], methods: Sequence[str]) -> str:
    """What each row was run with, for its first target and seed."""
    first = {run.method: run for run in reversed(runs)}
    lines = [f"# {method}\n{command(first[method])}" for method in methods if method in first]
    summary = "<details><summary>commands (first column, first seed)</summary>"
    return "\n".join([summary, "", "```bash", *lines, "```", "", "</details>"])


def command(run: Run) -> str:
    """The command line of a run."""
    changes = [f"--{key} {_argument(value)}" for key, value in run.overrides.items()]
    return f"meta-trainer train --config {run.recipe} {' '.join(changes)}"


def _argument(value: Any) -> str:
    if value is None:
        return "none"
    values = value if isinstance(value, list) else [value]
    # A variable is for the shell to fill in.
    return " ".join(str(v) if str(v).startswith("$") else shlex.quote(_text(v)) for v in values)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Entry = tuple[Presentation, Sequence[str], Sequence[Run]]
"""Presentation, methods in order, and runs of a grid."""


def overview(entries: Sequence[Entry]) -> str:
    """Name in the paper, meta module, recipes, our result, a remark and the paper's result; a row for each entry."""
    lines = ["| paper | meta module | recipes | result here | remark | paper's result |", "|---|---|---|---|---|---|"]
    for presentation, methods, runs in entries:
        paper = presentation.paper
        if not paper:
            continue
        results = [f"{method} {mean:.1f}" for method, mean in _means(presentation, methods, runs).items()]
        ours = [paper["row"], f"`{paper['module']}`", _folder(runs), "; ".join(results)]
        lines.append(f"| {' | '.join([*ours, paper.get('remark', ''), paper['numbers']])} |")
    return "\n".join(lines)


def front_page(entries: Sequence[Entry]) -> str:
    """Plain training, the better of the further baselines, and what a meta module reached, the highest in bold.

    A row for each entry that has something to say on the front page, if it and plain training have been run.
    """
    lines = ["| application | plain training | best other baseline | learned | by |", "|---|---|---|---|---|"]
    for presentation, methods, runs in entries:
        learned, means = presentation.front_page.get("learned"), _means(presentation, methods, runs)
        plain, *others = presentation.baselines or methods[:1]
        if learned not in means or plain not in means:
            continue
        known = [name for name in others if name in means]
        shown = [plain, max(known, key=means.__getitem__, default=None), learned]
        highest = max(means[name] for name in shown if name)
        values = ["" if name is None else f"{means[name]:.1f}" for name in shown]
        values = [f"**{value}**" if value == f"{highest:.1f}" else value for value in values]
        values[1] += f" {shown[1]}" if shown[1] else ""
        by = f"`{presentation.paper['module']}`, {_folder(runs, 'recipes/')}"
        lines.append(f"| {' | '.join([presentation.front_page['application'], *values, by])} |")
    return "\n".join(lines)


def _means(presentation: Presentation, methods: Sequence[str], runs: Sequence[Run]) -> dict[str, float]:
    """Of every method that ran on all targets of the paper's group: the mean over them, seeds averaged before."""
    have_run = list(dict.fromkeys(run.target for run in runs))
    group = presentation.paper.get("group")
    targets = [t for t in presentation.groups.get(group, [group]) if t in have_run] if group else have_run
    means = {}
    for method in methods:
        values = [_scores([r for r in runs if r.method == method], target, presentation) for target in targets]
        if values and all(values):
            means[method] = statistics.mean(map(statistics.mean, values))
    return means


def _folder(runs: Sequence[Run], prefix: str = "") -> str:
    folder = runs[0].recipe.split("/")[0]
    return f"[`{folder}`]({prefix}{folder})"


def write_between_marks(file: Path, title: str, text: str) -> None:
    """Put a text between two marks in a Markdown file.

    Raises:
        ValueError: If the file lacks the marks.
    """
    begin, end = f"<!-- begin: {title} -->", f"<!-- end: {title} -->"
    content = file.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{file} should hold the lines {begin!r} and {end!r}, where the table goes.")
    before, after = content.split(begin)[0], content.split(end)[1]
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _scores(runs: Sequence[Run], target: str, presentation: Presentation) -> list[float]:
    factor = 100 if presentation.percent else 1
    values = [run.scores.get(presentation.metric) for run in runs if run.target == target]
    return [factor * value for value in values if value is not None]


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def _figures(values: Sequence[float]) -> str:
    """Mean and standard deviation with three figures of the mean, and two decimals at least."""
    mean = abs(statistics.mean(values)) if values else 0.0
    return _mean_and_deviation(values, max(2, 2 - math.floor(math.log10(mean))) if mean else 2)


def _mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
