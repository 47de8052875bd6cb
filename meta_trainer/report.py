"""What a comparison of methods leaves behind: a table, a JSON file and a picture."""

import json
import math
import platform
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table

from meta_trainer.version import __version__

REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "seqeval",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "numpy",
)
# Okabe and Ito, Color Universal Design, 2008: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MISSING = "–"
SUMMARY = "meta_module/"
"""Prefix under which a run logs `MetaModule.summary`."""


@dataclass(frozen=True)
class MethodResult:
    """What one method reached and what it cost.

    Attributes:
        name: The method, as a reader should see it.
        metrics: Scores on the test set, by name.
        step_ms: Time of an optimizer step in milliseconds; nan when not measured.
        peak_memory_mib: Peak memory of a step in MiB; nan when not measured.
        steps: Optimizer steps taken.
        seconds: Wall time of the training.
        history: ``trainer.state.log_history``.
    """

    name: str
    metrics: dict[str, float]
    step_ms: float
    peak_memory_mib: float
    steps: int
    seconds: float
    history: list[dict[str, float]]


def environment() -> dict[str, str]:
    """Return the versions, the device and the number of threads that numbers depend on."""
    on_cuda = torch.cuda.is_available()
    return {
        "meta-trainer": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in REPORTED_PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if on_cuda else f"CPU ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def results_table(results: Sequence[MethodResult], metric: str, title: str) -> Table:
    """Lay out one row a method: metric, time per step, peak memory; in brackets, relative to the first row.

    Raises:
        ValueError: Where there is no result, or one without ``metric``.
    """
    _check_metric(results, metric)
    table = Table(title=title)
    table.add_column("method")
    for heading in (_label(metric), "time per step", "peak memory"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            _number(result.metrics[metric], "{:.4f}"),
            _cost(result.step_ms, results[0].step_ms, "{:.1f} ms"),
            _cost(result.peak_memory_mib, results[0].peak_memory_mib, "{:.1f} MiB"),
        )
    return table


def write_results(results: Sequence[MethodResult], path: Path, **extra: Any) -> None:
    """Write the results, the environment and ``extra`` as JSON; a number that is not finite is ``null``."""
    content = dict(environment=environment(), results=[asdict(result) for result in results], **extra)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def draw_results(results: Sequence[MethodResult], metric: str, path: Path) -> None:
    """Draw losses, metric and meta-parameters during training and the final metric of each method, as a PNG.

    A panel without anything to show is left out.

    Raises:
        ValueError: Where there is no result, or one without ``metric``.
    """
    _check_metric(results, metric)
    panels: list[Callable[[Axes], None]] = []
    if any(_curve(result, key)[0] for result in results for key in ("loss", "meta/loss")):
        panels.append(lambda axes: _draw_losses(axes, results))
    if any(_curve(result, f"eval_{metric}")[0] for result in results):
        panels.append(lambda axes: _draw_metric(axes, results, metric))
    if any(_summaries(result) for result in results):
        panels.append(lambda axes: _draw_summaries(axes, results))
    panels.append(lambda axes: _draw_bars(axes, results, metric))

    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout=ConstrainedLayoutEngine(w_pad=0.1))
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _check_metric(results: Sequence[MethodResult], metric: str) -> None:
    if not results:
        raise ValueError("Expected the result of at least one method, got none.")
    for result in results:
        if metric not in result.metrics:
            raise ValueError(
                f"Expected the metric {metric!r} of method {result.name!r}, got only "
                f"{', '.join(sorted(result.metrics)) or 'none'}. Name one of these."
            )


def _label(metric: str) -> str:
    return metric[:1].upper() + metric[1:].replace("_", " ")


def _number(value: float, pattern: str) -> str:
    return pattern.format(value) if math.isfinite(value) else MISSING


def _cost(value: float, reference: float, pattern: str) -> str:
    ratio = value / reference if reference else math.nan
    return (
        f"{_number(value, pattern)} {_number(ratio, '({:.2f}×)')}" if math.isfinite(ratio) else _number(value, pattern)
    )


def _finite(value: Any) -> Any:
    """Copy nested values, numpy scalars as Python ones and numbers that JSON cannot hold as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curve(result: MethodResult, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under ``key``."""
    rows = [row for row in result.history if key in row and math.isfinite(row[key])]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _line_label(result: MethodResult, name: str, results: Sequence[MethodResult]) -> str:
    """What a line shows, and of which method where there are several."""
    return name if len(results) == 1 else f"{result.name}, {name}"


def _draw_losses(axes: Axes, results: Sequence[MethodResult]) -> None:
    for i, result in enumerate(results):
        for key, name, style in (("loss", "training", "-"), ("meta/loss", "meta", "--")):
            steps, values = _curve(result, key)
            if steps:
                label = _line_label(result, name, results)
                axes.plot(steps, values, style, color=_colour(i), label=label, **_marker(steps))
    axes.set(title="Loss", xlabel="optimizer step", ylabel="loss")
    axes.legend(frameon=False, fontsize="small")


def _draw_metric(axes: Axes, results: Sequence[MethodResult], metric: str) -> None:
    for i, result in enumerate(results):
        steps, values = _curve(result, f"eval_{metric}")
        if steps:
            axes.plot(steps, values, color=_colour(i), label=result.name, **_marker(steps))
    axes.set(
        title=f"{_label(metric)} during training",
        xlabel="optimizer step",
        ylabel=f"validation {_label(metric)}",
    )
    axes.legend(frameon=False, fontsize="small")


def _summaries(result: MethodResult) -> list[str]:
    """Keys of what the meta module said of its parameters, in the order of their first log."""
    return list(dict.fromkeys(key for row in result.history for key in row if key.startswith(SUMMARY)))


def _draw_summaries(axes: Axes, results: Sequence[MethodResult]) -> None:
    curves = [(result, key) for result in results for key in _summaries(result)]
    for i, (result, key) in enumerate(curves):
        steps, values = _curve(result, key)
        name = _label(key.removeprefix(SUMMARY))
        axes.plot(steps, values, color=_colour(i), label=_line_label(result, name, results), **_marker(steps))
    axes.set(title="Learned meta-parameters", xlabel="optimizer step", ylabel="value")
    axes.legend(frameon=False, fontsize="small")


def _draw_bars(axes: Axes, results: Sequence[MethodResult], metric: str) -> None:
    values = [result.metrics[metric] for result in results]
    heights = [value if math.isfinite(value) else 0.0 for value in values]
    positions = range(len(results))
    bars = axes.bar(positions, heights, width=0.6, color=[_colour(i) for i in positions])
    axes.bar_label(bars, labels=[_number(value, "{:.3f}") for value in values], padding=3)
    axes.set_xticks(positions, [textwrap.fill(result.name, 12) for result in results])
    axes.set_xlim(-0.75, len(results) - 0.25)
    axes.margins(y=0.12)
    axes.set(title=f"Final {_label(metric)}", ylabel=f"test {_label(metric)}")


def _marker(steps: list[float]) -> dict[str, Any]:
    """Show the points where they are few: a line through one point would be invisible."""
    return {"marker": "o", "markersize": 4} if len(steps) <= 20 else {}
