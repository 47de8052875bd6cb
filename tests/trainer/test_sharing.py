"""Narrow scopes share forward passes: the same training, for the architectures and settings that people use."""

import gc
import logging
import random
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from separate_passes import Witness, assert_same_steps, counted_lookups, separate_passes, training_steps
from tiny import (
    PointClassifier,
    batch_of,
    losses_only,
    meta_trainer,
    points,
    same,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)
from torch import nn
from torch.nn import functional as F

from meta_trainer import MetaModule, MetaTrainingArguments, RepresentationTransform

WIDTH = 16
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
TEXT = {**SHAPE, **WORDS, "max_position_embeddings": 16}
SEQ2SEQ = {**WORDS, "decoder_start_token_id": 0, "num_labels": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-8}


def bart():
    layers = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return hf.BartForSequenceClassification(
        hf.BartConfig(d_model=WIDTH, max_position_embeddings=16, **SEQ2SEQ, **layers, **heads)
    )


def deberta():
    relative = {"relative_attention": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    attention = {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "type_vocab_size": 0}
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**TEXT, **relative, **attention))


ARCHITECTURES = {
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=8)),
    "bart": bart,
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
    "bert with all hidden states": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**TEXT, output_hidden_states=True)
    ),
    "deberta-v2": deberta,
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=50, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16)
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, embedding_size=8)),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, **WORDS)
    ),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "mixtral": lambda: hf.MixtralForSequenceClassification(
        hf.MixtralConfig(
            **TEXT,
            num_key_value_heads=1,
            num_local_experts=2,
            output_router_logits=True,
            experts_implementation="eager",
        )
    ),
    "qwen2": lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**TEXT, num_key_value_heads=1)),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, WIDTH], depths=[1, 1], layer_type="basic")
    ),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
    "t5": lambda: hf.T5ForSequenceClassification(
        hf.T5Config(d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **SEQ2SEQ)
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SHAPE, image_size=8, patch_size=4)),
    "xlm-r": lambda: hf.XLMRobertaForTokenClassification(hf.XLMRobertaConfig(**TEXT)),
}
MODULES = {
    "weights": lambda: weight_net(),
    "last block": lambda: RepresentationTransform(WIDTH, 8),
    "first block": lambda: RepresentationTransform(WIDTH, 8, layers=[1]),
}


def examples(name, generator):
    labels = torch.randint(2, (4,), generator=generator)
    if name in ("vit", "resnet"):
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64), "labels": labels}
    ids = torch.randint(5, 50, (4, 6), generator=generator)
    ids[:, 5] = ids[0, 3] = 1
    ids[0, 4:] = 0
    labels = torch.randint(2, (4, 6), generator=generator) if name == "xlm-r" else labels
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def batches(name, number=2):
    generator = torch.Generator().manual_seed(5)
    is_source = torch.tensor([True, False, True, True])
    return [
        {**examples(name, generator), "is_source": is_source, "meta_batch": examples(name, generator)}
        for _ in range(number)
    ]


def new_trainer(folder, name, module="weights", **settings):
    torch.manual_seed(0)
    # In double precision an error stands out from rounding.
    model, meta_module = ARCHITECTURES[name]().double(), MODULES[module]().double()
    model.config.use_cache = False
    meta_module.batch_columns = ("is_source",)
    defaults = {"perturb": "head", "sigma": 0.1, "learning_rate": 0.1}
    args = MetaTrainingArguments(str(folder), use_cpu=True, **{**defaults, **settings})
    return Witness(model, args, meta_module=meta_module)


def steps_and_lookups(trainer, name):
    """The last step also counts how often the lowest layers run."""
    given = batches(name)
    found = training_steps(trainer, given[:1])
    with counted_lookups() as count:
        found += training_steps(trainer, given[1:])
    return found, count[0]


CASES = [
    (name, module, hypergradient)
    for name in ARCHITECTURES
    for module, hypergradient in [*((m, "evograd") for m in MODULES), ("last block", "finite_difference")]
    # A representation transform takes hidden states [B, T, H].
    if name != "resnet" or module == "weights"
]


@pytest.mark.parametrize(("name", "module", "hypergradient"), CASES)
def test_an_architecture_trains_as_with_separate_passes(tmp_path, name, module, hypergradient):
    settings = {"hypergradient": hypergradient}
    with separate_passes():
        expected, separate = steps_and_lookups(new_trainer(tmp_path, name, module, **settings), name)
    found, shared = steps_and_lookups(new_trainer(tmp_path, name, module, **settings), name)

    # A difference over a short way amplifies rounding.
    assert_same_steps(found, expected, **(CLOSE if hypergradient == "evograd" else {"rtol": 1e-2, "atol": 1e-6}))
    # Two candidates, the base step and the meta batch; once for the train batch and once for the meta batch.
    assert (separate, shared) == (2 * shared, shared)


PATTERNS = {
    "bert": ["classifier", "bert.encoder.layer.1.output"],
    "deberta-v2": ["classifier", "deberta.encoder.layer.1"],
    "gpt2": ["score", "transformer.h.1"],
    "llama": ["score", "model.layers.1.mlp"],
    "bart": ["classification_head", "model.decoder.layers"],
}


