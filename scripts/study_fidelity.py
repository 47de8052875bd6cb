"""Compare estimated hypergradients with exact ones, on classifiers of three sizes in the middle of their training.

    python scripts/study_fidelity.py                                      # everything: 15 minutes on an idle core
    python scripts/study_fidelity.py --sizes 0.1M --settings estimators   # one size, one table
    python scripts/study_fidelity.py --from_json FILE --markdown          # tables and pictures of a study again

BERT classifiers are trained from scratch on questions (TREC where $META_TRAINER_DATA holds it, else generated texts) of
which 40% have a wrong label, together with a Meta-Weight-Net or a RepresentationTransform. Then every setting estimates
the hypergradients of the same batches, and each is compared with the exact one of its batch, T1-T2 with the learning
rate of the training. Numbers go to `runs/study_fidelity/fidelity.json`, pictures to `docs/figures/estimators_*.png`.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fidelity_figures import draw, markdown, tables
from fidelity_measures import Row, Spread, Study, SubjectRow, agreement, effective_dimension
from fidelity_problems import NETWORK, SIZES, TRANSFORM, BatchPair, Subject, has_trec
from fidelity_settings import EXACT, GROUPS, SCATTER, SETTINGS, Recipe, Setting
from rich.console import Console
from torch import Tensor

from meta_trainer.hypergrad import Hypergradient

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
SHOWN_LOSSES = (0.0, 0.5, 1.0, 2.0, 4.0)
NOISE_SEEDS = 64
"""Estimates of each hypergradient whose bias and scatter are told apart."""


@dataclass(frozen=True)
class Case:
    """What is judged, how often, and by which settings.

    Attributes:
        size: Name of the model's size.
        module: The meta module.
        scope: What the inner step moves.
        batches: Number of batches.
        groups: Of settings.
        scatter_batches: Number of batches whose estimates are repeated.
    """

    size: str
    module: str
    scope: str
    batches: int
    groups: tuple[str, ...]
    scatter_batches: int = 0


ALL_BUT_HIDDEN = tuple(group for group in GROUPS if group != "hidden states")
BUT_NOISE = tuple(group for group in ALL_BUT_HIDDEN if group not in ("layouts", "temperature"))
CASES = (
    Case("0.1M", NETWORK, "all", 50, ALL_BUT_HIDDEN, scatter_batches=3),
    Case("1.4M", NETWORK, "all", 20, BUT_NOISE),
    Case("1.4M", NETWORK, "head", 20, ("estimators",)),
    Case("1.4M", TRANSFORM, "all", 20, ("estimators", "optimizer", "hidden states")),
    Case("5.4M", NETWORK, "all", 8, ("estimators", "optimizer")),
)


class Estimates:
    """Hypergradients of one batch, each computed once, all from the same random state."""

    def __init__(self, subject: Subject, scope: str, batches: BatchPair, seed: int) -> None:
        self._subject, self._scope, self._batches, self._seed = subject, scope, batches, seed
        self._results: dict[str, Hypergradient] = {}

    def __call__(self, recipe: Recipe) -> Hypergradient:
        """The hypergradient by a recipe."""
        if recipe.key not in self._results:
            self._results[recipe.key] = self.repeat(recipe, self._seed)
        return self._results[recipe.key]

    def repeat(self, recipe: Recipe, noise_seed: int) -> Hypergradient:
        """The same with noise of another seed."""
        torch.manual_seed(self._seed)
        problem = self._subject.problem(self._batches, self._scope, recipe.variant)
        return recipe.estimate(problem, self._subject, noise_seed)


def judge(case: Case, subject: Subject, seed: int) -> Study:
    """Estimate by every setting on every batch, and compare."""
    settings = [setting for setting in SETTINGS if setting.group in case.groups]
    found: dict[tuple[int, str], list[tuple[Tensor, Tensor, Hypergradient]]] = defaultdict(list)
    exact: dict[str, list[Tensor]] = defaultdict(list)
    val_losses = []
    for number in range(case.batches):
        estimate = Estimates(subject, case.scope, subject.draw(), 1000 * seed + number)
        for name, vector in vectors(subject, estimate(EXACT)).items():
            exact[name].append(vector)
        val_losses.append(float(estimate(EXACT).val_loss))
        for position, setting in enumerate(settings):
            result, reference = estimate(setting.recipe), vectors(subject, estimate(setting.reference))
            for name, vector in vectors(subject, result).items():
                found[position, name].append((vector, reference[name], result))
    rows = [_row(case, settings[position], name, values) for (position, name), values in found.items()]
    subjects = [_subject_row(case, subject, name, values, val_losses) for name, values in exact.items()]
    return Study(subjects, rows, _spreads(case, subject, seed))


def vectors(subject: Subject, result: Hypergradient) -> dict[str, Tensor]:
    """A hypergradient as vectors ``[H]``, by the names of the meta-parameters."""
    grads = iter(result.grads)
    return {
        name: torch.cat([next(grads).flatten().double() for _ in parameters])
        for name, parameters in subject.meta_parameters().items()
    }


def _row(case: Case, setting: Setting, name: str, values: Sequence[tuple[Tensor, Tensor, Hypergradient]]) -> Row:
    found, exact, results = zip(*values, strict=True)
    return Row.of(
        found,
        exact,
        largest_weights=[float(result.weights.max()) for result in results],
        largest_scores=[float(result.scores.abs().max()) for result in results],
        size=case.size,
        scope=case.scope,
        meta_params=name,
        group=setting.group,
        setting=setting.name,
        value=setting.value,
        passes=setting.recipe.passes(case.scope),
    )


def _subject_row(
    case: Case, subject: Subject, name: str, exact: Sequence[Tensor], val_losses: Sequence[float]
) -> SubjectRow:
    theta = subject.problem(subject.draw(), case.scope).theta
    return SubjectRow(
        size=case.size,
        parameters=sum(p.numel() for p in subject.model.parameters()),
        theta=sum(p.numel() for p in theta),
        scope=case.scope,
        meta_params=name,
        num_meta_params=len(exact[0]),
        effective_dimension=effective_dimension(exact),
        agreement=agreement(exact),
        batches=case.batches,
        learning_rate=subject.learning_rate,
        train_loss=subject.train_loss,
        val_loss=sum(val_losses) / len(val_losses),
        example_weights=subject.example_weights(SHOWN_LOSSES),
    )


def _spreads(case: Case, subject: Subject, seed: int) -> list[Spread]:
    """Bias and scatter of blind noise."""
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for number in range(case.scatter_batches):
        estimate = Estimates(subject, case.scope, subject.draw(), 1000 * seed + number)
        for setting in SCATTER:
            exact = vectors(subject, estimate(setting.reference))
            repeated = [vectors(subject, estimate.repeat(setting.recipe, s)) for s in range(NOISE_SEEDS)]
            for name, vector in exact.items():
                found[setting.name, name].append((torch.stack([each[name] for each in repeated]), vector))
    return [
        Spread.of(*zip(*values, strict=True), size=case.size, meta_params=name, setting=setting)
        for (setting, name), values in found.items()
    ]


def run(cases: Sequence[Case], seed: int, path: Path, settings: dict[str, object], console: Console) -> Study:
    """Judge all cases; the JSON file is written after each, so that nothing is lost when the study is stopped."""
    subjects: dict[tuple[str, str], Subject] = {}
    study = Study()
    for number, case in enumerate(cases, start=1):
        start = time.perf_counter()
        if (case.size, case.module) not in subjects:
            subjects = {(case.size, case.module): Subject(SIZES[case.size], case.module, seed)}
        trained = time.perf_counter()
        study += judge(case, subjects[case.size, case.module], seed)
        study.write(path, settings)
        seconds = f"{trained - start:.0f} s of training, {time.perf_counter() - trained:.0f} s of estimates"
        title = f"{case.size}, {case.module}, {case.scope}"
        console.print(f"[{number}/{len(cases)}] {title}: {seconds}", highlight=False, markup=False)
    return study


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    cases = []
    for case in CASES:
        groups = tuple(group for group in case.groups if group in options.settings)
        scatter = case.scatter_batches if "scatter" in options.settings else 0
        batches = case.batches if options.batches is None else options.batches
        if case.size in options.sizes and (groups or scatter):
            cases.append(replace(case, batches=batches, groups=groups, scatter_batches=min(scatter, batches)))
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, judge, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="models to train")
    parser.add_argument(
        "--settings", nargs="+", choices=(*GROUPS, "scatter"), default=(*GROUPS, "scatter"), help="groups of settings"
    )
    parser.add_argument("--batches", type=int, help="batches of every case, instead of its own number")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, dropout and noise")
    parser.add_argument("--output", type=Path, default=Path("runs/study_fidelity"), help="folder of the JSON file")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the pictures")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--from_json", type=Path, help="judge nothing, show what this file holds")
    options = parser.parse_args(arguments)
    if options.batches is not None and options.batches < 2:
        parser.error(f"--batches should be at least 2, got {options.batches}")
    console = Console()
    if options.from_json is None:
        torch.set_num_threads(1)  # more would cost such small models more than they give
        settings = {"seed": options.seed, "sizes": options.sizes, "batches": options.batches, "trec": has_trec()}
        study = run(choose(options), options.seed, options.output / "fidelity.json", settings, console)
    else:
        study = Study.read(options.from_json)
    if options.markdown:
        print(markdown(study))
    else:
        for table in tables(study):
            console.print(table.rich())
    for path in draw(study, options.figures):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
