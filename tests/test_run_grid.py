"""The grid script: which runs are missing, what is kept of those that are there, and the tables made of it."""

import importlib
import json
import shutil
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
RESULTS = sorted((recipes_folder() / "results").glob("*.json"))


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
        presentation={"metric": "f1"},
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


@pytest.fixture
def with_warm_up(grid):
    return replace(grid, warm_up={"recipe": "ner/joint_training.yaml", "max_steps": 9, "seed": 0})


@pytest.fixture
def command_line(run_grid, tmp_path, monkeypatch):
    """Call the script on a grid, without running anything; returns the names of the cells that it would run."""
    asked_for = []
    monkeypatch.setattr(run_grid, "run_missing", lambda cells, jobs: asked_for.extend(cell.name for cell in cells))

    def call(grid, *arguments):
        asked_for.clear()
        for page, titles in ((tmp_path / "recipes", (grid.title, "overview")), (tmp_path, ("what it reaches",))):
            page.mkdir(exist_ok=True)
            marks = [f"<!-- begin: {title} -->\n<!-- end: {title} -->\n" for title in titles]
            (page / "README.md").write_text("".join(marks))
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(vars(grid), sort_keys=False))
        monkeypatch.setattr(
            sys,
            "argv",
            ["run_grid.py", str(tmp_path / "grid.yaml"), "--recipes", str(tmp_path / "recipes"), *arguments],
        )
        run_grid.main()
        return list(asked_for)

    return call


@pytest.fixture
def own_recipe(grid, tmp_path):
    """Give the method `joint` a recipe whose content the test chooses; returns the grid."""

    def write(**content):
        (tmp_path / "joint.yaml").write_text(yaml.safe_dump(content))
        return replace(grid, recipes={**grid.recipes, "joint": str(tmp_path / "joint.yaml")})

    return write


def finish_all(grid, f1=0.5):
    for cell in [*grid.warm_ups(), *grid.cells()]:
        finish(cell, f1)


def results(tmp_path):
    return json.loads((tmp_path / "recipes" / "results" / "test.json").read_text())


def names_and_scores(tmp_path):
    return [
        (f"{run['target']}/{run['method']}/seed_{run['seed']}", run["scores"]["f1"])
        for run in results(tmp_path)["runs"]
    ]


def tables(grid_tables, grid, runs, **presentation):
    shown = grid_tables.Presentation(metric="f1", **presentation)
    return grid_tables.markdown_tables(runs, list(grid.recipes), list(grid.targets), shown)


def test_a_grid_has_one_cell_for_each_method_target_and_seed_that_it_names(grid):
    cells = [(cell.method, cell.target, cell.seed) for cell in grid.cells()]
    first = [("joint", "qu", 1), ("joint", "gn", 1), ("exact", "gn", 1)]
    assert cells == first + [(method, target, 2) for method, target, _ in first]
    assert len({cell.folder for cell in grid.cells()}) == len(cells)


def test_every_target_has_one_warm_up_whose_folder_its_cells_start_from(run_grid, grid, with_warm_up):
    assert list(grid.warm_ups()) == []
    first, second = with_warm_up.warm_ups()
    assert [(cell.method, cell.target, cell.seed) for cell in (first, second)] == [
        (run_grid.WARM_UP, "qu", 0), (run_grid.WARM_UP, "gn", 0),
    ]  # fmt: skip
    assert (first.recipe, first.overrides["max_steps"], first.overrides["max_length"]) == (
        "ner/joint_training.yaml", 9, 32,
    )  # fmt: skip
    assert first.settings["output_dir"] == str(first.folder)
    folders = {"qu": str(first.folder), "gn": str(second.folder)}
    assert len(set(folders.values())) == 2
    assert all(cell.overrides["model_name_or_path"] == folders[cell.target] for cell in with_warm_up.cells())
    assert all(cell.overrides["model_name_or_path"] == "$ENCODER" for cell in grid.cells())
    assert {cell.folder for cell in with_warm_up.warm_ups()}.isdisjoint(cell.folder for cell in with_warm_up.cells())


def test_the_commands_of_a_table_begin_with_the_warm_up_that_the_rows_start_from(with_warm_up, command_line, tmp_path):
    finish_all(with_warm_up)
    command_line(with_warm_up, "--table-only")
    readme = (tmp_path / "recipes" / "README.md").read_text()
    commands = readme.split("```bash\n")[1].split("\n```")[0].split("\n")
    assert commands[::2] == ["# warm-up", "# joint", "# exact"]
    assert (
        f"--max_steps 9 --model_name_or_path $ENCODER --max_length 32 --seed 0 --output_dir {tmp_path}" in commands[1]
    )
    start = commands[1].split("--output_dir ")[1]
    assert f"--model_name_or_path {start}" in commands[3]


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


