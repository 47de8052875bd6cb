"""Run a grid of recipes x targets x seeds, resume where it stopped, and write its tables from the runs' JSON.

    python scripts/run_grid.py recipes/ner/grids/wikiann.yaml --jobs 2       # runs what has no result yet
    python scripts/run_grid.py recipes/ner/grids/wikiann.yaml --only "^qu/.*/seed_1$"    # runs some of its cells
    python scripts/run_grid.py recipes/ner/grids/wikiann.yaml --table-only   # rewrites the tables

A grid file names the recipes, the settings that all runs share, the targets with their settings, and the seeds; $NAME
in it stands for an environment variable. A run whose settings already have a result is left alone, so that the command
can be stopped and started again at any time. What the runs reached is kept in `recipes/results/<title>.json`, which the
tables are made from; a run on record there stays without its folder, for as long as the grid and the recipe would make
it the same way.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from grid_tables import Entry, Presentation, Run, front_page, markdown_tables, overview, write_between_marks
from tqdm import tqdm

from meta_trainer.cli import main as meta_trainer
from meta_trainer.recipe import find_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
OVERVIEW, FRONT_PAGE = "overview", "what it reaches"
"""Titles of the tables that all grids have a row in."""
WARM_UP = "warm-up"
"""Method name of the runs that others start from."""
CHANGES_NO_RUN = ("description", "method")
"""Keys of a recipe that say how it is shown."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid; `overrides` are the settings that it changes in its recipe, variables as written."""

    method: str
    target: str
    seed: int
    recipe: str
    folder: Path
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        """What `--only` is looked for in."""
        return f"{self.target}/{self.method}/seed_{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the recipe and what the cell changes, with the values of environment variables."""
        changes = yaml.safe_load(os.path.expandvars(yaml.safe_dump(self.overrides)))
        base = yaml.safe_load(find_recipe(self.recipe).read_text())
        return {**base, **changes, "output_dir": str(self.folder)}

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run reached and where, if it has ended with these settings."""
        file, recipe = self.folder / "results.json", self.folder / "cell.yaml"
        if not file.is_file() or not recipe.is_file() or yaml.safe_load(recipe.read_text()) != self.settings:
            return None
        report = json.loads(file.read_text())
        return {**report["results"][-1], "environment": report["environment"]}


@dataclass(frozen=True)
class Grid:
    """A grid file: see `recipes/*/grids/`.

    Attributes:
        title: Name of its results, and of its marks in the Markdown file.
        output_dir: Where the runs' folders go.
        recipes: The methods, by the name that tables give them.
        settings: What all runs change in their recipe.
        targets: Names and settings of what every method is run on.
        seeds: Each gives one run of every method on every target.
        only: Methods that are run on some targets only.
        methods: What a method changes in its recipe, where several share one.
        warm_up: `recipe` and what it changes for a run that comes before all others on a target, which start from its
            model; none by default.
        presentation: Fields of `grid_tables.Presentation`.
    """

    title: str
    output_dir: str
    recipes: dict[str, str]
    settings: dict[str, Any]
    targets: dict[str, dict[str, Any]]
    seeds: list[int]
    only: dict[str, list[str]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    warm_up: dict[str, Any] = field(default_factory=dict)
    presentation: dict[str, Any] = field(default_factory=dict)

    def warm_ups(self) -> Iterator[Cell]:
        """The runs that others start from, one for each target."""
        own = dict(self.warm_up)
        recipe = own.pop("recipe", None)
        for target, settings in self.targets.items() if recipe else ():
            folder = self._warm_up_folder(target)
            overrides = {**self.settings, **settings, **own, "output_dir": str(folder)}
            yield Cell(WARM_UP, target, own["seed"], recipe, folder, overrides)

    def _warm_up_folder(self, target: str) -> Path:
        return Path(self.output_dir) / _name(target) / _name(WARM_UP)

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed, so that a grid that is stopped early has whole rows."""
        for seed in self.seeds:
            for target, target_settings in self.targets.items():
                for method, recipe in self.recipes.items():
                    if target not in self.only.get(method, self.targets):
                        continue
                    folder = Path(self.output_dir) / _name(target) / _name(method) / f"seed_{seed}"
                    start = {"model_name_or_path": str(self._warm_up_folder(target))} if self.warm_up else {}
                    own = {**start, **self.methods.get(method, {})}
                    overrides = {**self.settings, **target_settings, **own, "seed": seed}
                    yield Cell(method, target, seed, recipe, folder, overrides)


def _name(text: str) -> str:
    return text.replace(" ", "_").replace("/", "_")


def load_grid(file: Path) -> Grid:
    """Read a grid file."""
    return Grid(**yaml.safe_load(file.read_text(encoding="utf-8")))


