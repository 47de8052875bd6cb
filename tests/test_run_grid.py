"""The grid script: which runs are missing, and the table it makes of those that are there."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from meta_trainer.recipe import read_recipe, recipes_folder

SCRIPT = Path(__file__).parent.parent / "scripts" / "run_grid.py"
SPEC = importlib.util.spec_from_file_location("run_grid", SCRIPT)
run_grid = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_grid)
GRIDS = sorted((recipes_folder() / "ner" / "grids").glob("*.yaml"))


@pytest.fixture
def grid(tmp_path):
    return run_grid.Grid(
        title="test",
        output_dir=str(tmp_path / "runs"),
        recipes={"joint": "ner/joint_training.yaml", "exact": "ner/metaxl_t1t2.yaml"},
        settings={"max_steps": 2},
        targets={"qu": {"max_length": 32}, "gn": {"max_length": 16}},
        seeds=[1, 2],
        only={"exact": ["gn"]},
    )


def finish(cell, f1):
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.yaml").write_text(yaml.safe_dump(cell.settings))
    result = {"metrics": {"f1": f1}, "step_ms": 10.0, "peak_memory_mib": 5.0}
    (cell.folder / "results.json").write_text(json.dumps({"results": [result]}))


def test_a_grid_has_one_cell_for_each_method_target_and_seed_that_it_names(grid):
    cells = [(cell.method, cell.target, cell.seed) for cell in grid.cells()]
    first = [("joint", "qu", 1), ("joint", "gn", 1), ("exact", "gn", 1)]
    assert cells == first + [(method, target, 2) for method, target, _ in first]
    assert len({cell.folder for cell in grid.cells()}) == len(cells)


def test_settings_of_the_target_win_over_those_of_the_grid_and_of_the_recipe(grid):
    settings = next(iter(grid.cells())).settings
    assert (settings["max_length"], settings["max_steps"], settings["seed"]) == (32, 2, 1)
    assert settings["learning_rate"] == 3e-5


def test_a_run_counts_as_done_only_with_its_present_settings(grid):
    cell = next(iter(grid.cells()))
    assert cell.result is None
    finish(cell, 0.5)
    assert cell.result["metrics"]["f1"] == 0.5
    changed = run_grid.Cell(cell.method, cell.target, cell.seed, cell.folder, {**cell.settings, "max_steps": 3})
    assert changed.result is None


def test_the_table_has_means_deviations_and_averages_over_common_targets(grid):
    cells = list(grid.cells())
    for cell, f1 in zip(cells, [0.5, 0.3, 0.4, 0.7, 0.3, 0.6], strict=True):
        finish(cell, f1)
    table = run_grid.markdown_table(grid, cells)
    assert "| joint | 60.0 ± 14.1 | 30.0 ± 0.0 | 45.00 | 10 | 5 |" in table
    assert "| exact |  | 50.0 ± 14.1 |  | 10 | 5 |" in table
    assert "exact − joint: +20.00 ± 10.00 (standard error over 2 pairs of target and seed)." in table
    assert "Average over the targets of exact (gn): joint 30.00, exact 50.00." in table


def test_the_table_goes_between_its_marks_and_nowhere_else(grid, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- begin: test -->\nold\n<!-- end: test -->\nafter\n")
    run_grid.write_table(grid, "new", file)
    assert file.read_text() == "before\n<!-- begin: test -->\nnew\n<!-- end: test -->\nafter\n"
    with pytest.raises(ValueError, match="should hold the lines"):
        run_grid.write_table(run_grid.Grid(**{**vars(grid), "title": "other"}), "new", file)


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_every_cell_of_the_grids_is_a_valid_recipe_but_for_the_data(file, tmp_path):
    grid = run_grid.Grid(**yaml.safe_load(file.read_text()))
    data = {"source_train_file": None, "target_train_file": None, "target_test_file": None}
    for cell in grid.cells():
        recipe = tmp_path / "cell.yaml"
        recipe.write_text(
            yaml.safe_dump({**cell.settings, **data, "source_data": "generated", "target_data": "generated"})
        )
        assert read_recipe(str(recipe), []).training.seed == cell.seed
