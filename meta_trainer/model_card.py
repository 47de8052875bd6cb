"""Sections of a model card: how to load a model of this package, and what was meta-learned beside it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.modules import MetaModule, MetaModuleList

TAGS = ("meta-learning", "meta-trainer")

_LOADING = """
## Loading the model

The class of this model comes with `meta_trainer`; `transformers` does not know it before it is imported. In the
folder of this card:

```python
from {module} import {kind}

model = {kind}.from_pretrained(".")
```
"""

_SECTION = """
## Meta-learning

Trained with `meta_trainer`: beside the model, a **{name}** ({count:,} parameters) was learned by the `{estimator}`
hypergradient. It took part in training only; the model runs without it.

| setting | value |
|---|---|
{rows}

The meta module lies in `meta_module/`:

```python
from meta_trainer import {kind}

meta_module = {kind}.from_pretrained("meta_module")
```
"""

_COMMON = ("perturb", "meta_every", "meta_optim", "meta_learning_rate", "per_device_meta_batch_size")
_BY_ESTIMATOR = {"evograd": ("num_candidates", "sigma", "temperature", "noise")}
_IF_SET = (
    "antithetic",
    "orthogonal",
    "include_unperturbed",
    "relative_sigma",
    "inner_step",
    "meta_guard",
    "meta_trust_region",
    "meta_delay_steps",
)
_UNSET = (False, 0.0, "none", "sgd")


def add_loading_section(card_file: Path, model: nn.Module) -> None:
    """Append how `model` is loaded to the model card at `card_file`, if its class is one of this package."""
    # Wrappers put classes of their own before it.
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith(f"{__package__}.")]
    if kinds:
        card = ModelCard.load(card_file, ignore_metadata_errors=True)
        card.text = card.text.rstrip() + "\n" + _LOADING.format(module=kinds[0].__module__, kind=kinds[0].__name__)
        card.save(card_file)


def add_meta_section(card_file: Path, meta_module: MetaModule, args: MetaTrainingArguments) -> None:
    """Append what was meta-learned, and how, to the model card at `card_file`."""
    card = ModelCard.load(card_file, ignore_metadata_errors=True)
    changed = [name for name in _IF_SET if getattr(args, name) not in _UNSET]
    settings = ("hypergradient", *_BY_ESTIMATOR.get(args.hypergradient, ()), *changed, *_COMMON)
    members = list(meta_module) if isinstance(meta_module, MetaModuleList) else [meta_module]
    card.text = (
        card.text.rstrip()
        + "\n"
        + _SECTION.format(
            name=" and a ".join(type(member).__name__ for member in members),
            kind=type(meta_module).__name__,
            count=_num_parameters(meta_module),
            estimator=args.hypergradient,
            rows="\n".join(f"| `{name}` | {_readable(getattr(args, name))} |" for name in settings),
        )
    )
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    card.save(card_file)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _readable(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
