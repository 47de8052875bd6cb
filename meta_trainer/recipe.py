"""A recipe: flat settings from a YAML file and the command line, checked before anything is loaded."""

import re
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.hypergrad.checks import is_positive
from meta_trainer.modules.feature_wise_transform import RESIDUAL_NORMS
from meta_trainer.settings_parser import SettingsParser
from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.few_shot import FewShotArguments
from meta_trainer.tasks.image_classification import ImageClassificationArguments
from meta_trainer.tasks.labelled_data import LabelledDataArguments
from meta_trainer.tasks.language_modeling import LanguageModelingArguments
from meta_trainer.tasks.ner import NerArguments
from meta_trainer.tasks.noisy_ner import NoisyNerArguments
from meta_trainer.tasks.text_classification import TextClassificationArguments
from meta_trainer.tasks.trusted_rows import TrustedRowsArguments

PACKAGE = Path(__file__).parent
TaskArguments = (
    NerArguments
    | NoisyNerArguments
    | TextClassificationArguments
    | ImageClassificationArguments
    | FewShotArguments
    | LanguageModelingArguments
)
TASKS: dict[str, type[TaskArguments]] = {
    "ner": NerArguments,
    "noisy_ner": NoisyNerArguments,
    "text_classification": TextClassificationArguments,
    "image_classification": ImageClassificationArguments,
    "few_shot": FewShotArguments,
    "language_modeling": LanguageModelingArguments,
}
TASKS_OF_META_MODULES = {
    "representation_transform": ("ner",),
    "meta_weight_net": ("ner", "noisy_ner", "text_classification", "image_classification", "language_modeling"),
    "input_rotation": ("image_classification",),
    "feature_wise_transform": ("few_shot", "image_classification"),
    "domain_weights": ("text_classification", "language_modeling"),
    "learned_weight_decay": ("ner", "noisy_ner", "text_classification", "image_classification", "language_modeling"),
}
META_MODULES = tuple(TASKS_OF_META_MODULES)
TELLS_TRUSTED = "meta_weight_net"
"""The meta module that tells examples of the meta set from others, so that the model can train on these as well."""


@dataclass
class RunArguments:
    """What a run does and how it is called."""

    task: Literal[
        "ner", "noisy_ner", "text_classification", "image_classification", "few_shot", "language_modeling"
    ] = field(
        default="ner",
        metadata={
            "help": "ner: cross-lingual named entity recognition; noisy_ner: with tags that may be wrong; "
            "text_classification: with labels that may be wrong; image_classification: the same, or with target images "
            "that look different; few_shot: images of domains that were not trained on; language_modeling: on a "
            "mixture of sources."
        },
    )
    description: str = field(default="", metadata={"help": "One line on the recipe, shown by `meta-trainer list`."})
    method: str = field(default="this recipe", metadata={"help": "Name of the method in tables and pictures."})
    compare_with_baseline: bool = field(
        default=False,
        metadata={"help": "Also train the same model without the meta module, first, into <output_dir>/baseline."},
    )


