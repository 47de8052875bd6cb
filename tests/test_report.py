import json
import math
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console

from meta_trainer import report
from meta_trainer.report import COLOURS, MethodResult, draw_results, environment, results_table, write_results

HISTORY = [
    {"loss": 2.0, "step": 10, "epoch": 0.5},
    {"eval_loss": 1.9, "eval_f1": 0.3, "step": 10, "epoch": 0.5},
    {"loss": 1.0, "step": 20, "epoch": 1.0},
    {"eval_loss": 1.5, "eval_f1": 0.6, "step": 20, "epoch": 1.0},
    {"train_loss": 1.5, "train_runtime": 3.0, "step": 20, "epoch": 1.0},
]
META_HISTORY = [{**row, "meta/loss": row["loss"] + 1} if "loss" in row else row for row in HISTORY]


def result(name: str = "joint training", **changes) -> MethodResult:
    values = {"metrics": {"f1": 0.5}, "step_ms": 40.0, "peak_memory_mib": 100.0, "steps": 20, "seconds": 3.0}
    return MethodResult(**{"name": name, "history": HISTORY, **values, **changes})


def printed(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def figures(record_figures) -> list[Figure]:
    """The figures that are drawn, in order."""
    return record_figures(report)


def test_the_table_has_one_row_a_method_with_costs_relative_to_the_first():
    evograd = result("EvoGrad", metrics={"f1": 0.75}, step_ms=60.0, peak_memory_mib=125.0)
    text = printed(results_table([result(), evograd], "f1", "English to Finnish"))
    assert "English to Finnish" in text
    row = next(line for line in text.splitlines() if "EvoGrad" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["EvoGrad", "0.7500", "60.0 ms (1.50×)", "125.0 MiB (1.25×)"]


def test_the_table_shows_a_dash_where_nothing_was_measured():
    text = printed(results_table([result(step_ms=math.nan), result("EvoGrad")], "f1", "title"))
    rows = [line for line in text.splitlines() if "joint" in line or "EvoGrad" in line]
    assert [row.split("│")[3].strip() for row in rows] == ["–", "40.0 ms"]


@pytest.mark.parametrize("show", [results_table, draw_results])
def test_a_metric_that_a_method_lacks_is_an_error_that_names_those_it_has(show, tmp_path):
    with pytest.raises(ValueError, match=r"metric 'accuracy' of method 'joint training', got only f1"):
        show([result()], "accuracy", tmp_path / "results.png")


@pytest.mark.parametrize("show", [results_table, draw_results])
def test_no_result_at_all_is_an_error(show, tmp_path):
    with pytest.raises(ValueError, match="at least one method"):
        show([], "f1", tmp_path / "results.png")


def test_the_json_file_holds_results_environment_and_extras(tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results([result(metrics={"f1": np.float32(0.5)})], path, config={"sigma": 1e-3})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["results"][0]["name"] == "joint training"
    assert content["results"][0]["metrics"] == {"f1": 0.5}
    assert content["results"][0]["history"] == HISTORY
    assert content["config"] == {"sigma": 1e-3}
    assert content["environment"] == environment()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf")])
def test_numbers_that_json_cannot_hold_become_null(value, tmp_path):
    path = tmp_path / "results.json"
    write_results([result(step_ms=value, history=[{"loss": value, "step": 1}])], path, seen=(value, 1))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["results"][0]["step_ms"] is None
    assert content["results"][0]["history"] == [{"loss": None, "step": 1}]
    assert content["seen"] == [None, 1]


def test_an_extra_cannot_hide_the_results(tmp_path):
    with pytest.raises(TypeError, match="multiple values for keyword argument 'environment'"):
        write_results([result()], tmp_path / "results.json", environment={})


def test_the_environment_names_the_versions_that_run():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_environment_says_which_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(report, "REPORTED_PACKAGES", ("torch", "no-such-package"))
    assert environment()["no-such-package"] == "not installed"
    assert environment()["torch"] == torch.__version__


def test_the_picture_is_a_png_and_leaves_pyplot_alone(tmp_path):
    path = tmp_path / "run" / "results.png"
    draw_results([result(), result("EvoGrad", history=META_HISTORY)], "f1", path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 2 * height
    assert plt.get_fignums() == []


def test_the_picture_shows_losses_metric_and_final_scores(tmp_path, figures):
    methods = [result(), result("EvoGrad", history=META_HISTORY, metrics={"f1": 0.75})]
    draw_results(methods, "f1", tmp_path / "results.png")
    losses, metric, bars = figures[0].axes

    curves = {line.get_label(): line for line in losses.lines}
    assert set(curves) == {"joint training, training", "EvoGrad, training", "EvoGrad, meta"}
    assert curves["EvoGrad, meta"].get_xydata().tolist() == [[10, 3.0], [20, 2.0]]
    assert [line.get_xydata().tolist() for line in metric.lines] == [[[10, 0.3], [20, 0.6]]] * 2
    assert [patch.get_height() for patch in bars.patches] == [0.5, 0.75]
    assert [text.get_text() for text in bars.texts] == ["0.500", "0.750"]

    colours = [to_hex(patch.get_facecolor()).upper() for patch in bars.patches]
    assert colours == [to_hex(line.get_color()).upper() for line in metric.lines] == list(COLOURS[:2])
    assert all(axes.get_title() and axes.get_ylabel() for axes in figures[0].axes)


def test_a_panel_without_anything_to_show_is_left_out(tmp_path, figures):
    only_losses = [row for row in HISTORY if "loss" in row]
    draw_results([result(history=only_losses)], "f1", tmp_path / "results.png")
    draw_results([result(history=[])], "f1", tmp_path / "results.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["Loss", "Final F1"]
    assert [axes.get_title() for axes in figures[1].axes] == ["Final F1"]


def test_a_score_that_is_not_finite_is_drawn_as_a_dash(tmp_path: Path, figures):
    draw_results([result(metrics={"f1": math.nan}), result("EvoGrad")], "f1", tmp_path / "results.png")
    assert [text.get_text() for text in figures[0].axes[-1].texts] == ["–", "0.500"]


def test_more_methods_than_colours_can_be_drawn(tmp_path, figures):
    methods = [result(f"method {i}", history=[]) for i in range(len(COLOURS) + 1)]
    draw_results(methods, "f1", tmp_path / "results.png")
    assert len(figures[0].axes[-1].patches) == len(methods)


def test_the_picture_shows_the_meta_parameters_that_were_logged(tmp_path, figures):
    history = [{"step": step, "meta_module/angle_degrees": 10.0 * step} for step in (1, 2)]

    draw_results([result(), result("EvoGrad", history=history)], "f1", tmp_path / "results.png")

    (axes,) = [axes for axes in figures[0].axes if axes.get_title() == "Learned meta-parameters"]
    (line,) = axes.lines
    assert line.get_label() == "EvoGrad, Angle degrees"
    assert line.get_ydata().tolist() == [10.0, 20.0]


def test_lines_of_one_method_alone_do_not_repeat_its_name(tmp_path, figures):
    history = [*META_HISTORY, {"step": 20, "meta_module/angle_degrees": 10.0}]
    draw_results([result("EvoGrad", history=history)], "f1", tmp_path / "results.png")
    losses, _, learned, _ = figures[0].axes
    assert [line.get_label() for line in losses.lines] == ["training", "meta"]
    assert [line.get_label() for line in learned.lines] == ["Angle degrees"]
