"""The weight of each training example once training is over: the pass over the data, and the score of a ranking."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from meta_trainer import DomainWeights, MetaModule, MetaTrainer, MetaTrainingArguments, MetaWeightNet
from meta_trainer.example_weights import ranking_auc, weigh_examples
from meta_trainer.per_example_loss import PerSentenceLoss

SIZES = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def texts(number: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (number, 6), generator=generator)
    return [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids)]


def sentences(number: int, seed: int) -> list[dict]:
    """Six tokens each; the first and some others have no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (number, 6), generator=generator)
    labels[:, 0] = -1
    labels[:, 1] = 1
    return [
        {"input_ids": row["input_ids"], "labels": torch.where(tags < 0, -100, tags)}
        for row, tags in zip(texts(number, seed), labels, strict=True)
    ]


def make_trainer(folder, kind=BertForSequenceClassification, module=None, data=texts, columns=(), **keywords):
    torch.manual_seed(0)
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 4}
    return MetaTrainer(
        kind(BertConfig(num_labels=3, **SIZES)),
        MetaTrainingArguments(str(folder), **settings, **keywords.pop("settings", {})),
        meta_module=MetaWeightNet(hidden_size=4) if module is None else module,
        train_dataset=data(10, 1),
        meta_dataset=data(4, 2),
        **keywords,
    )


def token_losses(trainer, rows):
    """The losses of a batch, ``[B, T]``, by the model in evaluation mode."""
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), reduction="none"), logits, batch["labels"]


