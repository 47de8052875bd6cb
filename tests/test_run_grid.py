"""The grid script: which runs are missing, what is kept of those that are there, and the tables made of it."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import meta_trainer
from meta_trainer.recipe import read_recipe, recipes_folder
from meta_trainer.tasks.ner.files import FILE_SUFFIXES

SCRIPTS = Path(__file__).parent.parent / "scripts"
GRIDS = sorted(recipes_folder().glob("*/grids/*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def run_grid(scripts_on_path):
    return importlib.import_module("run_grid")


@pytest.fixture(scope="module")
def grid_tables(scripts_on_path):
    return importlib.import_module("grid_tables")


@pytest.fixture
def grid(run_grid, tmp_path):
    return run_grid.Grid(
        title="test",
        output_dir=str(tmp_path / "runs"),
        recipes={"joint": "ner/joint_training.yaml", "exact": "ner/metaxl_t1t2.yaml"},
        settings={"max_steps": 2, "model_name_or_path": "$ENCODER"},
        targets={"qu": {"max_length": 32}, "gn": {"max_length": 16}},
        seeds=[1, 2],
        only={"exact": ["gn"]},
        methods={"exact": {"meta_every": 2}},
    )


def finish(cell, f1):
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.yaml").write_text(yaml.safe_dump(cell.settings))
    history = [{"step": 1, "meta_module/angle": 10.0}, {"step": 2, "meta_module/angle": 29.0}]
    result = {
        "metrics": {"f1": f1}, "step_ms": 10.0, "peak_memory_mib": 5.0, "steps": 2, "seconds": 1.0, "history": history
    }  # fmt: skip
    (cell.folder / "results.json").write_text(json.dumps({"environment": {"device": "CPU"}, "results": [result]}))


@pytest.fixture
def runs(run_grid, grid):
    cells = list(grid.cells())
    for cell, f1 in zip(cells, [0.5, 0.3, 0.4, 0.7, 0.3, 0.6], strict=True):
        finish(cell, f1)
    return run_grid.collect(cells)


def tables(grid_tables, grid, runs, **presentation):
    shown = grid_tables.Presentation(metric="f1", **presentation)
    return grid_tables.markdown_tables(runs, list(grid.recipes), list(grid.targets), shown)


def test_a_grid_has_one_cell_for_each_method_target_and_seed_that_it_names(grid):
    cells = [(cell.method, cell.target, cell.seed) for cell in grid.cells()]
    first = [("joint", "qu", 1), ("joint", "gn", 1), ("exact", "gn", 1)]
    assert cells == first + [(method, target, 2) for method, target, _ in first]
    assert len({cell.folder for cell in grid.cells()}) == len(cells)


def test_settings_of_method_and_target_win_over_those_of_the_grid_and_of_the_recipe(grid, monkeypatch):
    monkeypatch.setenv("ENCODER", "some/folder")
    joint, _, exact, *_ = (cell.settings for cell in grid.cells())
    assert (joint["max_length"], joint["max_steps"], joint["seed"]) == (32, 2, 1)
    assert joint["learning_rate"] == 3e-5
    assert exact["meta_every"] == 2
    assert "meta_every" not in joint
    assert joint["model_name_or_path"] == "some/folder"


def test_a_run_counts_as_done_only_with_its_present_settings(grid):
    cell = next(iter(grid.cells()))
    assert cell.result is None
    finish(cell, 0.5)
    assert cell.result["metrics"]["f1"] == 0.5
    assert replace(cell, overrides={**cell.overrides, "max_steps": 3}).result is None


def test_what_is_kept_of_a_run_has_its_scores_its_settings_and_the_last_meta_parameters(runs):
    assert len(runs) == 6
    assert runs[0].scores == {"f1": 0.5, "meta_module/angle": 29.0}
    assert runs[0].overrides == {"max_steps": 2, "model_name_or_path": "$ENCODER", "max_length": 32, "seed": 1}
    assert runs[0].environment == {"device": "CPU"}


def test_the_table_has_means_deviations_and_differences_between_pairs(grid_tables, grid, runs):
    table = tables(grid_tables, grid, runs, columns={"angle": "meta_module/angle"})
    assert "| method | qu | gn | mean | angle | ms per step | peak MiB |" in table
    assert "| joint | 60.0 ± 14.1 | 30.0 ± 0.0 | 45.00 | 29.00 ± 0.00 | 10 | 5 |" in table
    assert "| exact |  | 50.0 ± 14.1 |  | 29.00 ± 0.00 | 10 | 5 |" in table
    assert "exact − joint: +20.00 ± 10.00 (standard error over 2 pairs of target and seed)." in table


def test_each_group_of_targets_has_a_table_of_its_own(grid_tables, grid, runs):
    table = tables(grid_tables, grid, runs, groups={"low": ["gn"], "high": ["qu"]})
    low, high = table.split("**high**")
    assert "| joint | 30.0 ± 0.0 | 10 | 5 |" in low
    assert "| joint | 60.0 ± 14.1 | 10 | 5 |" in high


def test_what_has_not_been_run_is_left_out(grid_tables, grid, runs):
    groups = {"both": ["qu", "mi", "gn"], "one": ["qu"], "none": ["mi"]}
    both, one = tables(grid_tables, grid, runs, groups=groups).split("<details>")[0].split("**one**")
    assert "| method | qu | gn | mean | ms per step | peak MiB |" in both
    assert "| joint | 60.0 ± 14.1 | 10 | 5 |" in one
    assert "exact" not in one
    assert "none" not in one
    paper = {"row": "Table 3", "module": "InputRotation", "numbers": "", "group": "both"}
    of_three = grid_tables.Presentation(metric="f1", groups=groups, paper=paper)
    assert "| joint 45.0 |" in grid_tables.overview([(of_three, ["joint", "exact"], runs)])


def test_the_command_of_a_row_runs_its_first_cell(grid_tables, grid, runs):
    commands = tables(grid_tables, grid, runs)
    assert (
        "# exact\nmeta-trainer train --config ner/metaxl_t1t2.yaml --max_steps 2 --model_name_or_path $ENCODER "
        "--max_length 16 --meta_every 2 --seed 1\n"
    ) in commands


def test_the_arguments_of_a_command_mean_what_the_settings_mean(grid_tables, runs):
    changes = {"data": None, "perturb": ["a b", "c"], "use_cpu": True}
    line = grid_tables.command(replace(runs[0], overrides=changes))
    assert line.endswith("--data none --perturb 'a b' c --use_cpu true")


def test_the_overview_has_a_row_for_every_grid_that_stands_for_a_row_of_a_paper(grid_tables, runs):
    paper = {"row": "Table 3", "module": "InputRotation", "numbers": "98.11 ± 0.32"}
    shown = grid_tables.Presentation(metric="f1", paper=paper)
    of_its_own = grid_tables.Presentation(metric="f1")
    *_, row = grid_tables.overview([(shown, ["joint", "exact"], runs), (of_its_own, ["joint"], runs)]).split("\n")
    assert row == "| Table 3 | `InputRotation` | [`ner`](ner) | joint 45.0 |  | 98.11 ± 0.32 |"
    short = grid_tables.Presentation(metric="f1", paper={**paper, "remark": "falls short"})
    *_, row = grid_tables.overview([(short, ["joint"], runs)]).split("\n")
    assert row.endswith("| joint 45.0 | falls short | 98.11 ± 0.32 |")
    for groups, group in (({}, "gn"), ({"one of two": ["gn"]}, "one of two")):
        of_one = grid_tables.Presentation(metric="f1", groups=groups, paper={**paper, "group": group})
        *_, row = grid_tables.overview([(of_one, ["joint", "exact"], runs)]).split("\n")
        assert "| joint 30.0; exact 50.0 |" in row


def test_a_text_goes_between_its_marks_and_nowhere_else(grid_tables, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- begin: test -->\nold\n<!-- end: test -->\nafter\n")
    grid_tables.write_between_marks(file, "test", "new")
    assert file.read_text() == "before\n<!-- begin: test -->\nnew\n<!-- end: test -->\nafter\n"
    with pytest.raises(ValueError, match="should hold the lines"):
        grid_tables.write_between_marks(file, "other", "new")


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: f"{file.parent.parent.name}/{file.stem}")
def test_every_cell_of_the_grids_is_a_valid_recipe(run_grid, grid_tables, file, tmp_path, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", str(tmp_path))
    grid = run_grid.load_grid(file)
    shown = grid_tables.Presentation(**grid.presentation)
    assert {target for targets in shown.groups.values() for target in targets} <= set(grid.targets)
    group = shown.paper.get("group")
    assert group is None or group in {*shown.groups, *grid.targets}
    assert not shown.paper or hasattr(meta_trainer, shown.paper["module"])
    assert set(shown.baselines) | set(grid.only) | set(grid.methods) <= set(grid.recipes)
    assert f"<!-- begin: {grid.title} -->" in (recipes_folder() / "README.md").read_text(encoding="utf-8")
    # Cells of further seeds differ from these in a number only.
    for cell in replace(grid, seeds=grid.seeds[:1]).cells():
        recipe = tmp_path / "cell.yaml"
        recipe.write_text(yaml.safe_dump(cell.settings))
        for name in local_files(cell.overrides):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert read_recipe(str(recipe), []).training.seed == cell.seed


def local_files(settings):
    """Names of all files among the settings, alone, in lists, or as NAME=FILE."""
    entries = [entry for value in settings.values() for entry in (value if isinstance(value, list) else [value])]
    names = [entry.rpartition("=")[2] for entry in entries if isinstance(entry, str)]
    return [name for name in names if Path(name).suffix in FILE_SUFFIXES]
