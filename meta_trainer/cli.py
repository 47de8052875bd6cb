"""The command line: ``meta-trainer train --config RECIPE [--key value ...]`` and ``meta-trainer list``."""

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from meta_trainer.version import __version__

EXIT_WRONG_INPUT = 2

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; wrong input ends in one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="meta-trainer",
        description="Gradient-based meta-learning for Hugging Face Trainer.",
        epilog="`meta-trainer train --help` shows the settings of a run.",
    )
    parser.add_argument("--version", action="version", version=f"meta-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the recipes that come with the package")
    train = commands.add_parser("train", help="run a recipe", add_help=False)
    train.add_argument("--config", help="recipe: a YAML file, or a name that `meta-trainer list` shows")
    train.add_argument("-h", "--help", action="store_true", help="show the settings of a run")
    train.add_argument("--help-all", action="store_true", help="show also every field of TrainingArguments")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "list":
        if rest:
            parser.error(f"`list` takes no arguments, got {' '.join(rest)}")
        return _list()
    if options.help or options.help_all:
        return _help(options.config, rest, options.help_all)
    return _train(options.config, rest)


def _train(config: str | None, overrides: list[str]) -> int:
    # Reading settings needs no more than a second; torch and the tasks are loaded only for a run.
    from meta_trainer.recipe import read_recipe
    from meta_trainer.run import prepare, run
    from meta_trainer.sigterm import EXIT_TERMINATED, Terminated

    console = Console()
    try:
        if config is None and not overrides:
            raise ValueError("Nothing to train: give a recipe, `meta-trainer train --config RECIPE`.")
        recipe = read_recipe(config, overrides)
        methods = prepare(recipe)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"meta-trainer: error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    try:
        run(recipe, methods, console)
    except Terminated as stop:
        print(
            f"meta-trainer: stopped by SIGTERM; {stop.checkpoint} is saved. To go on, give the same command with "
            "--resume_from_checkpoint last.",
            file=sys.stderr,
        )
        return EXIT_TERMINATED
    except (ValueError, OSError, NotImplementedError) as error:
        logger.debug("The error was raised here:", exc_info=True)
        print(f"meta-trainer: error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


def _list() -> int:
    from meta_trainer.recipe import list_recipes

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, description in list_recipes():
        table.add_row(name, description)
    Console().print(table)
    return 0


def _help(config: str | None, overrides: list[str], everything: bool) -> int:
    from meta_trainer.recipe import make_parser, read_task

    try:
        task, _ = read_task(config, overrides)
    except ValueError as error:
        print(f"meta-trainer: error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    console = Console()
    console.print("usage: meta-trainer train --config RECIPE [--key value ...]\n", markup=False)
    console.print("A key is set in the recipe, a flat YAML file, or on the command line, which wins.")
    for table in make_parser(task).help_tables(everything):
        console.print()
        console.print(table)
    console.print("\nThe keys of the data are those of one task: `--task NAME --help` shows those of another.")
    if not everything:
        console.print("\n`--help-all` shows every field of transformers.TrainingArguments besides.")
    return 0