@pytest.mark.parametrize("loss_input", ["shared", "unperturbed", "candidate"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_scope_of_patterns_trains_as_with_separate_passes(tmp_path, monkeypatch, name, loss_input):
    monkeypatch.setitem(MODULES, "weights", lambda: weight_net(loss_input=loss_input))
    with separate_passes():
        expected, separate = steps_and_lookups(new_trainer(tmp_path, name, perturb=PATTERNS[name]), name)
    found, shared = steps_and_lookups(new_trainer(tmp_path, name, perturb=PATTERNS[name]), name)
    assert_same_steps(found, expected, **CLOSE)
    assert shared < separate


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("module", ["weights", "last block"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("perturb", ["head", "patterns"])
def test_checkpointed_activations_give_the_same_gradients(tmp_path, name, module, perturb, use_reentrant):
    def run():
        scope = PATTERNS[name] if perturb == "patterns" else perturb
        trainer = new_trainer(tmp_path, name, module, perturb=scope)
        trainer.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        assert trainer.model.is_activation_checkpointing
        return steps_and_lookups(trainer, name)

    with separate_passes():
        expected, separate = run()
    found, shared = run()
    assert_same_steps(found, expected, **CLOSE)
    assert shared == separate / 2


def trained(folder, meta_module=None, model=None, **settings):
    """All that a training run leaves behind."""
    settings = {"perturb": "head", "meta_learning_rate": 0.01, "max_steps": 3, **settings}
    trainer = meta_trainer(folder, meta_module, model, kind=Witness, **settings)
    trainer.train()
    return {
        "model": snapshot(trainer.model),
        "meta module": snapshot(trainer.meta_module),
        "log": losses_only(trainer.state.log_history),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "meta_every": 2},
        {"bf16": True},
        {"neftune_noise_alpha": 5.0},
        {"activation_checkpointing": True},
        {"num_candidates": 3, "noise": "normal", "label_smoothing_factor": 0.1},
        {"hypergradient": "finite_difference"},
    ],
    ids=lambda settings: ", ".join(settings) or "defaults",
)
def test_a_training_run_is_that_of_separate_passes(tmp_path, settings):
    with separate_passes():
        expected = trained(tmp_path, **settings)
    found = trained(tmp_path, **settings)
    assert same(found, expected)


def adapted(**settings):
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False, **settings)
    return get_peft_model(tiny_bert(), config)


@pytest.mark.parametrize(
    ("perturb", "checkpointed"), [("all", False), ("all", True), (["*classifier*"], False), (["*lora_B*"], True)]
)
# PEFT 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_trains_as_with_separate_passes(tmp_path, perturb, checkpointed):
    settings = {"perturb": perturb, "activation_checkpointing": checkpointed, "learning_rate": 0.1}
    with separate_passes():
        expected = trained(tmp_path, model=adapted(), **settings)
    assert same(trained(tmp_path, model=adapted(), **settings), expected)


class Drawing:
    """A data collator that draws from the global random state, as one that masks tokens does."""

    def __call__(self, given):
        batch = batch_of(given, len(given))
        batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.2, 4, batch["input_ids"])
        return {key: value if random.random() < 2 else None for key, value in batch.items()}


def test_a_collator_may_draw_random_numbers_for_the_meta_batch(tmp_path):
    def run():
        trainer = meta_trainer(tmp_path, kind=Witness, perturb="head", keywords={"data_collator": Drawing()})
        return training_steps(trainer, [batch_of(sentences(4, seed)) for seed in range(3)])

    with separate_passes():
        expected = run()
    assert_same_steps(run(), expected, rtol=1e-5, atol=1e-7)


class FailingBody(nn.Linear):
    """Fails in one of its calls."""

    calls, fails_at = 0, None

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = []

    def forward(self, x):
        self.calls += 1
        output = super().forward(x)
        self.seen.append(weakref.ref(output))
        if self.calls == self.fails_at:
            raise FloatingPointError("in the body")
        return output


class FailingHead(FailingBody):
    pass