def test_every_text_gets_the_loss_the_weight_and_the_class_of_the_model_in_evaluation_mode(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    found = weigh_examples(trainer, trainer.train_dataset)
    losses, logits, _ = token_losses(trainer, trainer.train_dataset)

    assert found.examples.tolist() == list(range(10))
    assert_close(torch.as_tensor(found.losses), losses)
    assert_close(torch.as_tensor(found.weights), trainer.meta_module(losses).detach())
    assert found.predictions.tolist() == logits.argmax(dim=-1).tolist()


def test_every_labelled_token_gets_its_own(tmp_path):
    trainer = make_trainer(tmp_path, BertForTokenClassification, data=sentences)
    found = weigh_examples(trainer, trainer.train_dataset)
    losses, logits, labels = token_losses(trainer, trainer.train_dataset)
    valid = labels != -100

    assert found.examples.tolist() == valid.nonzero()[:, 0].tolist()
    assert_close(torch.as_tensor(found.losses), losses[valid.flatten()])
    assert_close(torch.as_tensor(found.weights), trainer.meta_module(losses[valid.flatten()]).detach())
    assert found.predictions.tolist() == logits.argmax(dim=-1)[valid].tolist()


def test_tokens_of_a_sentence_share_its_weight_where_sentences_are_weighed_and_keep_their_losses(tmp_path):
    trainer = make_trainer(tmp_path, BertForTokenClassification, data=sentences)
    trainer.per_example_loss = PerSentenceLoss(trainer.model)
    found = weigh_examples(trainer, trainer.train_dataset)
    losses, _, labels = token_losses(trainer, trainer.train_dataset)
    valid = labels != -100
    means = torch.stack([row[kept].mean() for row, kept in zip(losses.view_as(labels), valid, strict=True)])
    expected = trainer.meta_module(means).detach()

    assert_close(torch.as_tensor(found.losses), losses[valid.flatten()])
    assert_close(torch.as_tensor(found.weights), expected[found.examples])
    sentence = found.per_example()
    assert_close(torch.as_tensor(sentence.losses).float(), means)
    assert_close(torch.as_tensor(sentence.weights).float(), expected)


class ColumnWeights(MetaModule):
    """One learned weight for each value of a column that the model does not know."""

    batch_columns = ("source",)

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

    def example_weights(self, losses, batch):
        return self.weights[batch["source"]]

    def reduce(self, losses, batch, outputs):
        return (self.example_weights(losses, batch) * losses).mean()


@pytest.mark.parametrize("per_sentence", [False, True])
def test_tokens_get_the_weight_of_the_source_of_their_sentence(tmp_path, per_sentence):
    def with_domain(number, seed):
        return [{**row, "domain": i % 3} for i, row in enumerate(sentences(number, seed))]

    module = DomainWeights(["a", "b", "c"])
    torch.nn.init.normal_(module.logits)
    trainer = make_trainer(tmp_path, BertForTokenClassification, module, with_domain, settings={"max_steps": 1})
    if per_sentence:
        trainer.per_example_loss = PerSentenceLoss(trainer.model)
    trainer.train()
    found = weigh_examples(trainer, trainer.train_dataset)
    assert_close(torch.as_tensor(found.weights), module.all_weights().detach()[found.examples % 3])


def test_a_module_may_weigh_by_columns_of_its_own(tmp_path):
    def with_source(number, seed):
        return [{**row, "source": i % 3} for i, row in enumerate(texts(number, seed))]

    trainer = make_trainer(tmp_path, module=[ColumnWeights()], data=with_source)
    found = weigh_examples(trainer, Dataset.from_list(trainer.train_dataset))
    assert found.weights.tolist() == [[1.0, 2.0, 4.0][i % 3] for i in range(10)]


@pytest.mark.parametrize(
    "settings", [{"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}], ids=str
)
def test_settings_of_other_loaders_neither_reorder_nor_drop_rows(tmp_path, settings):
    def uneven(number, seed):
        return [{**row, "input_ids": row["input_ids"][: 6 - i % 4]} for i, row in enumerate(texts(number, seed))]

    plain, other = (make_trainer(tmp_path, data=uneven, settings=s, data_collator=pad) for s in ({}, settings))
    expected = weigh_examples(plain, plain.train_dataset)
    found = weigh_examples(other, other.train_dataset)
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert len(found.losses) == 10


def pad(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = torch.stack([torch.arange(ids.shape[1]) < len(row["input_ids"]) for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([row["labels"] for row in rows])}


def test_weighing_leaves_no_trace(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    trainer.model.bert.eval()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in trainer.model.modules()]

    weigh_examples(trainer, trainer.train_dataset)

    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(p.grad is None for p in (*trainer.model.parameters(), *trainer.meta_module.parameters()))


class SilentModule(MetaWeightNet):
    """Says that it weighs examples, and gives no weights."""

    def example_weights(self, losses, batch):
        return None

    def reduce(self, losses, batch, outputs):
        return self(losses) @ losses


class Shift(MetaModule):
    """Weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))


def test_a_module_without_weights_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, module=Shift())
    with pytest.raises(ValueError, match=r"meta module with `example_weights`, such as MetaWeightNet, got Shift"):
        weigh_examples(trainer, trainer.train_dataset)
    trainer = make_trainer(tmp_path, module=SilentModule())
    with pytest.raises(ValueError, match=r"SilentModule\.example_weights should return weights \[N\], got None"):
        weigh_examples(trainer, trainer.train_dataset)


def test_losses_of_no_known_number_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, per_example_loss=lambda outputs, labels: outputs["logits"].flatten())
    with pytest.raises(ValueError, match="one loss for each of 4 labels, or for each of 4 examples, got 12"):
        weigh_examples(trainer, trainer.train_dataset)


def uneven_sentences(number, seed):
    return [{key: row[key][: 3 + i // 4] for key in row} for i, row in enumerate(sentences(number, seed))]


def pad_tokens(rows):
    def padded(key, value):
        return nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_find_what_one_finds_in_the_same_order(tmp_path):
    # Ten rows are three batches of four, and rows are longer in one process's batches than in the other's.
    trainer = make_trainer(tmp_path, BertForTokenClassification, data=uneven_sentences, data_collator=pad_tokens)
    expected = weigh_examples(trainer, trainer.train_dataset)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        with np.load(tmp_path / f"rank-{rank}.npz") as found:
            np.testing.assert_array_equal(found["examples"], expected.examples)
            np.testing.assert_array_equal(found["predictions"], expected.predictions)
            np.testing.assert_allclose(found["losses"], expected.losses, rtol=1e-5)
            np.testing.assert_allclose(found["weights"], expected.weights, rtol=1e-5)


def main(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, BertForTokenClassification, data=uneven_sentences, data_collator=pad_tokens)
    found = weigh_examples(trainer, trainer.train_dataset)
    np.savez(folder / f"rank-{os.environ['RANK']}.npz", **vars(found))
    torch.distributed.barrier()
    # The process group may hang at the interpreter's exit.
    os._exit(0)


@pytest.mark.parametrize("values", [2, 5, 1000])
def test_the_score_of_a_ranking_is_the_share_of_pairs_in_the_right_order(values):
    generator = np.random.default_rng(values)
    scores, positive = generator.integers(0, values, 60).astype(float), generator.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert ranking_auc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_the_score_of_a_ranking_needs_both_kinds():
    assert np.isnan(ranking_auc(np.arange(3.0), np.zeros(3, dtype=bool)))
    assert np.isnan(ranking_auc(np.arange(3.0), np.ones(3, dtype=bool)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
