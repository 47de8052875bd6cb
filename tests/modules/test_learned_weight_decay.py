"""Learned weight decay: which parameters it penalises, and its hypergradient under every estimator."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from meta_trainer import LearnedWeightDecay, MetaModule, MetaTrainer, MetaTrainingArguments
from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2
from meta_trainer.shared_forward import _Plan


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.norm(self.body(inputs))))


def two_layers() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers().double()


def learned(groups=("*",), decay: float = 0.1, **settings) -> LearnedWeightDecay:
    return LearnedWeightDecay(groups, decay, **settings).double()


def test_the_penalty_is_the_squared_norm_of_the_matrices():
    model, losses = two_layers(), torch.rand(3).double()
    expected = losses.mean() + 0.1 * (model.body.weight.square().sum() + model.head.weight.square().sum())
    assert_close(learned().reduce(losses, {"base_model": model}, None), expected)


def test_each_group_has_a_decay_of_its_own_and_a_parameter_belongs_to_the_first_that_matches():
    model, module = two_layers(), learned(["head", "*"])
    with torch.no_grad():
        module.log_decays.copy_(torch.tensor([0.2, 0.3]).log())
    expected = 0.2 * model.head.weight.square().sum() + 0.3 * model.body.weight.square().sum()
    found = module.reduce(torch.zeros(2).double(), {"base_model": model}, None)
    assert_close(found, expected)
    summary = {name: value.item() for name, value in module.summary().items()}
    assert summary == pytest.approx({"weight_decay_head": 0.2, "weight_decay": 0.3})


def test_parameters_that_are_not_trained_are_left_out():
    model, module = two_layers(), learned()
    model.body.requires_grad_(False)
    module.check_model(model)
    # A meta step freezes what it does not perturb.
    model.head.requires_grad_(False)
    found = module.reduce(torch.zeros(2).double(), {"base_model": model}, None)
    assert_close(found, 0.1 * model.head.weight.square().sum())


def test_a_compiled_model_has_the_same_groups():
    model, module = two_layers(), learned(["head"])
    module.check_model(model)
    found = module.reduce(torch.zeros(2).double(), {"base_model": torch.compile(model, backend="eager")}, None)
    assert_close(found, 0.1 * model.head.weight.square().sum())


def test_half_precision_parameters_are_squared_in_single_precision():
    model = two_layers().bfloat16()
    expected = 0.1 * sum(p.float().square().sum() for p in (model.body.weight, model.head.weight))
    found = LearnedWeightDecay(initial_decay=0.1).reduce(torch.zeros(2), {"base_model": model}, None)
    assert_close(found, expected)


def test_it_opens_the_loss_door_only():
    module = learned()
    assert [module.has_batch_door, module.has_forward_door, module.has_loss_door] == [False, False, True]
    assert not module.has_normalizer
    assert module.reads_base_model


def test_it_is_saved_with_its_groups(tmp_path):
    module = LearnedWeightDecay(["head", "*"], 0.25)
    module.save_pretrained(tmp_path)
    loaded = MetaModule.from_pretrained(tmp_path)
    assert isinstance(loaded, LearnedWeightDecay)
    assert loaded.groups == ["head", "*"]
    assert_close(loaded.decays(), torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize("groups", [[], "head", ["*", "*"], [""], [1], None])
def test_groups_are_name_patterns(groups):
    with pytest.raises(ValueError, match="`groups` should be a list of name patterns, each once"):
        LearnedWeightDecay(groups)


@pytest.mark.parametrize("decay", [0, -1, float("inf"), float("nan"), "1", None])
def test_decays_start_above_zero(decay):
    with pytest.raises(ValueError, match="`initial_decay` should be a positive number"):
        LearnedWeightDecay(initial_decay=decay)


@pytest.mark.parametrize("groups", [["haed"], ["*", "head"], ["*.bias"], ["norm"]])
def test_a_group_without_a_member_is_refused(groups):
    with pytest.raises(ValueError, match=r"`groups` has the pattern .* matches no trainable parameter of two or more"):
        learned(groups).check_model(two_layers())


def test_without_the_model_there_is_nothing_to_penalise():
    with pytest.raises(ValueError, match=r"expects the base model as `base_model` .* got \['labels'\]"):
        learned().reduce(torch.zeros(2), {"labels": torch.zeros(2)}, None)


# ------------------------------------------------------------------------------ hypergradient


class Regularised:
    """A small classification with a decay for each of two layers, in float64."""

    def __init__(self, scope: str = "all") -> None:
        self.model, self.module = two_layers(), learned(["head", "*"])
        self.inputs, self.labels = torch.randn(8, 4).double(), torch.randint(3, (8,))
        self.held_out, self.held_out_labels = torch.randn(8, 4).double(), torch.randint(3, (8,))
        self.theta = [p for name, p in self.model.named_parameters() if scope == "all" or name.startswith(scope)]

    def train_loss(self):
        losses = F.cross_entropy(self.model(self.inputs), self.labels, reduction="none")
        return self.module.reduce(losses, {"base_model": self.model}, None)

    def val_loss(self):
        return F.cross_entropy(self.model(self.held_out), self.held_out_labels)

    def problem(self):
        return BilevelProblem(self.theta, [self.module.log_decays], self.train_loss, self.val_loss)

    def closed_form(self, lr: float):
        """-lr <g_V, dP/drho_g>: the gradient of a group's penalty is 2 lambda theta."""
        gradients = torch.autograd.grad(self.train_loss(), self.theta)
        before = [p.detach().clone() for p in self.theta]
        with torch.no_grad():
            for p, gradient in zip(self.theta, gradients, strict=True):
                p -= lr * gradient
        slopes = dict(zip(map(id, self.theta), torch.autograd.grad(self.val_loss(), self.theta), strict=True))
        with torch.no_grad():
            for p, value in zip(self.theta, before, strict=True):
                p.copy_(value)
        decays = self.module.decays().detach()
        groups = [self.model.head.weight, self.model.body.weight]
        along = [(slopes[id(w)] * w.detach()).sum() if id(w) in slopes else torch.tensor(0.0) for w in groups]
        return -2 * lr * decays * torch.stack(along)


