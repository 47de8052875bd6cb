"""Language modeling as a task: blocks of one source each, the decoder, and its scores."""

import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    EvalPrediction,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.language_modeling import build_language_modeling_task
from meta_trainer.tasks.language_modeling.decoder import check_causal, make_decoder
from meta_trainer.tasks.language_modeling.metrics import language_scores, token_scores
from meta_trainer.tasks.language_modeling.packing import pack
from meta_trainer.tasks.tokenizer import train_byte_level_bpe


@pytest.fixture
def build(generated, tiny_model):
    def make(with_meta: bool = True, **changes: object):
        return build_language_modeling_task(generated(**changes), tiny_model, seed=0, with_meta=with_meta)

    return make


def test_every_block_has_one_source_and_one_length(build):
    task = build()
    assert task.domains == ("news", "other", "bad")
    assert set(task.train_dataset["domain"]) == {0, 1, 2}
    for dataset in (task.train_dataset, task.meta_dataset, task.test_dataset):
        assert {len(row) for row in dataset["input_ids"]} == {16}
        assert dataset["labels"] == dataset["input_ids"]
    decoded = {
        number: " ".join(
            task.processing_class.batch_decode([r["input_ids"] for r in task.train_dataset if r["domain"] == number])
        )
        for number in range(3)
    }
    assert "striker" in decoded[0]
    assert "molecule" not in decoded[0]
    assert "molecule" in decoded[1]
    assert "striker" not in decoded[2]


def test_blocks_are_the_texts_one_after_another():
    tokenizer = train_byte_level_bpe(["a b c d"], 300)
    blocks = pack(["a b", "c d a", "b"], tokenizer, 4, "letters")
    whole = [token for block in blocks for token in block]
    assert tokenizer.decode(whole) == " a b[SEP] c d a[SEP] b"
    with pytest.raises(ValueError, match="letters: 3 tokens do not fill a block of block_length=4"):
        pack(["a b"], tokenizer, 4, "letters")


def test_the_trusted_texts_are_trained_on_only_where_the_baseline_says_so(build):
    plain, both = build(with_meta=False), build(with_meta=False, train_on_meta=True)
    assert plain.meta_dataset is both.meta_dataset is None
    assert len(both.train_dataset) == len(plain.train_dataset) + len(build().meta_dataset)
    twice = build(with_meta=False, train_on_meta=True, meta_repeats=2)
    assert (
        twice.train_dataset.to_list()
        == both.train_dataset.to_list()
        + build().meta_dataset.add_column("domain", [None] * len(build().meta_dataset)).to_list()
    )
    assert (plain.baseline, both.baseline) == ("plain training", "plain training on both sets")
    alone, meta = build(with_meta=False, train_on_meta_alone=True), build().meta_dataset
    assert alone.train_dataset.to_list() == meta.to_list() * math.ceil(len(plain.train_dataset) / len(meta))
    assert alone.baseline == "plain training on the meta set"


@pytest.mark.parametrize("by", ["with_meta", "train_on_meta", "train_on_meta_alone"])
def test_trusted_texts_are_needed(build, by):
    with pytest.raises(ValueError, match="need trusted texts: give trusted_source"):
        build(**{"with_meta": False, "trusted_source": None, by: True})


def test_the_decoder_is_small_and_the_same_for_the_same_seed(build, tiny_model):
    first, second = build().model_init(), build().model_init()
    assert type(first).__name__ == "LlamaForCausalLM"
    assert first.config.hidden_size == tiny_model.hidden_size
    assert first.lm_head.weight is not first.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_pretrained_decoder_without_a_padding_token_is_loaded_from_a_folder(build, generated, tmp_path):
    task = build()
    model = task.model_init()
    model.save_pretrained(tmp_path)
    task.processing_class.pad_token = None
    task.processing_class.save_pretrained(tmp_path)
    loaded = build_language_modeling_task(
        generated(), ModelArguments(model_name_or_path=str(tmp_path)), seed=0, with_meta=True
    )
    assert torch.equal(loaded.model_init().lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="block_length=600 is more than the 512 tokens that the model can take"):
        build_language_modeling_task(
            generated(block_length=600), ModelArguments(model_name_or_path=str(tmp_path)), seed=0, with_meta=True
        )


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 500}
# Attention of a random model hardly matters, unlike that of a pretrained one, unless its weights are large.
ENCODER, DECODER = BertConfig(**BERT, initializer_range=0.3), BertConfig(**BERT, is_decoder=True)
GPT = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=500, bos_token_id=0, eos_token_id=0)


def saved(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> ModelArguments:
    """A random model in a folder, as one that was pretrained."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return ModelArguments(model_name_or_path=str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_encoder_is_no_language_model(build, generated, tmp_path, dtype):
    model = saved(ENCODER, tmp_path, dtype)
    build().processing_class.save_pretrained(tmp_path)
    task = build_language_modeling_task(generated(), model, seed=0, with_meta=True)
    with pytest.raises(
        ValueError, match=r"model_name_or_path='.*' should be .*, got BertLMHeadModel that reads .* name"
    ):
        task.model_init()


@pytest.mark.parametrize("config", [DECODER, GPT, LlamaConfig(**BERT)], ids=["BERT", "GPT-2", "Llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_decoder_is_one_and_the_check_leaves_no_trace(tmp_path, config, dtype):
    model = saved(config, tmp_path, dtype)
    state = torch.get_rng_state()
    decoder = make_decoder(model, AutoConfig.from_pretrained(tmp_path), seed=0)
    assert decoder.dtype == dtype
    for training in (True, False):
        check_causal(decoder.train(training), "it")
        assert {part.training for part in decoder.modules()} == {training}
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_decoder_is_checked_without_a_kernel_for_accelerators_and_keeps_it():
    decoder = AutoModelForCausalLM.from_config(LlamaConfig(**BERT), attn_implementation="flex_attention")
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS, flex_attention=None):
        check_causal(decoder, "it")
    assert decoder.config._attn_implementation == "flex_attention"


def test_a_decoder_that_is_nowhere_is_refused(generated, build, tmp_path):
    build().processing_class.save_pretrained(tmp_path)
    model = ModelArguments(model_name_or_path="./nowhere", tokenizer_name=str(tmp_path))
    with pytest.raises(ValueError, match=r"(model_name_or_path='./nowhere' is no model folder|No tokenizer can be)"):
        build_language_modeling_task(generated(), model, seed=0, with_meta=True)


def test_scores_are_those_of_all_tokens_but_the_first():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[1, 3:] = -100
    kept = token_scores((logits, "cache"), labels)
    found = language_scores(EvalPrediction(kept.numpy(), labels.numpy()))

    predicted, expected = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    counted = expected != -100
    loss = F.cross_entropy(predicted, expected, ignore_index=-100)
    assert kept.shape == (3, 4, 2)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(
        (predicted.argmax(-1) == expected)[counted].float().mean().item(), rel=1e-6
    )


def test_a_loss_without_bounds_is_a_perplexity_without_bounds():
    kept = np.full((1, 2, 2), 1000.0)
    assert language_scores(EvalPrediction(kept, np.ones((1, 3), dtype=int)))["perplexity"] == math.inf
