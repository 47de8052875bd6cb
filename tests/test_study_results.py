"""The study of end results: its runs, its table and its picture."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import study_results

from meta_trainer.recipe import read_recipe


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.delenv("META_TRAINER_DATA", raising=False)
    return list(study_results.cells(tmp_path))


def end(cell, score):
    """Write what a run with this score leaves behind."""
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.yaml").write_text(yaml.safe_dump(cell.settings))
    metric = study_results.METRICS[cell.target.split("|")[0]]
    result = {"metrics": {metric: score}, "history": []}
    (cell.folder / "results.json").write_text(json.dumps({"environment": {}, "results": [result]}))


def test_every_estimator_runs_at_every_rate_and_seed_in_a_folder_of_its_own(runs):
    recipes, seeds = len(study_results.RECIPES), len(study_results.SEEDS)
    per_seed = 1 + len(study_results.ESTIMATORS) * len(study_results.RATES)
    expected = recipes * (seeds * per_seed + len(study_results.REMEDIES))
    assert len({run.folder for run in runs}) == len(runs) == expected


def test_every_run_is_a_valid_recipe(runs, tmp_path):
    for number, run in enumerate(run for run in runs if run.seed == 1 and run.target.endswith(("0.001", "None"))):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(run.settings))
        recipe = read_recipe(str(file), [])
        assert recipe.training.output_dir == str(run.folder)
        assert bool(recipe.module.meta_module) == (run.method != study_results.PLAIN)


def test_the_table_has_means_over_seeds_and_the_picture_is_drawn(runs, tmp_path):
    for run in runs:
        if run.method in (study_results.PLAIN, "guided") and run.target.endswith(("0.001", "None")):
            end(run, 0.5 + 0.01 * run.seed if run.method == "guided" else 0.4)
    scores = study_results.collect(runs)
    table = study_results.markdown(scores)
    study_results.draw(scores, tmp_path / "figure.png")

    assert "Plain training: 40.0 (40.0, 40.0, 40.0)." in table
    assert "| guided |  |  |  | +12.0 ± 0.6 (3) |  |" in table
    assert scores["MetaXL"]["guided"]["0.001"] == {1: 51.0, 2: 52.0, 3: 53.0}
    assert (tmp_path / "figure.png").stat().st_size > 10_000