class Failing(nn.Module):
    """A body and a head, either of which may fail."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = FailingBody(4, 8), FailingHead(8, 2)

    def forward(self, features, labels=None):
        logits = self.head(torch.tanh(self.body(features)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def point_batches(number=2):
    return [
        {**batch_of(points(4, seed)), "meta_batch": batch_of(points(4, seed + 10))} for seed in range(1, number + 1)
    ]


def failing_trainer(folder):
    return meta_trainer(
        folder,
        model=Failing(),
        kind=Witness,
        perturb=["head.*"],
        keywords={"train_dataset": points(8, 1), "meta_dataset": points(8, 2)},
    )


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


# In the first step the body runs once more, to find out what can be shared; in the second one it is shared.
@pytest.mark.parametrize(("layer", "fails_at"), [("body", 1), ("body", 2)] + [("head", n) for n in (1, 2, 3, 4)])
def test_after_a_failure_the_next_step_is_right(tmp_path, layer, fails_at):
    first, second = point_batches()
    expected = failing_trainer(tmp_path)
    training_steps(expected, [first])
    expected = training_steps(expected, [second])

    trainer = failing_trainer(tmp_path)
    training_steps(trainer, [first])
    failing = getattr(trainer.model, layer)
    failing.calls, failing.fails_at = 0, fails_at
    trainer.model.head.weight.grad = None
    lam, meta_steps = snapshot(trainer.meta_module), trainer._num_meta_steps
    with pytest.raises(FloatingPointError, match="in the body"):
        training_steps(trainer, [second])
    assert not patched(trainer.model)
    gc.collect()
    assert not any(seen() is not None for seen in trainer.model.body.seen)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())

    failing.fails_at = None
    if trainer._num_meta_steps == meta_steps:
        assert same(snapshot(trainer.meta_module), lam)
        trainer._last_meta_step_at = None
        assert_same_steps(training_steps(trainer, [second]), expected, rtol=0, atol=0)


def test_a_meta_step_on_its_own_keeps_nothing_alive(tmp_path):
    trainer = failing_trainer(tmp_path)
    for fails_at in (None, 3, None):
        trainer.model.head.calls, trainer.model.head.fails_at = 0, fails_at
        with suppress(FloatingPointError):
            trainer.meta_step(trainer.model, point_batches(1)[0])
        gc.collect()
        assert not patched(trainer.model)
        assert not any(seen() is not None for seen in trainer.model.body.seen)


def test_the_number_of_live_tensors_stays_the_same(tmp_path):
    trainer = new_trainer(tmp_path, "bert", "last block")

    def live_tensors_after(number):
        training_steps(trainer, batches("bert", number))
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    assert live_tensors_after(3) == live_tensors_after(27)


def test_candidates_share_each_micro_batch_and_the_base_step_runs_by_itself(tmp_path):
    def runs_of_the_body(num_steps):
        model = PointClassifier()
        body, calls = model.body[0], []
        body.forward = lambda x: calls.append(x) or nn.Linear.forward(body, x)
        settings = {"perturb": ["head.*"], "gradient_accumulation_steps": 2, "max_steps": num_steps}
        meta_trainer(tmp_path, model=model, **settings).train()
        return len(calls)

    # In each step the two micro-batches for all candidates, the meta batch, and the two micro-batches to train on.
    assert runs_of_the_body(3) - runs_of_the_body(1) == 2 * (2 + 1 + 2)


class BatchDoor(MetaModule):
    """Scales the features before the model sees them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def transform_batch(self, batch):
        return {**batch, "features": batch["features"] * self.scale}


@contextmanager
def warnings_of(caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="meta_trainer"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("meta_trainer")]


@pytest.mark.parametrize("hypergradient", ["evograd", "finite_difference"])
def test_the_log_says_once_that_nothing_can_be_shared(tmp_path, caplog, hypergradient):
    def run():
        settings = {"perturb": ["*.0.*"], "hypergradient": hypergradient}
        trainer = meta_trainer(tmp_path, BatchDoor(), PointClassifier(), kind=Witness, **settings)
        return training_steps(trainer, point_batches(3))

    with warnings_of(caplog) as messages:
        found = run()
        assert len(messages()) == 1
        assert "very candidate of a meta step runs the whole" in messages()[0]
    with separate_passes():
        assert_same_steps(found, run(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hypergradient", ["evograd", "finite_difference", "t1t2"])
def test_a_scope_over_all_parameters_says_nothing(tmp_path, caplog, hypergradient):
    with warnings_of(caplog) as messages:
        trainer = meta_trainer(tmp_path, model=PointClassifier(), kind=Witness, hypergradient=hypergradient)
        training_steps(trainer, point_batches(2))
        assert messages() == []


class LayerDrop(PointClassifier):
    """Drops layers at random, and in the first step none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, features, labels=None):
        hidden = self.body(features)
        for layer in self.layers:
            if random.random() < 0.5:
                hidden = torch.tanh(layer(hidden))
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InPlaceLater(PointClassifier):
    """From the second step on it changes what a layer returned."""

    def __init__(self):
        super().__init__()
        self.register_buffer("age", torch.zeros(()))

    def forward(self, features, labels=None):
        hidden = self.body(features)
        if self.age > 0:
            hidden += 1
        self.age += 1
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", [LayerDrop, InPlaceLater])
def test_a_model_that_turns_out_to_change_its_ways_is_run_as_a_whole(tmp_path, caplog, kind):
    def run():
        trainer = meta_trainer(tmp_path, model=kind(), kind=Witness, perturb=["head.*"])
        return training_steps(trainer, point_batches(6))

    with separate_passes():
        expected = run()
    with warnings_of(caplog) as messages:
        assert_same_steps(run(), expected, rtol=1e-5, atol=1e-7)
        assert len(messages()) == 1
        assert "very candidate of a meta step runs the whole" in messages()[0]
