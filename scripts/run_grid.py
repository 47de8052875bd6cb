"""Run a grid of recipes x targets x seeds, resume where it stopped, and write its table from the runs' JSON.

    python scripts/run_grid.py recipes/ner/grids/wikiann.yaml --jobs 2       # runs what has no result yet
    python scripts/run_grid.py recipes/ner/grids/wikiann.yaml --table-only   # rewrites the table

A grid file names the recipes, the settings that all runs share, the targets with their settings, and the seeds; $NAME
in it stands for an environment variable. A run whose settings already have a result is left alone, so that the command
can be stopped and started again at any time.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from meta_trainer.cli import main as meta_trainer
from meta_trainer.recipe import find_recipe

README = Path(__file__).parent.parent / "recipes" / "README.md"


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    target: str
    seed: int
    folder: Path
    settings: dict[str, Any]

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run reached, if it has ended with these settings."""
        file, recipe = self.folder / "results.json", self.folder / "cell.yaml"
        if not file.is_file() or not recipe.is_file() or yaml.safe_load(recipe.read_text()) != self.settings:
            return None
        result: dict[str, Any] = json.loads(file.read_text())["results"][-1]
        return result


@dataclass(frozen=True)
class Grid:
    """A grid file: see `recipes/ner/grids/`."""

    title: str
    output_dir: str
    recipes: dict[str, str]
    settings: dict[str, Any]
    targets: dict[str, dict[str, Any]]
    seeds: list[int]
    only: dict[str, list[str]]
    metric: str = "f1"

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed, so that a grid that is stopped early has whole rows."""
        for seed in self.seeds:
            for target, target_settings in self.targets.items():
                for method, recipe in self.recipes.items():
                    if target not in self.only.get(method, self.targets):
                        continue
                    folder = Path(self.output_dir) / target / method.replace(" ", "_") / f"seed_{seed}"
                    base = yaml.safe_load(find_recipe(recipe).read_text())
                    fixed = {"seed": seed, "output_dir": str(folder)}
                    yield Cell(method, target, seed, folder, {**base, **self.settings, **target_settings, **fixed})


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
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )
    with pool:
        futures = {pool.submit(run_cell, cell): cell for cell in missing}
        for future in tqdm(as_completed(futures), total=len(missing), desc="runs"):
            cell = futures[future]
            if future.result() != 0:
                raise RuntimeError(f"{cell.method} on {cell.target}, seed {cell.seed} failed: {cell.folder}/log.txt")


def markdown_table(grid: Grid, cells: Sequence[Cell]) -> str:
    """F1 as mean and standard deviation over seeds, per method and target, and what a step costs.

    Costs are medians over the targets that every method runs on, so that rows can be compared.
    """
    results = [(cell, result) for cell in cells if (result := cell.result) is not None]
    targets = list(grid.targets)
    common = [target for target in targets if all(target in only for only in grid.only.values())]
    lines = [f"| method | {' | '.join(targets)} | mean | ms per step | peak MiB |", "|---" * (len(targets) + 4) + "|"]
    for method in grid.recipes:
        own = [(cell.target, result) for cell, result in results if cell.method == method]
        scores = {t: [100 * r["metrics"][grid.metric] for target, r in own if target == t] for t in targets}
        means = [statistics.mean(values) for values in scores.values() if values]
        mean = f"{statistics.mean(means):.2f}" if len(means) == len(targets) else ""
        costs = [_median([r[key] for target, r in own if target in common]) for key in ("step_ms", "peak_memory_mib")]
        lines.append(f"| {' | '.join([method, *(_mean_and_deviation(scores[t]) for t in targets), mean, *costs])} |")
    return "\n".join([*lines, "", *_paired_differences(grid, results), *_averages_over_common_targets(grid, results)])


def _paired_differences(grid: Grid, results: Sequence[tuple[Cell, dict[str, Any]]]) -> list[str]:
    """Every method against the first one, on the same targets and seeds."""
    scores = {(c.method, c.target, c.seed): 100 * r["metrics"][grid.metric] for c, r in results}
    baseline, *methods = grid.recipes
    lines = []
    for method in methods:
        pairs = [(f1, scores.get((baseline, t, seed))) for (name, t, seed), f1 in scores.items() if name == method]
        differences = [f1 - reference for f1, reference in pairs if reference is not None]
        if len(differences) > 1:
            error = statistics.stdev(differences) / len(differences) ** 0.5
            lines.append(
                f"{method} − {baseline}: {statistics.mean(differences):+.2f} ± {error:.2f} "
                f"(standard error over {len(differences)} pairs of target and seed).  "
            )
    return lines


def _averages_over_common_targets(grid: Grid, results: Sequence[tuple[Cell, dict[str, Any]]]) -> list[str]:
    """For methods that ran on some targets only: all methods, averaged over those."""
    lines = []
    for partial, targets in grid.only.items():
        means = []
        for method in grid.recipes:
            values = [100 * r["metrics"][grid.metric] for c, r in results if c.method == method and c.target in targets]
            means.append(f"{method} {statistics.mean(values):.2f}" if values else f"{method} –")
        lines.append(f"Average over the targets of {partial} ({', '.join(targets)}): {', '.join(means)}.")
    return lines


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f}" if values else ""


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def write_table(grid: Grid, table: str, file: Path) -> None:
    """Put the table between the grid's two marks in a Markdown file."""
    begin, end = f"<!-- begin: {grid.title} -->", f"<!-- end: {grid.title} -->"
    text = file.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{file} should hold the lines {begin!r} and {end!r}, where the table goes.")
    before, after = text.split(begin)[0], text.split(end)[1]
    file.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Parse the command line and run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="grid file")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the table of what there is")
    parser.add_argument("--readme", type=Path, default=README, help="Markdown file that holds the table's marks")
    options = parser.parse_args()
    grid = Grid(**yaml.safe_load(os.path.expandvars(options.grid.read_text(encoding="utf-8"))))
    cells = list(grid.cells())
    if not options.table_only:
        run_missing(cells, options.jobs)
    table = markdown_table(grid, cells)
    print(table)
    write_table(grid, table, options.readme)


if __name__ == "__main__":
    main()