def test_a_baseline_is_compared_with_those_before_it(grid_tables, grid, runs):
    table = tables(grid_tables, grid, runs, baselines=["joint", "exact"])
    assert "exact − joint: +20.00 ± 10.00" in table
    assert "joint − exact" not in table


def test_the_devices_of_its_runs_stand_below_each_table(grid_tables, grid, runs):
    other = [replace(run, environment={"device": "GPU"}) if run.method == "exact" else run for run in runs]
    table = tables(grid_tables, grid, other, groups={"low": ["gn"], "high": ["qu"]}).split("<details>")[0]
    low, high = table.split("**high**")
    assert low.rstrip().split("\n")[-1] == "Device: CPU, GPU."
    assert high.rstrip().split("\n")[-1] == "Device: CPU."


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


def test_the_front_page_has_the_better_baseline_beside_what_was_learned(grid_tables, runs):
    paper = {"row": "Table 3", "module": "InputRotation", "group": "gn"}
    shown = grid_tables.Presentation(
        metric="f1", paper=paper, front_page={"application": "Turned digits", "learned": "exact"}
    )
    other = grid_tables.Presentation(metric="f1", paper=paper)
    entries = [(shown, ["joint", "exact"], runs), (other, ["joint"], runs)]
    *_, heading, row = grid_tables.front_page(entries).split("\n")
    assert heading.startswith("|---|")
    assert row == "| Turned digits | 30.0 |  | **50.0** | `InputRotation`, [`ner`](recipes/ner) |"
    assert "Turned" not in grid_tables.front_page([(shown, ["joint"], runs)])

    third = [replace(run, method="third", scores={"f1": 0.6}) for run in runs if run.method == "exact"]
    fourth = [replace(run, method="fourth", scores={"f1": 0.35}) for run in third]
    shown = replace(shown, baselines=["joint", "third", "fourth"])
    entries = [(shown, ["joint", "third", "fourth", "exact"], [*runs, *third, *fourth])]
    *_, row = grid_tables.front_page(entries).split("\n")
    assert row == "| Turned digits | 30.0 | **60.0** third | 50.0 | `InputRotation`, [`ner`](recipes/ner) |"


def test_a_text_goes_between_its_marks_and_nowhere_else(grid_tables, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- begin: test -->\nold\n<!-- end: test -->\nafter\n")
    grid_tables.write_between_marks(file, "test", "new")
    assert file.read_text() == "before\n<!-- begin: test -->\nnew\n<!-- end: test -->\nafter\n"
    with pytest.raises(ValueError, match="should hold the lines"):
        grid_tables.write_between_marks(file, "other", "new")


def test_only_the_cells_that_an_expression_is_found_in_are_run(grid, command_line):
    finish_all(grid)
    assert len(command_line(grid)) == 6
    assert command_line(grid, "--only", "gn/exact") == ["gn/exact/seed_1", "gn/exact/seed_2"]
    assert command_line(grid, "--only", "^(qu|gn)/joint/seed_2$") == ["qu/joint/seed_2", "gn/joint/seed_2"]
    assert command_line(grid, "--only", "gn/exact", "--table-only") == []


def test_warm_ups_are_run_only_of_targets_that_have_a_cell_to_run(with_warm_up, command_line):
    finish_all(with_warm_up)
    assert command_line(with_warm_up)[:3] == ["qu/warm-up/seed_0", "gn/warm-up/seed_0", "qu/joint/seed_1"]
    assert command_line(with_warm_up, "--only", "gn/.*1$") == [
        "gn/warm-up/seed_0",
        "gn/joint/seed_1",
        "gn/exact/seed_1",
    ]


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("qu/exact", r"got 'qu/exact', which is found in none of the 6 cells"),
        ("(qu", r"got '\(qu', which is no regular expression: missing \)"),
    ],
)
def test_an_expression_that_names_no_cell_is_refused_with_examples(
    grid, run_grid, command_line, capsys, pattern, problem
):
    examples = "'qu/joint/seed_1', 'gn/joint/seed_1', 'gn/exact/seed_1'; "
    with pytest.raises(ValueError, match=examples + problem):
        run_grid.select(list(grid.cells()), pattern)
    with pytest.raises(SystemExit, match="2"):
        command_line(grid, "--only", pattern)
    assert f"error: --only should be a regular expression that is found in such texts as {examples}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("option", [[], ["--table-only"]])
