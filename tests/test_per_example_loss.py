"""Losses before the average, against the losses that Hugging Face models compute themselves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_pt_utils import LabelSmoother

from meta_trainer.per_example_loss import PerExampleLoss, PerSentenceLoss, check_agreement, per_example_losses

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 13,
}
IDS = torch.randint(13, (5, 6), generator=torch.Generator().manual_seed(0))


def sequence_classifier(num_labels, problem_type):
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=num_labels, problem_type=problem_type)).eval()


def token_classifier():
    return BertForTokenClassification(BertConfig(**SMALL, num_labels=3)).eval()


def partly_ignored(labels):
    labels[0, 2:] = -100
    labels[3, :4] = -100
    return labels


CASES = {
    "single_label": lambda: (
        sequence_classifier(4, "single_label_classification"),
        torch.tensor([0, 3, 1, 2, 2]),
        5,
    ),
    "multi_label": lambda: (
        sequence_classifier(4, "multi_label_classification"),
        torch.randint(2, (5, 4)).float(),
        5,
    ),
    "regression": lambda: (sequence_classifier(1, "regression"), torch.randn(5), 5),
    "regression_in_columns": lambda: (sequence_classifier(1, "regression"), torch.randn(5, 1), 5),
    "token_classification": lambda: (token_classifier(), partly_ignored(torch.randint(3, (5, 6))), 5 * 6 - 8),
    "gpt2": lambda: (
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=13)).eval(),
        partly_ignored(IDS.clone()),
        5 * 5 - 4 - 3,
    ),
    "llama": lambda: (
        LlamaForCausalLM(LlamaConfig(**SMALL)).eval(),
        partly_ignored(IDS.clone()),
        5 * 5 - 4 - 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_the_models_own_loss(name):
    model, labels, count = CASES[name]()
    outputs = model(IDS, labels=labels)

    losses = PerExampleLoss(model)(outputs, labels)

    assert losses.shape == (count,)
    assert_close(losses.mean(), outputs.loss, rtol=1e-6, atol=1e-6)
    check_agreement(losses, outputs.loss)


@pytest.mark.parametrize("name", ["single_label", "token_classification", "gpt2"])
def test_a_tuple_of_outputs_gives_the_same_losses(name):
    model, labels, _ = CASES[name]()
    as_tuple = model(IDS, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(
        PerExampleLoss(model)(as_tuple, labels), PerExampleLoss(model)(model(IDS, labels=labels), labels)
    )


def test_a_plain_dictionary_of_outputs_will_do():
    model, labels, _ = CASES["single_label"]()
    outputs = model(IDS, labels=labels)
    found = PerExampleLoss(model)({"loss": outputs.loss, "logits": outputs.logits}, labels)
    assert torch.equal(found, PerExampleLoss(model)(outputs, labels))


def test_images_are_classified_like_sequences():
    config = ViTConfig(image_size=4, patch_size=2, num_labels=3, **{**SMALL, "vocab_size": None})
    model, labels = ViTForImageClassification(config).eval(), torch.tensor([0, 2, 1])
    outputs = model(torch.randn(3, 3, 4, 4), labels=labels)
    assert_close(PerExampleLoss(model)(outputs, labels).mean(), outputs.loss)


@pytest.mark.parametrize("name", ["single_label", "regression", "multi_label"])
def test_each_loss_belongs_to_its_example(name):
    model, labels, _ = CASES[name]()
    losses = PerExampleLoss(model)(model(IDS, labels=labels), labels)

    for position in range(len(labels)):
        alone = slice(position, position + 1)
        assert_close(losses[position], model(IDS[alone], labels=labels[alone]).loss, rtol=1e-4, atol=1e-5)


def test_token_losses_run_through_the_batch_row_by_row():
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[1, -100, 2], [-100, 0, 3]])
    expected = [-logits.log_softmax(-1)[b, t, labels[b, t]] for b, t in [(0, 0), (0, 2), (1, 1), (1, 2)]]
    assert_close(per_example_losses(logits, labels), torch.stack(expected))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("name", ["single_label", "token_classification", "gpt2"])
def test_label_smoothing_is_that_of_transformers(name, epsilon):
    model, labels, _ = CASES[name]()
    outputs = model(IDS, labels=labels)
    expected = LabelSmoother(epsilon=epsilon)(outputs, labels, shift_labels=name == "gpt2")

    assert_close(PerExampleLoss(model, label_smoothing=epsilon)(outputs, labels).mean(), expected)


def test_half_precision_logits_are_averaged_in_float32():
    model, labels, _ = CASES["single_label"]()
    losses = PerExampleLoss(model.bfloat16())(model(IDS, labels=labels), labels)
    assert losses.dtype == torch.float32


def test_gradients_flow_through_the_losses():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, -100])
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    (found,) = torch.autograd.grad(per_example_losses(logits, labels).mean(), logits)
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)),
        (torch.zeros(4, 6, 3), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long)),
        (torch.zeros(4, 2), torch.zeros(4, 3)),
    ],
)
def test_shapes_that_fit_no_head_are_refused(logits, labels):
    with pytest.raises(
        ValueError, match=r"No per-example loss is known for logits of shape \[4.*Pass `per_example_loss`"
    ):
        per_example_losses(logits, labels)


def test_a_model_with_another_objective_is_refused():
    class WithPenalty(nn.Module):
        def forward(self, logits, labels):
            return {"loss": F.cross_entropy(logits, labels) + 0.5, "logits": logits}

    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    outputs = WithPenalty()(logits, labels)
    losses = per_example_losses(logits, labels)

    with pytest.raises(
        ValueError,
        match=rf"average to {losses.mean():.4f}, but the model's own loss is {losses.mean() + 0.5:.4f}",
    ):
        check_agreement(losses, outputs["loss"])


def test_rounding_of_half_precision_is_no_disagreement():
    losses = torch.rand(100) + 1
    check_agreement(losses, losses.mean().bfloat16())


def test_the_loss_of_a_sentence_is_the_mean_of_those_of_its_labelled_tokens():
    model, labels = token_classifier().double(), partly_ignored(torch.randint(3, (5, 6)))
    labels[2] = -100
    outputs = model(input_ids=IDS)
    expected = [F.cross_entropy(logits, row) for logits, row in zip(outputs.logits, labels, strict=True)]

    losses = PerSentenceLoss(model)(outputs, labels)
    assert_close(losses, torch.stack([loss for i, loss in enumerate(expected) if i != 2]))
    assert PerSentenceLoss(model).examples(labels).tolist() == [0, 1, 3, 4]
    grads = torch.autograd.grad(losses.sum(), model.classifier.weight, retain_graph=True)
    kept = sum(loss for i, loss in enumerate(expected) if i != 2)
    assert_close(grads, torch.autograd.grad(kept, model.classifier.weight))


def test_the_loss_of_a_document_leaves_out_its_first_token():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=13)).eval()
    outputs = model(input_ids=IDS)
    expected = [model(input_ids=row[None], labels=row[None]).loss for row in IDS]
    assert_close(PerSentenceLoss(model)(outputs, IDS), torch.stack(expected))


def test_a_classifier_of_whole_texts_has_a_loss_for_each_already():
    model, labels, _ = CASES["single_label"]()
    outputs = model(input_ids=IDS)
    assert torch.equal(PerSentenceLoss(model)(outputs, labels), PerExampleLoss(model)(outputs, labels))
    assert PerSentenceLoss(model).examples(labels).tolist() == list(range(len(labels)))


def test_each_loss_has_the_class_that_it_was_computed_for():
    labels = torch.tensor([[2, -100, 0], [-100, 1, 1]])
    losses = PerExampleLoss(nn.Identity())
    assert losses.classes(labels).tolist() == [2, 0, 1, 1]
    assert losses.examples(labels).tolist() == [0, 0, 1, 1]
    assert losses.classes(torch.tensor([3, 1])).tolist() == [3, 1]
    losses.shifts_labels = True
    assert losses.classes(labels).tolist() == [0, 1, 1]
    assert losses.examples(labels).tolist() == [0, 1, 1]