@pytest.mark.parametrize("scope", ["all", "head"])
def test_t1t2_is_the_closed_form(scope):
    case = Regularised(scope)
    expected = case.closed_form(0.1)
    found = t1t2(case.problem(), lr=0.1).grads[0]
    assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert (found[1] == 0) == (scope == "head")


@pytest.mark.parametrize("scope", ["all", "head"])
def test_finite_differences_converge_to_it(scope):
    case = Regularised(scope)
    found = finite_difference(case.problem(), lr=1e-6, step_size=1e-4).grads[0]
    assert_close(found, case.closed_form(1e-6), rtol=1e-4, atol=1e-14)


def test_evograd_is_autograd_through_the_literal_formula():
    case = Regularised()
    noise = [[1e-2 * torch.randn_like(p) for p in case.theta] for _ in range(3)]
    names = [name for name, _ in case.model.named_parameters()]
    candidates = [{n: p.detach() + e for n, p, e in zip(names, case.theta, own, strict=True)} for own in noise]

    def forward(parameters, inputs, labels, reduction):
        return F.cross_entropy(torch.func.functional_call(case.model, parameters, inputs), labels, reduction=reduction)

    def train_loss(parameters):
        head, body = (parameters[f"{name}.weight"].square().sum() for name in ("head", "body"))
        penalty = case.module.log_decays.exp() @ torch.stack([head, body])
        return forward(parameters, case.inputs, case.labels, "mean") + penalty

    weights = torch.softmax(-torch.stack([train_loss(c) for c in candidates]) / 0.05, dim=0)
    moved = {name: sum(w * c[name] for w, c in zip(weights, candidates, strict=True)) for name in names}
    value = forward(moved, case.held_out, case.held_out_labels, "mean")
    (expected,) = torch.autograd.grad(value, case.module.log_decays)

    found = evograd(case.problem(), num_candidates=3, noise=lambda k, theta: noise[k], temperature=0.05).grads[0]

    assert_close(found, expected, rtol=1e-9, atol=1e-15)


# ------------------------------------------------------------------------------ under MetaTrainer


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes, **dropout))


def sentences(number: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (number, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]


def trainer_of(folder, module, **settings) -> MetaTrainer:
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = MetaTrainingArguments(folder, **{**defaults, **settings})
    return MetaTrainer(
        tiny_bert(), args, meta_module=module, train_dataset=sentences(16, 1), meta_dataset=sentences(8, 2)
    )


def first_hypergradient(trainer: MetaTrainer) -> torch.Tensor:
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.meta_step(trainer.model, batch).grads[0]


@pytest.mark.parametrize("perturb", ["all", "head", "bert.encoder.layer.1"])
@pytest.mark.parametrize(
    "settings", [{}, {"noise": "guided"}, {"hypergradient": "t1t2"}], ids=["sign", "guided", "t1t2"]
)
def test_candidates_that_share_a_forward_pass_have_penalties_of_their_own(tmp_path, monkeypatch, perturb, settings):
    """Against the same meta step in which every candidate runs the whole model."""
    shared = first_hypergradient(trainer_of(tmp_path, learned(["classifier", "*"]), perturb=perturb, **settings))
    monkeypatch.setattr("meta_trainer.shared_forward._make_plan", lambda *args: _Plan())
    separate = first_hypergradient(trainer_of(tmp_path, learned(["classifier", "*"]), perturb=perturb, **settings))
    assert_close(shared, separate, rtol=1e-6, atol=1e-12)
    assert shared.abs().max() > 0


def test_the_base_step_descends_on_the_penalty(tmp_path):
    norms = {}
    for decay in (1e-8, 1.0):
        trainer = trainer_of(tmp_path, LearnedWeightDecay(initial_decay=decay), max_steps=5, learning_rate=1e-2)
        trainer.train()
        norms[decay] = sum(p.square().sum().item() for p in trainer.model.parameters() if p.dim() > 1)
    assert norms[1.0] < 0.9 * norms[1e-8]


def test_the_penalty_counts_once_in_an_accumulated_step(tmp_path):
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path,
            LearnedWeightDecay(initial_decay=0.01),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.model.eval()
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_decoder_is_regularised_likewise(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences(8, 1)]
    args = MetaTrainingArguments(tmp_path, max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True)
    module = LearnedWeightDecay(["model.layers.*", "*"])
    before = module.decays().tolist()
    MetaTrainer(model, args, meta_module=module, train_dataset=rows, meta_dataset=rows).train()
    assert all(new != old for new, old in zip(module.decays().tolist(), before, strict=True))
