"""Reading a recipe: what is accepted, what is refused, and with which words."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from meta_trainer.recipe import find_recipe, list_recipes, read_recipe, recipes_folder

GENERATED = {"source_data": "generated", "target_data": "generated"}
NER = sorted((recipes_folder() / "ner").glob("*.yaml"))


def recipe_file(folder: Path, **settings: object) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**GENERATED, "output_dir": str(folder / "out"), "use_cpu": True, **settings}))
    return str(file)


def test_the_command_line_wins_over_the_file_and_both_over_the_defaults(tmp_path):
    file = recipe_file(tmp_path, sigma=0.25, seed=7)
    recipe = read_recipe(file, ["--seed", "8", "--perturb", "classifier.*", "bert.pooler"])
    assert (recipe.training.sigma, recipe.training.seed, recipe.training.temperature) == (0.25, 8, 0.05)
    assert recipe.training.perturb == ["classifier.*", "bert.pooler"]


def test_the_resolved_settings_read_back_as_the_same_recipe(tmp_path):
    first = read_recipe(
        recipe_file(tmp_path, meta_module="meta_weight_net", warmup_steps=0.1), ["--num_candidates", "3"]
    )
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(first.settings))
    second = read_recipe(str(tmp_path / "resolved.yaml"), [])
    assert second.settings == first.settings
    assert second.module == first.module


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("source_data: generated\ntarget_data: generated\nuse_cpu: true\nlearning_rate: 3e-5\n")
    assert read_recipe(str(file), []).training.learning_rate == 3e-5


def test_none_empties_an_optional_setting(tmp_path):
    file = recipe_file(tmp_path, max_source_examples=None)
    recipe = read_recipe(file, ["--max_target_examples", "none"])
    assert recipe.task.max_source_examples is None
    assert recipe.task.max_target_examples is None


def test_none_empties_an_optional_setting_of_trainer_but_reports_to_none(tmp_path):
    settings = {"optim": "sgd", "optim_args": "momentum=0.9", "metric_for_best_model": "f1"}
    changes = ["--optim_args", "none", "--metric_for_best_model", "none", "--report_to", "none"]
    training = read_recipe(recipe_file(tmp_path, **settings), changes).training
    assert training.optim_args is training.metric_for_best_model is None
    assert training.report_to == []


@pytest.mark.parametrize("none", [None, "none", ["none"], []])
def test_none_alone_empties_a_list_that_is_empty_by_default(tmp_path, none):
    file = recipe_file(tmp_path, map_tags=["PER=O"], meta_module=["meta_weight_net"])
    recipe = read_recipe(file, ["--map_tags", "none", "--meta_module", "none"])
    assert recipe.task.map_tags == recipe.module.meta_module == []
    assert read_recipe(file, []).task.map_tags == ["PER=O"]
    emptied = recipe_file(tmp_path, map_tags=none)
    assert read_recipe(emptied, []).task.map_tags == []
    assert read_recipe(emptied, ["--map_tags", "PER=O"]).task.map_tags == ["PER=O"]


def test_none_beside_other_values_or_in_a_list_with_a_default_is_a_value(tmp_path):
    file = recipe_file(tmp_path)
    with pytest.raises(ValueError, match=r"map_tags: expected entries such as .*, got 'none'"):
        read_recipe(file, ["--map_tags", "none", "PER=O"])
    assert read_recipe(file, ["--rtn_layers", "none"]).module.rtn_layers == ["none"]


def test_a_mixture_recipe_takes_sources_of_ones_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a text\n")
    own = ["--sources", f"a={tmp_path}/a.txt", f"b={tmp_path}/b.txt", "--trusted_source", "a"]
    assert read_recipe("mixture/plain", [*own, "--corrupt_sources", "none"]).task.corruptions == {}


def test_a_guard_of_none_is_no_guard_and_not_the_default(tmp_path):
    file = recipe_file(tmp_path, noise="guided", meta_guard="none")
    assert read_recipe(file, []).training.meta_guard == "none"
    assert read_recipe(recipe_file(tmp_path, noise="guided"), ["--meta_guard", "none"]).training.meta_guard == "none"
    assert read_recipe(recipe_file(tmp_path, noise="guided"), []).training.meta_guard == "ascent"


def test_the_output_folder_is_named_after_the_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**GENERATED, "use_cpu": True}))
    assert read_recipe(str(file), []).training.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leraning_rate": 1e-3}, "unknown key 'leraning_rate'. Did you mean 'learning_rate'"),
        ({"qqqqq": 1}, "unknown key 'qqqqq'. See"),
        ({"num_candidates": "many"}, "`num_candidates`: .*many"),
        ({"num_candidates": 2.5}, "`num_candidates`: .*2.5"),
        ({"num_candidates": 1}, "at least 2, got 1"),
        ({"num_candidates": None}, "`num_candidates` should have a value"),
        ({"num_candidates": [2, 3]}, "`num_candidates` should be a single value, got a list"),
        ({"sigma": {"value": 1}}, "`sigma` should be a plain value, got a mapping"),
        ({"compare_with_baseline": "perhaps"}, "`compare_with_baseline`"),
        ({"task": "parsing"}, "`task`: .*parsing"),
        ({"hypergradient": "evogard"}, "`hypergradient` should be one of evograd"),
        ({"meta_module": ["weight_net"]}, "`meta_module` should be among .*'weight_net'"),
        ({"compare_with_baseline": True}, "needs a `meta_module`"),
        ({"source_train_file": "x.parquet"}, "exclude each other"),
        ({"source_data": None, "source_train_file": "nowhere.parquet"}, "no file .*nowhere.parquet"),
        ({"perturb": ["all", "classifier"]}, "`perturb` should be 'all' or 'head' alone"),
        ({"rtn_bottleneck_size": 0}, "`rtn_bottleneck_size` should be at least 1"),
        (
            {"source_subset": False},
            "`source_subset` should be text or a number, got false. YAML reads .* put .* in quotes",
        ),
        ({"perturb": [["all"]]}, "`perturb` should hold text or numbers, got list"),
        ({"perturb": [None]}, "`perturb` should hold text or numbers, got NoneType"),
        ({"description": b"x"}, "`description` should hold text or numbers, got bytes"),
        ({"lr_scheduler_kwargs": {"day": date(2026, 1, 1)}}, "`lr_scheduler_kwargs` should be a mapping that JSON can"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe_file(tmp_path, **settings), [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--sedd", "1"], "Unknown key '--sedd'. Did you mean 'seed'"),
        (["--seed", "one"], "--seed: invalid int value: 'one'"),
        (["--seed"], "--seed: expected one argument"),
        (["--see", "1"], "Unknown key '--see'"),
        (["stray"], "Unexpected argument 'stray'"),
        (["--sede=3"], "Unknown key '--sede=3'. Did you mean 'seed'"),
    ],
)
def test_a_wrong_argument_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe_file(tmp_path), overrides)


@pytest.mark.parametrize(
    "content",
    ["- a\n- b\n", "just text", "a: [1", "", b"\xff\xfe\x00", "seed: 2026-13-45", "seed: !!int x", "[" * 3000],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"recipe.yaml (is no valid YAML|should hold `key: value` lines)"):
        read_recipe(str(file), [])


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 1\nsigma: 0.1\nseed: 2\n")
    with pytest.raises(ValueError, match=r"should hold each key once, got seed more than once"):
        read_recipe(str(file), [])


@pytest.mark.parametrize("key", ["1", "null", "true", "2026-01-01"])
def test_a_key_that_is_no_text_is_unknown(tmp_path, key):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{key}: 2\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown key (1|None|True|datetime.*)\. (See|Did)"):
        read_recipe(str(file), [])


def test_layers_that_only_look_like_numbers_are_names(tmp_path):
    recipe = read_recipe(recipe_file(tmp_path, rtn_layers=[2, -1, "--1", "²"]), [])
    assert recipe.module.layers == [2, -1, "--1", "²"]


def test_recipes_of_the_package_are_found_by_name_and_missing_ones_are_not():
    names = ("quickstart.yaml", "recipes/quickstart.yaml", "quickstart")
    assert {find_recipe(name).resolve() for name in names} == {(recipes_folder() / "quickstart.yaml").resolve()}
    with pytest.raises(ValueError, match=r"There is no recipe 'nonsense\.yaml'"):
        find_recipe("nonsense.yaml")


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_every_listed_recipe_is_valid_and_says_how_it_is_run(name):
    assert read_recipe(name, ["--use_cpu", "true"]).run.description
    assert name in find_recipe(name).read_text().splitlines()[0]


def test_the_ner_recipes_differ_only_in_what_is_meta_learned():
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in NER}
    joint, evograd, t1t2 = (contents[name] for name in ("joint_training", "metaxl_evograd", "metaxl_t1t2"))
    own = {"description", "method"}
    assert all(joint[key] == evograd[key] == t1t2[key] for key in joint if key not in own)
    evograds = [recipe for name, recipe in contents.items() if name.endswith("_evograd")]
    assert len(evograds) == 3
    for other in evograds:
        assert all(joint[key] == other[key] for key in joint if key not in own)
        shared = evograd.keys() & other.keys() - own - {"meta_module"}
        assert all(evograd[key] == other[key] for key in shared)
    estimator = {"hypergradient", "num_candidates", "sigma", "temperature", "noise"}
    assert all(evograd.get(key) == t1t2.get(key) for key in evograd if key not in own | estimator)


def test_the_metaxl_recipe_has_the_papers_settings():
    recipe = read_recipe("ner/metaxl_evograd.yaml", ["--use_cpu", "true"])
    training, task = recipe.training, recipe.task
    assert recipe.model.model_name_or_path == "FacebookAI/xlm-roberta-base"
    assert (task.max_source_examples, task.max_target_examples) == (5000, 100)
    assert (training.num_candidates, training.sigma, training.temperature) == (2, 1e-3, 0.05)
    assert (training.perturb, recipe.module.layers, recipe.module.rtn_bottleneck_size) == (["head"], [12], 384)


def test_a_transform_of_source_rows_needs_a_task_that_has_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n')
    settings = ["--task", "text_classification", "--train_file", str(file), "--output_dir", str(tmp_path)]
    settings += ["--meta_module", "representation_transform"]
    with pytest.raises(ValueError, match="is for task='ner', not for task='text_classification'"):
        read_recipe(None, settings)


def test_the_grid_of_compositions_names_recipes_and_settings_that_are_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", str(tmp_path))
    grid = yaml.safe_load((recipes_folder() / "ner" / "grids" / "composition.yaml").read_text())
    (tmp_path / "ner").mkdir()
    files = [grid["settings"]["source_train_file"], *grid["targets"]["qu"].values()]
    for name in files:
        (tmp_path / name).touch()
    modules = []
    for base in grid["recipes"].values():
        cell = {**yaml.safe_load((recipes_folder() / base).read_text()), **grid["settings"], **grid["targets"]["qu"]}
        (tmp_path / "cell.yaml").write_text(yaml.safe_dump(cell))
        modules.append(read_recipe(str(tmp_path / "cell.yaml"), []).module.meta_module)
    rtn, weights = "representation_transform", "meta_weight_net"
    assert modules == [[], *2 * [[rtn]], *2 * [[weights]], *3 * [[rtn, weights]]]
