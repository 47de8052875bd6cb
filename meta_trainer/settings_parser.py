"""HfArgumentParser over dataclasses, fed from flat settings and the command line, with errors that help."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import date
from difflib import get_close_matches
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from rich.markup import escape
from rich.table import Table
from transformers import HfArgumentParser, TrainingArguments

# Of Trainer's many fields, those that a run is likely to set; the others stay out of the short help.
COMMON_TRAINING_FIELDS = frozenset(
    {
        "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "optim", "lr_scheduler_type",
        "warmup_steps", "seed", "bf16", "fp16", "use_cpu", "logging_steps", "eval_strategy", "eval_steps",
        "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "resume_from_checkpoint",
        "report_to", "push_to_hub", "hub_model_id",
    }
)  # fmt: skip

NONE_IS_A_VALUE = frozenset({"meta_guard", "report_to"})
"""Optional settings for which 'none' is one of the values, and not the absence of one."""


class SettingsParser(HfArgumentParser):
    """Parse settings into dataclasses.

    Args:
        kinds: The dataclasses by the title of their group; their fields are the keys, each in one dataclass only.
        foreign_keys: What to say of keys that belong elsewhere, by key.
    """

    def __init__(self, kinds: dict[str, Any], foreign_keys: Mapping[str, str] = MappingProxyType({})) -> None:
        self.kinds = kinds
        self.foreign_keys = foreign_keys
        # An abbreviated key would be taken for the wrong one as soon as a field is added.
        super().__init__(list(kinds.values()), allow_abbrev=False)
        hints = {name: hint for kind in kinds.values() for name, hint in get_type_hints(kind).items()}
        self._trainer_fields = set(get_type_hints(TrainingArguments))
        self._actions_by_key = {a.dest: a for a in self._actions if a.dest in hints}
        self._optional = {name for name, hint in hints.items() if NoneType in get_args(hint)}
        self._emptied_by_none = self._optional - NONE_IS_A_VALUE
        # Asked before a recipe's values become the defaults.
        self._lists_emptied_by_none = {a.dest for a in self._actions if a.nargs == "+" and a.default == []}
        self._number_or_word = {name for name, hint in hints.items() if {float, str} <= {*get_args(hint)}}
        self._truth_values = {name for name, hint in hints.items() if bool in (hint, *get_args(hint))}
        self._mappings = {
            name for name, hint in hints.items() if any("dict" in str(h) for h in (hint, *get_args(hint)))
        }

    def parse(self, settings: dict[str, Any], overrides: Sequence[str], source: str) -> tuple[Any, ...]:
        """Dataclass instances of `settings`, a file's content, overridden by command-line arguments.

        Every key with its resolved value is kept in `self.resolved`.

        Raises:
            ValueError: If a key is unknown, or a value has the wrong type or is refused by its dataclass.
        """
        for key in settings:
            if key not in self._actions_by_key:
                raise ValueError(f"{source}: unknown key {key!r}.{self._suggestion(str(key))}")
        self.set_defaults(**{key: self._converted(key, value, source) for key, value in settings.items()})
        for action in self._actions:
            action.required = False
        namespace, unknown = self.parse_known_args(list(overrides))
        if unknown:
            flag = unknown[0]
            if not flag.startswith("--"):
                raise ValueError(f"Unexpected argument {flag!r}. Settings are given as `--key value`.")
            raise ValueError(f"Unknown key {flag!r}.{self._suggestion(flag.lstrip('-').split('=')[0])}")
        self.resolved = {key: value for key, value in vars(namespace).items() if key in self._actions_by_key}
        return tuple(self._instantiate(kind) for kind in self.kinds.values())

    def peek(self, key: str, settings: dict[str, Any], overrides: Sequence[str], source: str) -> Any:
        """Value of one key, before it is known which other keys there are.

        Raises:
            ValueError: If it has the wrong type or is none of the choices.
        """
        if key in settings:
            self.set_defaults(**{key: self._converted(key, settings[key], source)})
        return getattr(self.parse_known_args(list(overrides))[0], key)

    def error(self, message: str) -> NoReturn:
        """Raise what `argparse` finds wrong, without its page of usage."""
        raise ValueError(message.removeprefix("argument "))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """The value of one argument; `none` empties a setting that may be empty."""
        if arg_string == "none" and action.dest in self._emptied_by_none:
            return None
        if action.dest in self._number_or_word and action.dest not in self._trainer_fields:
            with suppress(ValueError):
                return float(arg_string)
        return super()._get_value(action, arg_string)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of one setting; `none` alone empties a list that is empty by default."""
        if arg_strings == ["none"] and action.dest in self._lists_emptied_by_none:
            return []
        return super()._get_values(action, arg_strings)

    def help_tables(self, everything: bool = False) -> Iterator[Table]:
        """One table of keys, defaults and meanings for each group; of Trainer's fields the common ones or all."""
        shown: set[str] = set()
        for title, kind in self.kinds.items():
            own = [f.name for f in fields(kind) if f.name not in self._trainer_fields]
            yield self._help_table(title, own)
            shown.update(own)
        rest = [key for key in self._actions_by_key if key not in shown]
        yield self._help_table(
            "training", rest if everything else [key for key in rest if key in COMMON_TRAINING_FIELDS]
        )

    def _help_table(self, title: str, keys: Sequence[str]) -> Table:
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        table.add_column("key", no_wrap=True, style="cyan")
        table.add_column("default")
        table.add_column("meaning", ratio=1)
        for key in keys:
            action = self._actions_by_key[key]
            default = action.default if isinstance(action.default, list) else [action.default]
            meaning = " ".join((action.help or "").replace("%%", "%").split())
            table.add_row(f"--{key}", escape(" ".join(str(d) for d in default if d not in (None, ""))), escape(meaning))
        return table

    def _instantiate(self, kind: Any) -> Any:
        names = {f.name for f in fields(kind) if f.init}
        return kind(**{key: value for key, value in self.resolved.items() if key in names})

    def _converted(self, key: str, value: Any, source: str) -> Any:
        """`value` as the command line would have given it."""
        action = self._actions_by_key[key]
        if value in (None, "none", ["none"]) and key in self._lists_emptied_by_none:
            return []
        if value is None:
            if key not in self._optional and action.default is not None:
                raise ValueError(f"{source}: `{key}` should have a value, got none.")
            return None
        if isinstance(value, dict):
            if key not in self._mappings:
                raise ValueError(f"{source}: `{key}` should be a plain value, got a mapping.")
            return self._mapping(key, value, source)
        if action.nargs == "+":
            items = value if isinstance(value, list) else [value]
            return [self._item(action, item, source) for item in items]
        if isinstance(value, list):
            raise ValueError(f"{source}: `{key}` should be a single value, got a list.")
        return self._item(action, value, source)

    def _mapping(self, key: str, value: dict[Any, Any], source: str) -> str:
        try:
            return json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: `{key}` should be a mapping that JSON can hold: {error}") from error

    def _item(self, action: argparse.Action, value: Any, source: str) -> Any:
        if not isinstance(value, str | int | float | date):
            raise ValueError(f"{source}: `{action.dest}` should hold text or numbers, got {type(value).__name__}.")
        if isinstance(value, bool) and action.dest not in self._truth_values | self._trainer_fields:
            raise ValueError(
                f"{source}: `{action.dest}` should be text or a number, got {str(value).lower()}. YAML reads yes, no, "
                "on and off as a truth value: put the word in quotes."
            )
        try:
            item = self._get_value(action, str(value))
            self._check_value(action, item)
        except argparse.ArgumentError as error:
            raise ValueError(f"{source}: `{action.dest}`: {error.message}") from error
        return item

    def _suggestion(self, key: str) -> str:
        if key in self.foreign_keys:
            return f" {self.foreign_keys[key]}"
        near = get_close_matches(key, self._actions_by_key, n=1, cutoff=0.5)
        return f" Did you mean {near[0]!r}?" if near else " See `meta-trainer train --help` for all keys."
