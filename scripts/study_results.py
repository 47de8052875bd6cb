"""Train two recipes with every estimator over many meta learning rates: do better hypergradients give better models?

    python scripts/study_results.py --jobs 2              # runs what has no result yet, then the figure and the table
    python scripts/study_results.py --table-only          # what there is so far

The recipes are Meta-Weight-Net on questions (TREC where $META_TRAINER_DATA holds it, else generated texts) with 40% of
the labels flipped, and MetaXL on generated sentences, both with small encoders that are trained from scratch. Results
go to `runs/study_results/`, the figure to `docs/figures/estimators_results.png`.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_grid import Cell, run_missing

from meta_trainer.report import COLOURS, environment

RATES = (1e-3, 1e-2, 1e-4, 1e-6, 1e-5)
"""Meta learning rates; those at which something happens come first."""

SEEDS = (1, 2, 3)
PLAIN = "plain training"

PAPER = {"hypergradient": "evograd", "noise": "sign", "sigma": 1.0e-3, "temperature": 0.05}
EIGHT = {"num_candidates": 8, "antithetic": True, "orthogonal": True, "temperature": "auto"}
GUIDED = {"hypergradient": "evograd", "noise": "guided", "sigma": None, "meta_guard": "none"}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "EvoGrad, K=2": PAPER,
    "EvoGrad, K=8, antithetic, orthogonal": {**PAPER, **EIGHT},
    "guided": GUIDED,
    "guided, optimizer's step": {**GUIDED, "inner_step": "optimizer"},
    "guided, step of given length": {**GUIDED, "inner_step": "normalized"},
    "guided, guard": {**GUIDED, "meta_guard": "ascent"},
    "guided, guard, trust region": {**GUIDED, "meta_guard": "change", "meta_trust_region": 2e-3},
    "T1-T2": {"hypergradient": "t1t2"},
}
"""Settings of the estimators, by name."""

REMEDIES: dict[str, dict[str, Any]] = {
    "guided, warm-up": {**GUIDED, "meta_lr_scheduler_type": "constant_with_warmup", "meta_warmup_steps": 0.3},
    "guided, clipping": {**GUIDED, "meta_max_grad_norm": 1e-7},
    "guided, every 4th step": {**GUIDED, "meta_every": 4},
    "guided, trust region": {**GUIDED, "meta_trust_region": 2e-3},
    "guided, guard against change": {**GUIDED, "meta_guard": "change"},
}
"""What might keep an accurate hypergradient from doing harm at the highest rate, one by one."""

SMALL_ENCODER = {
    "model_name_or_path": None,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
COMMON = {
    # Adam's own epsilon would slow the meta step down where hypergradients are small, and so mix up rate and estimator.
    "meta_adam_epsilon": 1e-15,
    "meta_weight_decay": 0.0,
    "logging_steps": 20,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
QUESTIONS = {
    **SMALL_ENCODER,
    **COMMON,
    "vocab_size": 4000,
    "max_length": 24,
    "max_train_examples": 3000,
    "num_train_epochs": 4,
    "learning_rate": 5e-4,
    # The estimators on their own: without what the recipe does for a good model.
    "balance_meta_set": True,
    "train_on_meta": False,
    "weight_net_reads_label": False,
    "meta_delay_steps": 0,
    "meta_trust_region": 0.0,
}
TREC: dict[str, Any] = {
    "data": None,
    "train_file": "text/trec6_train.parquet",
    "test_file": "text/trec6_test.parquet",
    "label_column": "label",
    "exclude_column": "dup",
}
GENERATED = {"data": "generated", "label_column": "label"}
SENTENCES = {**COMMON, "max_steps": 300, "compare_with_baseline": False, "meta_lr_scheduler_type": "constant"}

RECIPES = {"Meta-Weight-Net": "text_classification/meta_weight_net_evograd.yaml", "MetaXL": "quickstart.yaml"}
METRICS = {"Meta-Weight-Net": "accuracy", "MetaXL": "f1"}


def cells(folder: Path) -> Iterator[Cell]:
    """Every run, rate by rate and seed by seed, so that a study that is stopped early has whole rows."""
    for seed in SEEDS:
        for recipe in RECIPES:
            yield _cell(folder, recipe, PLAIN, None, seed)
    for rates in (RATES[:2], RATES[2:3], RATES[3:]):
        for seed in SEEDS:
            for recipe in RECIPES:
                for estimator in ESTIMATORS:
                    for rate in rates:
                        yield _cell(folder, recipe, estimator, rate, seed)
                if seed == SEEDS[0] and max(RATES) in rates:
                    for remedy in REMEDIES:
                        yield _cell(folder, recipe, remedy, max(rates), seed)


def _cell(folder: Path, recipe: str, estimator: str, rate: float | None, seed: int) -> Cell:
    has_trec = (Path(os.environ.get("META_TRAINER_DATA", "")) / TREC["train_file"]).is_file()
    task = {**QUESTIONS, **(TREC if has_trec else GENERATED)} if recipe == "Meta-Weight-Net" else SENTENCES
    method = (
        {"meta_module": []} if rate is None else {**{**ESTIMATORS, **REMEDIES}[estimator], "meta_learning_rate": rate}
    )
    name = f"{estimator}_{rate:.0e}" if rate is not None else estimator
    path = folder / recipe / name.replace(" ", "_").replace(",", "") / f"seed_{seed}"
    return Cell(estimator, f"{recipe}|{rate}", seed, RECIPES[recipe], path, {**task, **method, "seed": seed})


Scores = dict[str, dict[str, dict[str, dict[int, float]]]]
"""In percent, by recipe, method, rate and seed."""


def collect(runs: Sequence[Cell]) -> Scores:
    """Scores of every run that has ended."""
    scores: Scores = {}
    for cell in runs:
        result = cell.result
        if result is not None:
            recipe, rate = cell.target.split("|")
            by_seed = scores.setdefault(recipe, {}).setdefault(cell.method, {}).setdefault(rate, {})
            by_seed[cell.seed] = 100 * result["metrics"].get(METRICS[recipe], 0.0)
    return scores


def differences(scores: Scores, recipe: str, method: str, rate: float) -> list[float]:
    """To plain training with the same seed."""
    plain = scores[recipe][PLAIN][str(None)]
    by_seed = scores[recipe].get(method, {}).get(str(rate), {})
    return [score - plain[seed] for seed, score in by_seed.items() if seed in plain]


def markdown(scores: Scores) -> str:
    """A table for each recipe: difference to plain training, estimator by meta learning rate."""
    lines, rates = [], sorted(RATES)
    for recipe, by_method in scores.items():
        plain = list(by_method[PLAIN][str(None)].values())
        lines.append(f"| {recipe}: {METRICS[recipe]} − plain | {' | '.join(f'{rate:.0e}' for rate in rates)} |")
        lines.append("|---" * (len(rates) + 1) + "|")
        for method in by_method:
            if method != PLAIN:
                row = (_summary(differences(scores, recipe, method, rate)) for rate in rates)
                lines.append(f"| {method} | {' | '.join(row)} |")
        lines += [
            "",
            f"Plain training: {statistics.mean(plain):.1f} ({', '.join(f'{score:.1f}' for score in plain)}).",
            "",
        ]
    return "\n".join(lines)


def _summary(values: Sequence[float]) -> str:
    """Mean, standard error and number."""
    if not values:
        return ""
    error = f" ± {_error(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{error} ({len(values)})"


def _error(values: Sequence[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)


def draw(scores: Scores, file: Path) -> None:
    """Difference to plain training against meta learning rate, a line for each estimator."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, recipe in zip(panels, scores, strict=True):
        _draw_panel(axes, scores, recipe)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _draw_panel(axes: Axes, scores: Scores, recipe: str) -> None:
    axes.axhline(0, color="grey", linestyle="--", label=PLAIN)
    for number, (method, colour, marker) in enumerate(zip(ESTIMATORS, (*COLOURS, "grey"), "osD^*vPX", strict=True)):
        points = [(rate, values) for rate in sorted(RATES) if (values := differences(scores, recipe, method, rate))]
        # Side by side, so that error bars can be told apart.
        rates = [rate * 1.07 ** (number - 3) for rate, _ in points]
        means = [statistics.mean(values) for _, values in points]
        axes.plot(rates, means, marker=marker, markersize=5, color=colour, label=method)
        for rate, mean, (_, values) in zip(rates, means, points, strict=True):
            if len(values) > 1:
                axes.errorbar(rate, mean, _error(values), color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("meta learning rate")
    axes.set_ylabel(f"{METRICS[recipe]}, points above plain training")
    axes.set_title(recipe)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Parse the command line and run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--output", type=Path, default=Path("runs/study_results"), help="folder of the runs")
    parser.add_argument("--table-only", action="store_true", help="run nothing, show what there is")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/estimators_results.png"), help="the picture")
    options = parser.parse_args()
    runs = list(cells(options.output))
    if not options.table_only:
        run_missing(runs, options.jobs)
    scores = collect(runs)
    print(markdown(scores))
    draw(scores, options.figure)
    report = {**environment(), "scores": scores}
    (options.output / "results.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
