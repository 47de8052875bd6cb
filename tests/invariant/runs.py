"""Small training runs in double precision, and what two of them are compared by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

sys.path.append(str(Path(__file__).parent.parent / "trainer"))

from tiny import (  # the path has to be known first
    NUM_META,
    HiddenShift,
    IdentityModule,
    MeanLoss,
    arguments,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)

from meta_trainer import DomainWeights, LearnedWeightDecay, MetaModule, MetaTrainer

EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDING = {"rtol": 1e-5, "atol": 1e-8}
"""For the same sum in another order, in double precision, over a whole run: Adam magnifies what is near zero."""

SINGLE = {"rtol": 1e-3, "atol": 2e-6}
"""The same where the model computes its loss in single precision."""


class TokenDomains(DomainWeights):
    """Domain weights that tell the domain of a row by its first token."""

    def transform_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "domain": batch["input_ids"][:, 0] % len(self.domains)}


ESTIMATORS: dict[str, dict[str, Any]] = {
    "evograd": {"num_candidates": 4, "sigma": 1e-2},
    "guided": {"noise": "guided", "meta_guard": "none"},
    "finite_difference": {"hypergradient": "finite_difference"},
    "t1t2": {"hypergradient": "t1t2"},
}

MODULES = {
    "identity": IdentityModule,
    "mean_loss": MeanLoss,
    "weight_net": weight_net,
    "hidden_shift": HiddenShift,
    "domain_weights": lambda: TokenDomains(["a", "b", "c"]),
    "weight_decay": lambda: LearnedWeightDecay(["classifier", "*"], initial_decay=1.0),
    "both": lambda: [weight_net(), HiddenShift()],
}


class Stream(IterableDataset):
    """Sentences without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from sentences(48, 1)


def texts(number: int, seed: int) -> list[dict[str, Any]]:
    """Rows for next-token prediction, of which a differing number of labels counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (number, 6), generator=generator)
    counted = torch.randint(2, 7, (number,), generator=generator)
    return [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(6) >= count, -100)}
        for row, count in zip(ids, counted, strict=True)
    ]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def new_run(
    folder: Path,
    module: str | None = "both",
    estimator: str = "evograd",
    decoder: bool = False,
    stream: bool = False,
    dropout: float = 0.0,
    kind: type[Trainer] = MetaTrainer,
    mean_over_batch: bool = True,
    **settings: Any,
) -> Any:
    """A trainer on 48 rows, 16 of them in an optimizer step unless `settings` say otherwise.

    Args:
        folder: For its output.
        module: Name of the meta module; None for plain training.
        estimator: Name of the estimator.
        decoder: A decoder, whose loss is a mean over all tokens of an optimizer step, instead of an encoder.
        stream: A train set without a length.
        dropout: Of the model.
        kind: Of trainer.
        mean_over_batch: Tell Trainer that the encoder's loss is a mean over a batch, whatever the optimizer step holds.
        settings: Of the arguments.
    """
    model = (tiny_llama() if decoder else tiny_bert(dropout)).double()
    rows = texts if decoder else sentences
    defaults = {"max_steps": 4, "per_device_train_batch_size": 16, "logging_steps": 1, "per_device_meta_batch_size": 4}
    args = arguments(folder, **{**defaults, "meta_learning_rate": 0.01, **ESTIMATORS[estimator], **settings})
    keywords: dict[str, Any] = {}
    if module is not None:
        modules: Any = MODULES[module]()
        members: list[MetaModule] = modules if isinstance(modules, list) else [modules]
        keywords = {"meta_module": [m.double() for m in members], "meta_dataset": rows(NUM_META, 2)}
    train_dataset = Stream() if stream else rows(48, 1)
    trainer = kind(model, args, train_dataset=train_dataset, **keywords)
    if not decoder and mean_over_batch:
        trainer.model_accepts_loss_kwargs = False
    return trainer


def report(trainer: Any) -> dict[str, Any]:
    """Loss, gradient norm and meta loss of every step, and the parameters at the end."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    meta_module = getattr(trainer, "meta_module", None)
    return {
        "loss": torch.tensor([log["loss"] for log in logs]).double(),
        "grad_norm": torch.tensor([log["grad_norm"] for log in logs]).double(),
        "meta_loss": torch.tensor([log.get("meta/loss", 0.0) for log in logs]).double(),
        "theta": snapshot(trainer.model),
        "lambda": {} if meta_module is None else snapshot(meta_module),
    }


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], rtol: float, atol: float) -> None:
    """Compare two reports; logs are rounded to single precision and, the loss, to few digits more."""
    for name in ("loss", "grad_norm", "meta_loss"):
        if name in expected and name in found:
            assert_close(
                found[name],
                expected[name],
                rtol=max(rtol, 1e-5 * bool(rtol)),
                atol=atol,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    for name in ("theta", "lambda"):
        assert found[name].keys() == expected[name].keys()
        for key, tensor in expected[name].items():
            assert_close(found[name][key], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name, k=key: f"{n}.{k}: {m}")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Largest change of a parameter."""
    return max(float((after[key] - before[key]).abs().max()) for key in before)