@dataclass
class MetaModuleArguments:
    """Which meta module is learned, and its sizes."""

    meta_module: list[str] = field(
        default_factory=list,
        metadata={"help": f"Meta modules to learn, of {', '.join(META_MODULES)}; none for plain training."},
    )
    rtn_layers: list[str] = field(
        default_factory=lambda: ["-1"],
        metadata={
            "help": "representation_transform: layers to transform, by number (1 is the first, -1 the last) or name."
        },
    )
    rtn_bottleneck_size: int = field(
        default=384, metadata={"help": "representation_transform: size of the bottleneck."}
    )
    rtn_initialization: Literal["xavier", "identity"] = field(
        default="xavier",
        metadata={"help": "representation_transform: starts with a random residual, as the official code, or without."},
    )
    weight_net_hidden_size: int = field(default=100, metadata={"help": "meta_weight_net: size of the hidden layer."})
    weight_net_loss_input: Literal["shared", "unperturbed", "candidate"] = field(
        default="shared",
        metadata={"help": "meta_weight_net: losses that it reads while candidates are evaluated."},
    )
    weight_net_reads_label: bool = field(
        default=False,
        metadata={
            "help": "meta_weight_net: weigh an example by its label as well as its loss; labels may be wrong by rule."
        },
    )
    weight_net_level: Literal["token", "sentence"] = field(
        default="token",
        metadata={"help": "meta_weight_net: of a tagged sentence, weigh each token or the whole, by its mean loss."},
    )
    feature_wise_layers: list[str] = field(
        default_factory=lambda: list(RESIDUAL_NORMS),
        metadata={"help": "feature_wise_transform: patterns of the submodules after which it acts."},
    )
    weight_decay_groups: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "learned_weight_decay: name patterns, one for each group of parameters with its own decay."},
    )
    initial_weight_decay: float = field(
        default=1e-4, metadata={"help": "learned_weight_decay: of each group at the beginning."}
    )

    def __post_init__(self) -> None:
        """Refuse unknown meta modules and sizes below one."""
        for name in self.meta_module:
            if name not in META_MODULES:
                raise ValueError(f"`meta_module` should be among {', '.join(META_MODULES)}, got {name!r}.")
        for name in ("rtn_bottleneck_size", "weight_net_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` should be at least 1, got {getattr(self, name)}.")
        if not is_positive(self.initial_weight_decay):
            raise ValueError(f"`initial_weight_decay` should be a positive number, got {self.initial_weight_decay}.")

    @property
    def layers(self) -> list[int | str]:
        """`rtn_layers`, numbers as numbers."""
        return [int(layer) if re.fullmatch("-?[0-9]+", layer) else layer for layer in self.rtn_layers]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `settings` holds every key with its resolved value, as a YAML file would."""

    run: RunArguments
    task: TaskArguments
    model: ModelArguments
    module: MetaModuleArguments
    training: MetaTrainingArguments
    settings: dict[str, Any]


def make_parser(task: str) -> SettingsParser:
    """Parser of all keys that a recipe of a task may have."""
    own = {f.name for f in fields(TASKS[task])}
    owners = defaultdict(list)
    for name, arguments in TASKS.items():
        for key in {f.name for f in fields(arguments)} - own:
            owners[key].append(repr(name))
    foreign_keys = {
        key: f"It is a key of task={' or '.join(names)}, and this is task={task!r}." for key, names in owners.items()
    }
    return SettingsParser(
        {
            "run": RunArguments,
            f"data of task={task}": TASKS[task],
            "model": ModelArguments,
            "meta module": MetaModuleArguments,
            "meta step": MetaTrainingArguments,
        },
        foreign_keys,
    )


def read_task(config: str | None, overrides: list[str]) -> tuple[str, dict[str, Any]]:
    """Name of the task and the settings of the recipe file.

    Raises:
        ValueError: If the file is missing or no mapping, or there is no such task.
    """
    settings: dict[str, Any] = {}
    if config is not None:
        file = find_recipe(config)
        settings = _read_yaml(file)
        settings.setdefault("output_dir", f"runs/{file.stem}")
    # Which keys there are depends on the task.
    return SettingsParser({"run": RunArguments}).peek("task", settings, overrides, source=str(config)), settings


def read_recipe(config: str | None, overrides: list[str]) -> Recipe:
    """Read a recipe file and the command line, which wins.

    Args:
        config: A path, or the name of a recipe that comes with the package, such as ``ner/metaxl_evograd.yaml``.
        overrides: ``["--key", "value", ...]``.

    Raises:
        ValueError: If a file is missing, a key unknown, a value of the wrong type, or a combination impossible.
    """
    name, settings = read_task(config, overrides)
    parser = make_parser(name)
    run, task, model, module, training = parser.parse(settings, overrides, source=str(config))
    _check_combination(run, task, module)
    return Recipe(run, task, model, module, training, parser.resolved)


def recipes_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def find_recipe(config: str) -> Path:
    """File of a recipe, by path or by its name among the recipes of the package."""
    name = Path(config)
    relative = Path(*name.parts[1:]) if name.parts[:1] == ("recipes",) else name
    for file in (name, recipes_folder() / relative, recipes_folder() / f"{relative}.yaml"):
        if file.is_file():
            return file
    raise ValueError(
        f"There is no recipe {config!r}, neither as a file nor among those of the package. See `meta-trainer list`."
    )


def list_recipes() -> list[tuple[str, str]]:
    """Name and description of every recipe of the package."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"))
    settings = [(file, _read_yaml(file)) for file in files]
    return [(f.relative_to(folder).as_posix(), s["description"]) for f, s in settings if "description" in s]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        node = yaml.compose(text, yaml.SafeLoader)
    # The library raises ValueError itself for what only looks like a date or a number.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no valid YAML: {error}") from error
    if not isinstance(settings, dict) or not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file} should hold `key: value` lines, got {type(settings).__name__}.")
    keys = [key.value for key, _ in node.value]
    # The library would take the last one.
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{file} should hold each key once, got {', '.join(repeated)} more than once.")
    return settings