def test_a_grid_of_which_no_run_has_ended_has_no_table(grid, command_line, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        command_line(grid, *option)
    assert "has ended, so there is no table: run it without --table-only." in capsys.readouterr().err


def test_tables_after_a_run_of_some_cells_are_of_all_that_there_is(grid, command_line, tmp_path):
    finish_all(grid)
    command_line(grid, "--only", "gn/exact")
    assert "| joint | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.00 | 10 | 5 |" in (tmp_path / "recipes" / "README.md").read_text()


@pytest.mark.parametrize("option", [[], ["--table-only"]])
def test_runs_on_record_outlive_their_folders_and_are_replaced_by_new_ones(
    with_warm_up, command_line, tmp_path, option
):
    finish_all(with_warm_up)
    command_line(with_warm_up, *option)
    before = names_and_scores(tmp_path)
    shutil.rmtree(with_warm_up.output_dir)
    command_line(with_warm_up, *option)
    assert names_and_scores(tmp_path) == before
    assert [name for name, _ in before] == [
        "qu/warm-up/seed_0", "gn/warm-up/seed_0", "qu/joint/seed_1", "gn/joint/seed_1", "gn/exact/seed_1",
        "qu/joint/seed_2", "gn/joint/seed_2", "gn/exact/seed_2",
    ]  # fmt: skip

    new = list(with_warm_up.cells())[2]
    finish(new, 0.9)
    command_line(with_warm_up, *option)
    assert names_and_scores(tmp_path) == [(name, 0.9 if name == new.name else score) for name, score in before]


def test_runs_on_record_are_run_again_where_their_folder_is_gone(grid, command_line, tmp_path):
    finish_all(grid)
    command_line(grid)
    shutil.rmtree(grid.output_dir)
    assert len(command_line(grid)) == len(names_and_scores(tmp_path)) == 6
    assert all(cell.result is None for cell in grid.cells())


def test_runs_of_a_recipe_that_has_changed_are_dropped(own_recipe, command_line, tmp_path):
    finish_all(own_recipe(learning_rate=0.1, description="one", method="joint"))
    command_line(own_recipe(learning_rate=0.1, description="one", method="joint"))
    assert results(tmp_path)["recipes"][str(tmp_path / "joint.yaml")] == {"learning_rate": 0.1}
    shutil.rmtree(tmp_path / "runs")

    command_line(own_recipe(learning_rate=0.1, description="another", method="shown otherwise"))
    assert len(names_and_scores(tmp_path)) == 6
    command_line(own_recipe(learning_rate=0.2))
    assert [name for name, _ in names_and_scores(tmp_path)] == ["gn/exact/seed_1", "gn/exact/seed_2"]
    assert results(tmp_path)["recipes"].keys() == {"ner/metaxl_t1t2.yaml"}


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": {"exact": {"meta_every": 3}}},
        {"recipes": {"joint": "ner/joint_training.yaml", "exact": "ner/metaxl_evograd.yaml"}},
        {"recipes": {"joint": "ner/joint_training.yaml"}, "only": {}, "methods": {}},
    ],
    ids=["other overrides", "another recipe", "no cell"],
)
def test_runs_that_the_grid_would_make_in_another_way_are_dropped(grid, command_line, tmp_path, changes):
    finish_all(grid)
    command_line(grid)
    shutil.rmtree(grid.output_dir)
    command_line(replace(grid, **changes))
    assert [name for name, _ in names_and_scores(tmp_path)] == [
        "qu/joint/seed_1", "gn/joint/seed_1", "qu/joint/seed_2", "gn/joint/seed_2",
    ]  # fmt: skip


def test_a_record_without_the_content_of_its_recipes_keeps_no_run_beside_new_ones(grid, command_line, tmp_path):
    finish_all(grid)
    command_line(grid)
    old = results(tmp_path)
    del old["recipes"]
    (tmp_path / "recipes" / "results" / "test.json").write_text(json.dumps(old))
    shutil.rmtree(grid.output_dir)
    command_line(grid)
    # With nothing to write, the file stays as it is.
    assert results(tmp_path) == old
    finish(next(grid.cells()), 0.9)
    command_line(grid)
    assert names_and_scores(tmp_path) == [("qu/joint/seed_1", 0.9)]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_results_of_the_grids_hold_the_content_of_each_recipe_that_their_runs_used(file):
    content = json.loads(file.read_text())
    assert list(content["recipes"]) == list(dict.fromkeys(run["recipe"] for run in content["runs"]))
    assert all(not {"description", "method"} & recipe.keys() for recipe in content["recipes"].values())


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: f"{file.parent.parent.name}/{file.stem}")
def test_every_cell_of_the_grids_is_a_valid_recipe(run_grid, grid_tables, file, tmp_path, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", str(tmp_path))
    grid = run_grid.load_grid(file)
    shown = grid_tables.Presentation(**grid.presentation)
    assert {target for targets in shown.groups.values() for target in targets} <= set(grid.targets)
    group = shown.paper.get("group")
    assert group is None or group in {*shown.groups, *grid.targets}
    assert not shown.paper or hasattr(meta_trainer, shown.paper["module"])
    learned = {shown.front_page["learned"]} if shown.front_page else set()
    assert set(shown.baselines) | learned | set(grid.only) | set(grid.methods) <= set(grid.recipes)
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