def run_cell(cell: Cell) -> int:
    """Run one recipe in this process; its output goes to a file beside the results."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "cell.yaml").write_text(yaml.safe_dump(cell.settings, sort_keys=False))
    with (cell.folder / "log.txt").open("w") as log:
        # Libraries write to the file descriptors as well as to Python's streams.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        return meta_trainer(["train", "--config", str(cell.folder / "cell.yaml")])


def run_missing(cells: Sequence[Cell], jobs: int) -> None:
    """Run every cell without a result, `jobs` at a time, the cores shared out among them."""
    missing = [cell for cell in cells if cell.result is None]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A process of its own for each run: nothing that one leaves behind, memory included, meets the next.
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
        max_tasks_per_child=1,
    )
    with pool:
        futures = {pool.submit(run_cell, cell): cell for cell in missing}
        for future in tqdm(as_completed(futures), total=len(missing), desc="runs"):
            cell = futures[future]
            if future.result() != 0:
                raise RuntimeError(f"{cell.method} on {cell.target}, seed {cell.seed} failed: {cell.folder}/log.txt")


def collect(cells: Sequence[Cell]) -> list[Run]:
    """What every run that has ended reached, without its history."""
    runs = []
    for cell in cells:
        result = cell.result
        if result is None:
            continue
        last = {key: value for row in result["history"] for key, value in row.items() if key.startswith("meta_module/")}
        kept = {key: result[key] for key in ("step_ms", "peak_memory_mib", "steps", "seconds", "environment")}
        scores = {**result["metrics"], **last}
        runs.append(Run(cell.method, cell.target, cell.seed, cell.recipe, cell.overrides, scores, **kept))
    return runs


def select(cells: Sequence[Cell], pattern: str) -> list[Cell]:
    """The cells in whose name, ``target/method/seed_N``, a regular expression is found.

    Raises:
        ValueError: If it is no regular expression, or is found in no name.
    """
    examples = ", ".join(repr(cell.name) for cell in cells[:3])
    expected = f"--only should be a regular expression that is found in such texts as {examples}; got {pattern!r}"
    try:
        selected = [cell for cell in cells if re.search(pattern, cell.name)]
    except re.error as error:
        raise ValueError(f"{expected}, which is no regular expression: {error}.") from error
    if not selected:
        raise ValueError(f"{expected}, which is found in none of the {len(cells)} cells.")
    return selected


def recipe_content(name: str) -> dict[str, Any]:
    """The settings of a recipe that its runs depend on."""
    content = yaml.safe_load(find_recipe(name).read_text())
    return {key: value for key, value in content.items() if key not in CHANGES_NO_RUN}


def merge(cells: Sequence[Cell], runs: Sequence[Run], record: dict[str, Any]) -> list[Run]:
    """Put runs and those on record together, in the order of the cells.

    A checkout has the record, but not the folders of the runs, so what is on record must not get lost with them. It is
    kept where it proves that the run would be the same today: a cell has its recipe and its overrides, and the recipe
    has the content that it had. A run that was found replaces the one on record.

    Args:
        cells: Those of the grid, warm-ups included.
        runs: What was found in the folders of the cells.
        record: The content of the file of results; `recipes` is missing in old ones, none of whose runs are kept.
    """
    cell_of = {_place(cell): cell for cell in cells}
    on_record = [Run(**content) for content in record.get("runs", [])]
    kept = [run for run in on_record if _is_same(run, cell_of.get(_place(run)), record.get("recipes", {}))]
    merged = {_place(run): run for run in [*kept, *runs]}
    return [merged[place] for place in cell_of if place in merged]


def _is_same(run: Run, cell: Cell | None, recipes: dict[str, Any]) -> bool:
    """Whether the cell would give the run that is on record with these recipes."""
    if cell is None or (run.recipe, run.overrides) != (cell.recipe, cell.overrides):
        return False
    return recipes.get(run.recipe) == recipe_content(run.recipe)


def _place(of: Cell | Run) -> tuple[str, str, int]:
    return of.method, of.target, of.seed


def keep(file: Path, grid: str, cells: Sequence[Cell]) -> None:
    """Bring the file of results up to date, if there is anything to write.

    Args:
        file: The results.
        grid: Path of the grid file, as it is written into the results.
        cells: Those of the grid, warm-ups included.
    """
    record = json.loads(file.read_text()) if file.is_file() else {}
    runs = merge(cells, collect(cells), record)
    if not runs:
        return
    recipes = {name: recipe_content(name) for name in dict.fromkeys(run.recipe for run in runs)}
    content = {"grid": grid, "recipes": recipes, "runs": [vars(run) for run in runs]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def main() -> None:
    """Parse the command line and run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="grid file")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help='run only the cells in whose "target/method/seed_N" this is found'
    )
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the tables of what there is")
    parser.add_argument(
        "--recipes", type=Path, default=RECIPES, help="folder whose README.md has the marks; the one above it, too"
    )
    options = parser.parse_args()
    grid = load_grid(options.grid)
    warm_ups, cells = list(grid.warm_ups()), list(grid.cells())
    try:
        selected = select(cells, options.only)
    except ValueError as error:
        parser.error(str(error))
    if not options.table_only:
        targets = {cell.target for cell in selected}
        run_missing([warm_up for warm_up in warm_ups if warm_up.target in targets], options.jobs)
        run_missing(selected, options.jobs)
    file = options.recipes / "results" / f"{grid.title}.json"
    keep(file, str(options.grid), [*warm_ups, *cells])
    if not file.is_file():
        parser.error(f"no run of {options.grid} has ended, so there is no table: run it without --table-only.")
    runs = [Run(**run) for run in json.loads(file.read_text())["runs"]]
    tables = markdown_tables(runs, [WARM_UP, *grid.recipes], list(grid.targets), Presentation(**grid.presentation))
    print(tables)
    write_between_marks(options.recipes / "README.md", grid.title, tables)
    entries = _entries(options.recipes)
    write_between_marks(options.recipes / "README.md", OVERVIEW, overview(entries))
    write_between_marks(options.recipes.parent / "README.md", FRONT_PAGE, front_page(entries))


def _entries(recipes: Path) -> list[Entry]:
    """All grids that have results."""
    entries: list[Entry] = []
    for file in sorted((recipes / "results").glob("*.json")):
        content = json.loads(file.read_text())
        grid = load_grid(recipes.parent / content["grid"])
        entries.append((Presentation(**grid.presentation), list(grid.recipes), [Run(**r) for r in content["runs"]]))
    return entries


if __name__ == "__main__":
    main()
