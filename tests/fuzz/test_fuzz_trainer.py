"""Rows given to a MetaTrainer, whatever they hold: two steps of training, or one error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import REFUSED, attempt, cases
from tiny import HiddenShift, MeanLoss, PointClassifier, arguments, points, sentences, tiny_bert, weight_net
from transformers import BertConfig, BertForTokenClassification

from meta_trainer import MetaTrainer

odd_rows = st.sampled_from([None, 3, "row", [], {}, {"labels": 1}, {"text": "a"}, {"input_ids": None, "labels": 0}])
odd_labels = st.sampled_from(
    [None, -100, -1, 2, 7, 10**12, 10**30, 0.5, 1.0, float("nan"), float("inf"), True, "1", "", [0], [0, 1], [0.5, 0.5],
     [[1.0, 0.0]], [], {}, np.int32(1), np.float64(0.5), np.array([1]), torch.tensor(1, dtype=torch.int32),
     torch.tensor(1.0), torch.tensor([1.0, 0.0]), torch.tensor([0, 1])]
)  # fmt: skip
odd_tokens = st.sampled_from(
    [None, [], [50] * 6, [-1] * 6, [5] * 4, [5] * 17, [5] * 7, [0.5] * 6, ["a"] * 6, "text", 5, [[5] * 6], [None] * 6,
     [2**40] * 6, [10**30] * 6, [True] * 6, np.full(6, 5, dtype=np.int32), torch.full((6,), 5.0), torch.full((6,), 49)]
)  # fmt: skip
odd_columns = st.sampled_from(
    [{"attention_mask": [1] * 5}, {"attention_mask": [1] * 6}, {"attention_mask": "x"}, {"token_type_ids": [2] * 6},
     {"token_type_ids": [1] * 6}, {"extra": 1}, {"label": 1}, {"features": [0.0] * 4}, {"position_ids": [0] * 6},
     {"meta_batch": 1}, {"inputs_embeds": [[0.0] * 8] * 6}, {"return_dict": False}]
)  # fmt: skip
change = st.one_of(
    st.tuples(st.just("row"), odd_rows),
    st.tuples(st.just("labels"), odd_labels),
    st.tuples(st.just("input_ids"), odd_tokens),
    st.tuples(st.just("columns"), odd_columns),
    st.tuples(st.just("drop"), st.sampled_from(["labels", "input_ids"])),
)
# One change in all rows, or in one of them.
changes = st.lists(st.tuples(change, st.booleans(), st.integers(0, 7)), max_size=2)
sizes = st.sampled_from([0, 1, 2, 5, 8])


def changed(rows: list[Any], changes: list[tuple[tuple[str, Any], bool, int]]) -> list[Any]:
    rows = [dict(row) for row in rows]
    for (kind, value), everywhere, number in changes:
        for i in range(len(rows)) if everywhere else [number % len(rows)] if rows else []:
            if not isinstance(rows[i], dict):
                continue
            if kind == "row":
                rows[i] = dict(value) if isinstance(value, dict) else value
            elif kind == "columns":
                rows[i].update(value)
            elif kind == "drop":
                rows[i].pop(value, None)
            else:
                rows[i][kind] = value
    return rows


def train(
    folder: Path, model: torch.nn.Module, module: Any, train_rows: list[Any], meta_rows: list[Any], **settings: Any
) -> Any:
    def run() -> MetaTrainer:
        args = arguments(folder, max_steps=2, logging_steps=1, **settings)
        trainer = MetaTrainer(model, args, meta_module=module, train_dataset=train_rows, meta_dataset=meta_rows)
        trainer.train()
        return trainer

    return attempt(run)


def check_sound(trainer: Any) -> None:
    """What was not refused was trained on: two steps, finite losses, finite parameters on both levels."""
    assert trainer.state.global_step == 2
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(np.isfinite(log["loss"]) for log in logs)
    for parameter in (*trainer.model.parameters(), *trainer.meta_module.parameters()):
        assert parameter.isfinite().all()


modules = st.sampled_from([weight_net, HiddenShift, MeanLoss])
estimators = st.sampled_from(["evograd", "finite_difference", "t1t2"])


text_cases = st.fixed_dictionaries(
    {
        "sizes": st.tuples(sizes, sizes),
        "changes": st.tuples(changes, changes),
        "module": modules,
        "hypergradient": estimators,
        "meta_batch": st.sampled_from([1, 3, 20]),
        "keep": st.booleans(),
    }
)


def train_text_classifier(folder: Path, case: dict[str, Any]) -> None:
    rows = [
        changed(sentences(size, seed), change)
        for size, seed, change in zip(case["sizes"], (1, 2), case["changes"], strict=True)
    ]
    trainer = train(
        folder,
        tiny_bert(),
        case["module"](),
        *rows,
        hypergradient=case["hypergradient"],
        per_device_meta_batch_size=case["meta_batch"],
        remove_unused_columns=not case["keep"],
    )
    if trainer is not REFUSED:
        check_sound(trainer)


@cases(24)
@given(case=text_cases)
def test_a_text_classifier_trains_or_refuses(folder, case):
    train_text_classifier(folder, case)


@pytest.mark.slow
@cases(400)
@given(case=text_cases)
def test_a_text_classifier_trains_or_refuses_in_many_more_cases(folder, case):
    train_text_classifier(folder, case)


def tiny_tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3,
    ))  # fmt: skip


odd_tags = st.sampled_from(
    [[-100] * 6, [0] * 5, [3] * 6, [-1] * 6, [0.5] * 6, 1, None, [[0] * 6], [], ["O"] * 6, [0, 1, 2, -100, -100, 3]]
)


tag_cases = st.fixed_dictionaries(
    {
        "tags": st.tuples(st.lists(odd_tags, max_size=3), st.lists(odd_tags, max_size=3)),
        "everywhere": st.booleans(),
        "module": modules,
    }
)


def train_token_classifier(folder: Path, case: dict[str, Any]) -> None:
    rows = []
    for seed, tags in enumerate(case["tags"]):
        part = [{**row, "labels": [0, 1, 2, -100, 1, 0]} for row in sentences(6, seed)]
        for i in range(6 if case["everywhere"] and tags else len(tags)):
            part[i]["labels"] = tags[i % len(tags)]
        rows.append(part)
    trainer = train(folder, tiny_tagger(), case["module"](), *rows)
    if trainer is not REFUSED:
        check_sound(trainer)


@cases(12)
@given(case=tag_cases)
def test_a_token_classifier_trains_or_refuses(folder, case):
    train_token_classifier(folder, case)


@pytest.mark.slow
@cases(100)
@given(case=tag_cases)
def test_a_token_classifier_trains_or_refuses_in_many_more_cases(folder, case):
    train_token_classifier(folder, case)


# Shapes and ranges that it takes are known to the model alone.
odd_features = st.sampled_from(
    [{"features": None}, {"features": "x"}, {"features": object}, {"labels": None}, {"labels": {}}, {"extra": 1}, {}]
)


@cases(10)
@given(train_change=odd_features, meta_change=odd_features, everywhere=st.booleans(), keep=st.booleans())
def test_a_model_of_ones_own_trains_or_refuses_the_columns(folder, train_change, meta_change, everywhere, keep):
    rows = [points(6, seed) for seed in (1, 2)]
    for part, change in zip(rows, (train_change, meta_change), strict=True):
        for row in part if everywhere else part[:1]:
            row.update(change)
    trainer = train(folder, PointClassifier(), weight_net(), *rows, remove_unused_columns=not keep)
    if trainer is not REFUSED:
        check_sound(trainer)