def _check_combination(run: RunArguments, task: TaskArguments, module: MetaModuleArguments) -> None:
    if run.compare_with_baseline and not module.meta_module:
        raise ValueError("`compare_with_baseline` needs a `meta_module`: without one the run is the baseline.")
    for name in module.meta_module:
        if run.task not in TASKS_OF_META_MODULES[name]:
            suitable = [other for other, tasks in TASKS_OF_META_MODULES.items() if run.task in tasks]
            raise ValueError(
                f"meta_module={name!r} is for task={' or '.join(map(repr, TASKS_OF_META_MODULES[name]))}, not for "
                f"task={run.task!r}. Choose among {', '.join(suitable)}."
            )
    if isinstance(task, FewShotArguments) and task.fixed_transform and module.meta_module:
        raise ValueError(
            "`fixed_transform` is for a baseline: the meta module puts a transformation of its own at the same places. "
            "Leave out one of them."
        )
    if "domain_weights" in module.meta_module and not _has_domains(task):
        raise ValueError(
            f"meta_module='domain_weights' weighs the sources of a mixture, of which task={run.task!r} has one "
            "here. Name the column that tells them by `domain_column`, or, for language models, several `sources`."
        )
    if module.weight_net_reads_label and module.meta_module:
        _check_reads_label(run, module)
    alone = isinstance(task, TrustedRowsArguments) and task.train_on_meta_alone
    if module.meta_module and not run.compare_with_baseline and alone:
        raise ValueError(
            "`train_on_meta_alone` is for a baseline: a meta module learns on the rows that it leaves out. Set it to "
            "false, leave out `meta_module`, or set `compare_with_baseline`."
        )
    if module.meta_module and not run.compare_with_baseline and _trains_on_meta_in_vain(task, module):
        by_weights = f", or for meta_module={TELLS_TRUSTED!r} alone" if isinstance(task, LabelledDataArguments) else ""
        raise ValueError(
            f"`train_on_meta` is for a baseline{by_weights}: a meta module that does not tell these rows from others "
            "learns from rows that the model does not train on. Set it to false, leave out `meta_module`, or set "
            "`compare_with_baseline`."
        )


def _check_reads_label(run: RunArguments, module: MetaModuleArguments) -> None:
    if run.task == "language_modeling" or "meta_weight_net" not in module.meta_module:
        raise ValueError(
            "`weight_net_reads_label` is for meta_module='meta_weight_net' and labels that are classes, got "
            f"meta_module={module.meta_module} and task={run.task!r}. Set it to false."
        )
    if module.weight_net_level == "sentence":
        raise ValueError(
            "`weight_net_reads_label` needs a label for each loss, but with weight_net_level='sentence' a loss belongs "
            "to all labels of a sentence. Leave out one of them."
        )


def _trains_on_meta_in_vain(task: TaskArguments, module: MetaModuleArguments) -> bool:
    if isinstance(task, LanguageModelingArguments):
        return task.train_on_meta
    return isinstance(task, LabelledDataArguments) and task.train_on_meta and module.meta_module != [TELLS_TRUSTED]


def _has_domains(task: TaskArguments) -> bool:
    if isinstance(task, LanguageModelingArguments) and len(task.sources) > 1:
        return True
    return isinstance(task, TextClassificationArguments | LanguageModelingArguments) and task.domain_column is not None
