"""What a model cannot take is refused where a batch is made, with words."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from meta_trainer.batch_checks import BatchChecks, CheckedCollator

SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
TOKENS = torch.arange(5, 17).view(2, 6)
CLASSES = torch.tensor([0, 2])


def checks(head: type[nn.Module] = BertForSequenceClassification, **config: object) -> BatchChecks:
    settings = {"num_labels": 3, **config}
    return BatchChecks(head(BertConfig(**SIZES, **settings)), hidden=("is_source",), reads_labels=True)


@pytest.mark.parametrize(
    "labels", [CLASSES, CLASSES[:, None], torch.tensor([-100, 1]), torch.rand(2, 3), torch.rand(2, 3).half()]
)
def test_labels_that_a_text_classifier_takes_are_let_through(labels):
    checks().check({"input_ids": TOKENS, "labels": labels, "is_source": torch.ones(2)})


@pytest.mark.parametrize("labels", [torch.rand(2), torch.rand(2, 1), torch.rand(2).double()])
def test_labels_of_a_regression_are_let_through(labels):
    checks(num_labels=1).check({"input_ids": TOKENS, "labels": labels})


def test_labels_of_a_token_classifier_are_let_through():
    checks(BertForTokenClassification).check({"input_ids": TOKENS, "labels": TOKENS % 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.tensor([0, 3])},
            r"`labels` should lie between 0 and 2, or be -100, got 3\. Set `num_labels`",
        ),
        ({"labels": torch.tensor([-1, 0])}, "between 0 and 2, or be -100, got -1"),
        ({"labels": torch.tensor([-100, -100])}, "at least one of its labels should count, got none or -100 only"),
        ({"labels": torch.tensor([0])}, r"should be int64 of shape \[2\], got torch.int64 of shape \[1\]"),
        ({"labels": CLASSES.int()}, r"should be int64 of shape \[2\], got torch.int32"),
        ({"labels": torch.rand(2)}, r"floats of single precision and shape \[2, 3\].*got torch.float32 of shape \[2\]"),
        ({"labels": torch.rand(2, 3).double()}, "floats of single precision .*got torch.float64"),
        ({"labels": torch.full((2, 3), float("nan"))}, "`labels` should be finite"),
        ({"labels": None}, r"should have a column `labels` to learn from, got the columns \['input_ids', 'labels'\]"),
        ({"labels": [0, 1]}, r"should have a column `labels` to learn from, got \[0, 1\]"),
        ({"input_ids": TOKENS + 40}, "`input_ids` should lie between 0 and 49, got 56"),
        ({"input_ids": -TOKENS}, "`input_ids` should lie between 0 and 49, got -16"),
        ({"input_ids": TOKENS.float()}, r"`input_ids` should be integers of shape \[B, T\], got torch.float32"),
        ({"input_ids": TOKENS[0]}, r"`input_ids` should be integers of shape \[B, T\], got torch.int64 of shape \[6\]"),
        ({"input_ids": TOKENS[:, :0]}, "`input_ids` should hold at least one token"),
        ({"input_ids": torch.ones(2, 17).long()}, "at most 16 tokens, got 17: truncate it"),
        ({"token_type_ids": TOKENS * 0 + 2}, "`token_type_ids` should lie between 0 and 1, got 2"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` should have the shape \[2, 6\]"),
    ],
)
def test_a_batch_that_a_text_classifier_cannot_take_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        checks().check({"input_ids": TOKENS, "labels": CLASSES, **change})


def test_a_batch_without_tokens_or_columns_is_refused():
    with pytest.raises(ValueError, match=r"should have a column `input_ids`, got the columns \['labels'\]"):
        checks().check({"labels": CLASSES})
    with pytest.raises(ValueError, match="it has no column that the model takes"):
        checks().check({"is_source": CLASSES})


def test_labels_change_from_classes_to_floats_in_no_later_batch():
    both = checks()
    both.check({"input_ids": TOKENS, "labels": CLASSES})
    with pytest.raises(ValueError, match=r"should be of one kind in all batches, got torch\.float32"):
        both.check({"input_ids": TOKENS, "labels": torch.rand(2, 3)})


def test_labels_of_a_users_own_objective_may_be_anything():
    model = BertForSequenceClassification(BertConfig(**SIZES))
    BatchChecks(model, (), reads_labels=False).check({"input_ids": TOKENS, "labels": torch.rand(2, 7)})


def test_positions_of_a_roberta_start_after_the_padding_index():
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES))
    assert BatchChecks(model, (), reads_labels=True).positions == 16 - 2


def test_positions_may_not_lie_outside_their_table():
    checks().check({"input_ids": TOKENS, "labels": CLASSES, "position_ids": torch.tensor([[0, 15]])})
    with pytest.raises(ValueError, match="`position_ids` should lie between 0 and 15, got 16"):
        checks().check({"input_ids": TOKENS, "labels": CLASSES, "position_ids": torch.tensor([[0, 16]])})


@pytest.mark.parametrize("number", [1, 3])
def test_a_model_of_double_precision_takes_such_labels(number):
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=number)).double()
    labels = torch.rand((2, number)[: min(number, 2)]).double()
    BatchChecks(model, (), reads_labels=True).check({"input_ids": TOKENS, "labels": labels})


def test_each_choice_is_a_row_of_tokens():
    model = BertForMultipleChoice(BertConfig(**SIZES))
    both = BatchChecks(model, (), reads_labels=True)
    both.check({"input_ids": TOKENS[:, None], "labels": CLASSES * 0})
    with pytest.raises(ValueError, match=r"should be integers of shape \[B, C, T\], got torch.int64 of shape \[2, 6\]"):
        both.check({"input_ids": TOKENS, "labels": CLASSES})


def test_a_table_of_embeddings_may_grow():
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    model.resize_token_embeddings(60)
    BatchChecks(model, (), reads_labels=True).check({"input_ids": TOKENS + 40, "labels": CLASSES})


def test_a_new_head_counts_where_only_the_models_attribute_says_so():
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2))
    model.classifier, model.num_labels = nn.Linear(8, 3), 3
    BatchChecks(model, (), reads_labels=True).check({"input_ids": TOKENS, "labels": CLASSES})


class NoEmbeddings(PreTrainedModel):
    config_class = BertConfig

    def forward(self, input_ids, labels=None):
        return input_ids


def test_a_model_of_the_users_own_may_read_anything_as_tokens():
    model = NoEmbeddings(BertConfig())
    BatchChecks(model, (), reads_labels=True).check({"input_ids": torch.rand(2, 4), "labels": torch.rand(2, 7)})


def test_a_class_of_the_users_own_may_have_a_known_name():
    own = type("BertForSequenceClassification", (BertForSequenceClassification,), {"__module__": "own"})
    model = own(BertConfig(**SIZES))
    BatchChecks(model, (), reads_labels=True).check({"input_ids": TOKENS, "labels": torch.rand(2, 7)})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (TOKENS + 40, "`labels` should lie between 0 and 49, or be -100, got 56"),
        (-TOKENS, "`labels` should lie between 0 and 49, or be -100, got -16"),
        (TOKENS[:, :4], r"`labels` should have the shape \[2, 6\] of the tokens, got torch.int64 of shape \[2, 4\]"),
        (TOKENS / 2, "`labels` should be tokens of type int64, got torch.float32"),
    ],
)
def test_labels_that_a_language_model_cannot_take_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        checks(BertForMaskedLM).check({"input_ids": TOKENS, "labels": labels})


def test_labels_that_a_language_model_takes_are_let_through():
    for labels in (TOKENS, torch.full_like(TOKENS, -100)):
        checks(BertForMaskedLM).check({"input_ids": TOKENS, "labels": labels})
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=50, decoder_attention_heads=2, **sizes))
    BatchChecks(model, (), reads_labels=True).check({"input_ids": TOKENS, "labels": TOKENS[:, :4]})


def test_labels_of_images_are_checked():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, num_labels=3))
    both = BatchChecks(model, (), reads_labels=True)
    both.check({"pixel_values": torch.rand(2, 3, 8, 8), "labels": CLASSES})
    with pytest.raises(ValueError, match="`labels` should lie between 0 and 2, or be -100, got 3"):
        both.check({"pixel_values": torch.rand(2, 3, 8, 8), "labels": CLASSES + 1})


class Strict(nn.Module):
    def forward(self, features, scale=1.0, labels=None):
        return features


def test_columns_of_any_model_are_those_of_its_forward_pass():
    strict = BatchChecks(Strict(), ("is_source",), reads_labels=True)
    strict.check({"features": 1, "labels": 2, "is_source": 3})
    with pytest.raises(ValueError, match=r"it should have the columns \['features'\], got \['labels'\]"):
        strict.check({"labels": 1})
    with pytest.raises(ValueError, match=r"Strict takes the columns .*, got also \['weight'\]"):
        strict.check({"features": 1, "weight": 2})


def test_columns_that_the_users_own_methods_may_take_out_are_let_through():
    BatchChecks(Strict(), (), reads_labels=False, reads_all=False).check({"weight": 1})


@pytest.mark.parametrize(
    "examples",
    [
        [{"input_ids": torch.ones(4)}, {"input_ids": torch.ones(5)}],
        [{"input_ids": [1]}, {"labels": 1}],
        [{"input_ids": None}] * 2,
    ],
)
def test_examples_that_make_no_batch_are_named_by_their_number_and_columns(examples):
    message = re.escape("2 examples, the first with columns ['input_ids'], cannot be put together to a meta batch: ")
    with pytest.raises(ValueError, match=message):
        CheckedCollator(default_collate, "meta", None)(examples)


def test_a_nested_batch_that_is_no_dictionary_is_refused_and_none_is_none():
    def collator(nested):
        return CheckedCollator(lambda examples: {"meta_batch": nested}, "train", None, "meta_batch", checks().check)

    collator(None)([1])
    with pytest.raises(ValueError, match="A meta batch should be a dictionary, got int"):
        collator(3)([1])


def test_a_collator_that_returns_no_dictionary_is_refused():
    with pytest.raises(ValueError, match="the data collator should return a dictionary, got list"):
        CheckedCollator(list, "train", None)([1, 2])


def test_the_meta_batch_inside_a_train_batch_is_checked_as_one():
    good = {"input_ids": TOKENS, "labels": CLASSES}
    collate = partial(dict, **good, meta_batch={**good, "labels": CLASSES + 1})
    collator = CheckedCollator(lambda examples: collate(), "train", None, "meta_batch", checks().check)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification cannot take a meta batch: .* got 3"):
        collator([1])


def test_tokens_and_their_embeddings_at_once_are_refused():
    with pytest.raises(ValueError, match="should have a column `input_ids` or `inputs_embeds`, got both"):
        checks().check({"input_ids": TOKENS, "inputs_embeds": torch.zeros(2, 6, 8), "labels": CLASSES})
    checks().check({"inputs_embeds": torch.zeros(2, 6, 8), "labels": CLASSES})
