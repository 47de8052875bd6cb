"""Which parameters a meta step perturbs."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from meta_trainer.scope import select_parameters

SMALL = {
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "vocab_size": 7,
    "pad_token_id": 0,
}

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
uses_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def bert():
    return BertForTokenClassification(BertConfig(**SMALL))


def bert_classifier():
    return BertForSequenceClassification(BertConfig(**SMALL))


def llama_classifier():
    return LlamaForSequenceClassification(LlamaConfig(**SMALL))


def names_of(model, parameters):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def test_all_is_every_trainable_parameter_in_order(bert):
    assert names_of(bert, select_parameters(bert, "all")) == [name for name, _ in bert.named_parameters()]
    assert names_of(bert, select_parameters(bert, ["all"])) == [name for name, _ in bert.named_parameters()]


def test_frozen_parameters_are_left_out(bert):
    bert.bert.embeddings.requires_grad_(False)
    expected = [name for name, _ in bert.named_parameters() if "embeddings" not in name]

    assert names_of(bert, select_parameters(bert, "all")) == expected
    with pytest.raises(ValueError, match=r"'bert.embeddings', which matches no trainable parameter"):
        select_parameters(bert, "bert.embeddings")


def test_head_is_all_that_lies_outside_the_base_model(bert):
    assert names_of(bert, select_parameters(bert, "head")) == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("classifier.bias", ["classifier.bias"]),
        ("classifier", ["classifier.weight", "classifier.bias"]),
        ("classifier.*", ["classifier.weight", "classifier.bias"]),
        ("*.LayerNorm.bias", None),
        (["classifier.bias", "bert.encoder.layer.1"], None),
    ],
)
def test_patterns_name_parameters_or_modules(bert, patterns, expected):
    by_hand = {
        "*.LayerNorm.bias": lambda name: name.endswith(".LayerNorm.bias"),
        "['classifier.bias', 'bert.encoder.layer.1']": lambda name: (
            name == "classifier.bias" or name.startswith("bert.encoder.layer.1.")
        ),
    }
    if expected is None:
        expected = [name for name, _ in bert.named_parameters() if by_hand[str(patterns)](name)]
        assert len(expected) > 1

    assert names_of(bert, select_parameters(bert, patterns)) == expected


def test_patterns_that_overlap_select_a_parameter_once(bert):
    assert len(select_parameters(bert, ["classifier", "classifier.bias", "*bias"])) == len(
        select_parameters(bert, ["classifier", "*bias"])
    )


def test_a_module_name_is_no_prefix_of_another():
    model = nn.ModuleDict({"head": nn.Linear(1, 1), "head2": nn.Linear(1, 1)})
    assert names_of(model, select_parameters(model, "head2")) == ["head2.weight", "head2.bias"]
    with pytest.raises(ValueError, match="'hea', which matches no trainable parameter"):
        select_parameters(model, "hea")


def test_capital_letters_count(bert):
    with pytest.raises(ValueError, match="'Classifier'"):
        select_parameters(bert, "Classifier")


def test_a_tied_parameter_is_selected_once_under_its_first_name():
    model = BertForMaskedLM(BertConfig(**SMALL))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    selected = select_parameters(model, "all")

    assert len({id(parameter) for parameter in selected}) == len(selected)
    assert "bert.embeddings.word_embeddings.weight" in names_of(model, selected)
    head = names_of(model, select_parameters(model, "head"))
    assert head
    assert all(name.startswith("cls.") for name in head)
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder.weight', which matches no trainable parameter"):
        select_parameters(model, "cls.predictions.decoder.weight")


@pytest.mark.parametrize("pattern", ["clasifier", "classifier.wieght"])
def test_a_pattern_without_a_match_is_refused_with_its_neighbours(bert, pattern):
    with pytest.raises(ValueError, match=rf"{pattern!r}, which matches no trainable parameter.*classifier\.weight"):
        select_parameters(bert, ["classifier", pattern])


def test_a_plain_module_can_be_perturbed_by_patterns():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

    assert names_of(model, select_parameters(model, "1")) == ["1.weight", "1.bias"]
    assert len(select_parameters(model, "all")) == 4


def test_a_plain_module_has_no_head():
    with pytest.raises(ValueError, match="needs a Hugging Face model with a head on a base model, got Sequential"):
        select_parameters(nn.Sequential(nn.Linear(2, 3)), "head")


def test_a_base_model_has_no_head():
    with pytest.raises(ValueError, match="perturb='head'"):
        select_parameters(BertModel(BertConfig(**SMALL)), "head")


def test_a_head_that_is_frozen_is_refused(bert):
    bert.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter outside its base model `bert`"):
        select_parameters(bert, "head")


@uses_peft
@pytest.mark.parametrize(("make", "adapted"), [(bert_classifier, "query"), (llama_classifier, "q_proj")])
@pytest.mark.parametrize(("task_type", "trained"), [("SEQ_CLS", ("lora_", "modules_to_save")), (None, ("lora_",))])
def test_all_of_an_adapted_model_is_its_adapters_and_the_head_saved_beside_them(make, adapted, task_type, trained):
    # PEFT trains and saves the head where it knows the task.
    model = get_peft_model(make(), LoraConfig(task_type=task_type, r=2, target_modules=[adapted]))
    expected = [name for name, _ in model.named_parameters() if any(word in name for word in trained)]

    assert all(any(word in name for name in expected) for word in trained)
    assert names_of(model, select_parameters(model, "all")) == expected


@uses_peft
@pytest.mark.parametrize(
    ("make", "adapted", "expected"),
    [
        (bert_classifier, "query", ["classifier.modules_to_save.default." + name for name in ("weight", "bias")]),
        (llama_classifier, "q_proj", ["score.modules_to_save.default.weight"]),
    ],
)
def test_the_head_of_an_adapted_model_has_no_adapters_of_the_body(make, adapted, expected):
    model = get_peft_model(make(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=[adapted]))
    assert names_of(model.get_base_model(), select_parameters(model, "head")) == expected


@uses_peft
def test_adapters_of_the_head_are_the_head():
    model = get_peft_model(llama_classifier(), LoraConfig(r=2, target_modules=["q_proj", "score"]))
    found = names_of(model.get_base_model(), select_parameters(model, "head"))
    assert found == ["score.lora_A.default.weight", "score.lora_B.default.weight"]


@uses_peft
def test_learned_prompts_are_not_the_head():
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(bert_classifier(), config)
    prompt = model.prompt_encoder.default.embedding.weight

    assert any(parameter is prompt for parameter in select_parameters(model, "all"))
    found = names_of(model.get_base_model(), select_parameters(model, "head"))
    assert found == ["classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"]


@uses_peft
def test_an_adapted_model_whose_head_is_frozen_is_refused():
    model = get_peft_model(llama_classifier(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Classification has no trainable parameter outside its base model `model`"):
        select_parameters(model, "head")


@uses_peft
def test_an_adapted_base_model_has_no_head():
    model = get_peft_model(LlamaModel(LlamaConfig(**SMALL)), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="with a head on a base model, got LlamaModel"):
        select_parameters(model, "head")


def test_a_model_without_trainable_parameters_is_refused(bert):
    with pytest.raises(ValueError, match="no trainable parameter, so there is nothing"):
        select_parameters(bert.requires_grad_(False), "all")


def test_selection_returns_the_parameters_themselves(bert):
    assert select_parameters(bert, "classifier")[0] is bert.classifier.weight
    assert isinstance(select_parameters(bert, "classifier")[0], torch.nn.Parameter)
