"""MetaXL's representation transformation: its formula, where it acts, and that it leaves no hook behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2
from meta_trainer.modules import MetaModuleList, RepresentationTransform
from meta_trainer.modules.representation_transform import GatedBottleneck, find_layer

HIDDEN = 8
SMALL = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 13,
}
MODELS = {
    "bert": (lambda: BertForTokenClassification(BertConfig(**SMALL)), "bert.encoder.layer"),
    "xlm_roberta": (
        lambda: XLMRobertaForTokenClassification(XLMRobertaConfig(**SMALL)),
        "roberta.encoder.layer",
    ),
    "distilbert": (
        lambda: DistilBertForTokenClassification(
            DistilBertConfig(dim=HIDDEN, n_layers=3, n_heads=2, hidden_dim=8, vocab_size=13)
        ),
        "distilbert.transformer.layer",
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=3, n_head=2, vocab_size=13)),
        "transformer.h",
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), "model.layers"),
}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
IS_SOURCE = torch.tensor([True, False, True])


class Stack(nn.Module):
    """Blocks that return a tensor, or a tuple that starts with one."""

    def __init__(self, depth: int = 3, as_tuple: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(depth))
        if as_tuple:
            self.blocks = nn.ModuleList(Pair(block) for block in self.blocks)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


class Pair(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden):
        return self.block(hidden), "attention"


def hooks_of(model):
    return [
        hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks)
    ]


def literal_network(network, hidden):
    """Linear(H, b) - ReLU - Linear(b, H + 1), whose last channel is a sigmoid gate on the other H."""
    middle = F.relu(hidden @ network.down.weight.T + network.down.bias)
    out = middle @ network.up.weight.T + network.up.bias
    gate = 1 / (1 + torch.exp(-out[..., HIDDEN]))
    return out[..., :HIDDEN] * gate[..., None]


def test_the_network_is_the_papers_gated_bottleneck():
    network, hidden = GatedBottleneck(HIDDEN, 5), torch.randn(2, 4, HIDDEN)
    nn.init.normal_(network.up.bias)

    assert network.down.weight.shape == (5, HIDDEN)
    assert network.up.weight.shape == (HIDDEN + 1, 5)
    assert_close(network(hidden), literal_network(network, hidden))


def test_the_network_starts_with_xavier_weights_and_zero_biases():
    network = GatedBottleneck(300, 100)

    for linear in (network.down, network.up):
        fan_in, fan_out = linear.in_features, linear.out_features
        assert linear.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize("as_tuple", [False, True])
def test_source_rows_get_the_weighted_residual_after_each_layer_and_target_rows_do_not(as_tuple):
    model, hidden = Stack(as_tuple=as_tuple), torch.randn(3, 4, HIDDEN)
    module = RepresentationTransform(HIDDEN, bottleneck_size=5, layers=[1, 3])
    with torch.no_grad():
        module.layer_logits.copy_(torch.tensor([0.3, -0.9]))
    alpha = torch.tensor([0.3, -0.9]).exp() / torch.tensor([0.3, -0.9]).exp().sum()
    expected = hidden
    for number, block in enumerate(model.blocks, start=1):
        expected = block(expected)
        expected = expected[0] if as_tuple else expected
        if number in (1, 3):
            position = (1, 3).index(number)
            residual = alpha[position] * literal_network(module.networks[position], expected)
            expected = torch.stack([h + r if s else h for h, r, s in zip(expected, residual, IS_SOURCE, strict=True)])

    plain = model(hidden)
    with module.attach(model, {"is_source": IS_SOURCE}):
        found = model(hidden)

    assert_close(found, expected)
    assert torch.equal(found[1], plain[1])
    assert (found[0] - plain[0]).abs().min() > 0


def test_the_other_outputs_of_a_layer_pass_through():
    model = Stack(as_tuple=True)
    with RepresentationTransform(HIDDEN, 5).attach(model, {"is_source": IS_SOURCE}):
        assert model.blocks[-1](torch.randn(3, 4, HIDDEN))[1] == "attention"


def test_the_residual_branch_is_cut_off_from_the_hidden_state():
    """The gradient by the hidden state is that of the identity; the network's parameters get theirs."""
    model, hidden = nn.Sequential(nn.Identity()), torch.randn(3, 4, HIDDEN, requires_grad=True)
    module, direction = RepresentationTransform(HIDDEN, 5, layers=["0"]), torch.randn(3, 4, HIDDEN)

    with module.attach(model, {"is_source": IS_SOURCE}):
        (model(hidden) * direction).sum().backward()

    assert torch.equal(hidden.grad, direction)
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.networks.parameters())


def test_a_single_layer_has_weight_one():
    model, hidden = nn.Sequential(nn.Identity()), torch.randn(3, 4, HIDDEN)
    module = RepresentationTransform(HIDDEN, 5, layers=["0"])
    with torch.no_grad():
        module.layer_logits.fill_(-3.0)
    with module.attach(model, {"is_source": torch.ones(3)}):
        assert_close(model(hidden), hidden + literal_network(module.networks[0], hidden))


def test_a_half_precision_layer_keeps_its_type():
    model, hidden = nn.Sequential(nn.Identity()), torch.randn(3, 4, HIDDEN, dtype=torch.bfloat16)
    with RepresentationTransform(HIDDEN, 5, layers=["0"]).attach(model, {"is_source": IS_SOURCE}):
        found = model(hidden)

    assert found.dtype == torch.bfloat16
    assert torch.equal(found[1], hidden[1])


# ---------------------------------------------------------------------------------------- Hugging Face models


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_by_name_by_number_and_from_the_end(name):
    model, blocks = MODELS[name][0](), MODELS[name][1]

    for position in range(3):
        layer = model.get_submodule(f"{blocks}.{position}")
        assert find_layer(model, f"{blocks}.{position}") is layer
        assert find_layer(model, position + 1) is layer
        assert find_layer(model, position - 3) is layer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [1, -1])
def test_source_examples_change_and_target_examples_do_not_change_a_bit(name, layer):
    model = MODELS[name][0]().eval()
    module = RepresentationTransform(HIDDEN, 4, layers=[layer])
    plain = model(IDS).logits

    with module.attach(model, {"is_source": IS_SOURCE}):
        found = model(IDS).logits

    assert torch.equal(found[1], plain[1])
    assert all((found[row] - plain[row]).abs().max() > 1e-4 for row in (0, 2))
    assert not hooks_of(model)
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("estimator", [evograd, t1t2, finite_difference])
def test_its_networks_learn_from_every_estimator(estimator):
    model = MODELS["bert"][0]().train()
    module, labels = RepresentationTransform(HIDDEN, 4, layers=[1, -1]), torch.randint(2, (3, 4))

    def train_loss():
        with module.attach(model, {"is_source": IS_SOURCE}):
            return model(IDS, labels=labels).loss

    theta, meta = list(model.classifier.parameters()), list(module.parameters())
    result = estimator(BilevelProblem(theta, meta, train_loss, lambda: model(IDS, labels=1 - labels).loss))

    assert all(grad.abs().sum() > 0 for grad in result.grads)
    assert not hooks_of(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    """The layer's forward pass is computed again when its hooks are gone."""
    model, module = MODELS["bert"][0]().train(), RepresentationTransform(HIDDEN, 4, layers=[2])
    labels = torch.randint(2, (3, 4))

    def gradients():
        torch.manual_seed(1)
        model.zero_grad(), module.zero_grad()
        with module.attach(model, {"is_source": IS_SOURCE}):
            loss = model(IDS, labels=labels).loss
        loss.backward()
        return [p.grad.clone() for p in (*module.networks.parameters(), *model.parameters()) if p.grad is not None]

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.bert.encoder.layer[1].gradient_checkpointing
    assert_close(gradients(), expected)


def test_hooks_are_gone_after_an_exception():
    model = Stack()
    module = MetaModuleList([RepresentationTransform(HIDDEN, 5, layers=[1, 2]), RepresentationTransform(HIDDEN, 5)])

    with module.attach(model, {"is_source": IS_SOURCE}):
        assert len(hooks_of(model)) == 3
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        module.attach(model, {"is_source": IS_SOURCE}),
    ):
        model(torch.randn(3, 4, HIDDEN + 1))

    assert not hooks_of(model)


def test_hooks_are_gone_when_a_later_layer_is_missing():
    model = Stack()
    with (
        pytest.raises(ValueError, match="no submodule 'nowhere'"),
        RepresentationTransform(HIDDEN, 5, layers=[1, "nowhere"]).attach(model, {"is_source": IS_SOURCE}),
    ):
        pass

    assert not hooks_of(model)


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("layers", [[], [1, 1], ["a", "b", "a"]])
def test_layers_should_be_named_once_each(layers):
    with pytest.raises(ValueError, match="`layers` should name at least one layer, each once"):
        RepresentationTransform(HIDDEN, layers=layers)


@pytest.mark.parametrize("layers", [3, None, "layer", [None], [1.5], [True]])
def test_layers_should_be_names_and_numbers(layers):
    with pytest.raises(ValueError, match="`layers` should be a list of names and whole numbers, got "):
        RepresentationTransform(HIDDEN, layers=layers)


@pytest.mark.parametrize("name", ["hidden_size", "bottleneck_size"])
@pytest.mark.parametrize("size", [0, -3, "8", 1.5, True, None])
def test_sizes_should_be_positive_whole_numbers(name, size):
    with pytest.raises(ValueError, match=f"`{name}` should be a positive, whole number, got {size!r}"):
        RepresentationTransform(**{"hidden_size": HIDDEN, name: size})


@pytest.mark.parametrize("is_source", [[True], torch.ones(1, 2), torch.tensor(1)])
def test_the_column_that_tells_source_from_target_has_one_value_per_example(is_source):
    attached = RepresentationTransform(HIDDEN).attach(MODELS["bert"][0](), {"is_source": is_source})
    with pytest.raises(ValueError, match=r"`is_source` should be a tensor of booleans of shape \[B\], got "):
        attached.__enter__()


def test_states_of_another_size_than_the_networks_are_refused():
    model = MODELS["bert"][0]()
    batch = {"is_source": torch.ones(2)}
    message = f"`hidden_size` of a RepresentationTransform should be {HIDDEN}, .* BertLayer gives, got {HIDDEN + 1}"
    with RepresentationTransform(HIDDEN + 1).attach(model, batch), pytest.raises(ValueError, match=message):
        model(input_ids=torch.ones(2, 3).long())


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_number_outside_the_model_is_refused(layer):
    with pytest.raises(ValueError, match=f"counts the model's 3 blocks from 1, or from -1 at the end, got {layer}"):
        RepresentationTransform(HIDDEN, layers=[layer]).check_model(MODELS["bert"][0]())


def test_an_unknown_name_is_refused_with_the_names_of_the_blocks():
    with pytest.raises(ValueError, match=r"no submodule 'bert.layer.0'.*'bert\.encoder\.layer\.0\.\.2'"):
        RepresentationTransform(HIDDEN, layers=["bert.layer.0"]).check_model(MODELS["bert"][0]())


def test_a_model_without_a_list_of_blocks_needs_names():
    with pytest.raises(ValueError, match="Sequential has no list of blocks to count"):
        find_layer(nn.Sequential(nn.Linear(2, 2)), 1)


def test_a_batch_that_does_not_tell_source_from_target_is_refused():
    module = RepresentationTransform(HIDDEN)
    with (
        pytest.raises(ValueError, match=r"boolean column `is_source`.*got the columns \['labels', 'x'\]"),
        module.attach(Stack(), {"x": 1, "labels": 2}),
    ):
        pass


def test_it_asks_for_the_column_that_it_reads():
    assert RepresentationTransform(HIDDEN).batch_columns == ("is_source",)


def test_the_identity_initialization_leaves_source_states_as_they_are_and_has_a_gradient():
    transform = RepresentationTransform(8, 4, initialization="identity")
    network = transform.networks[0]
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(network(hidden), torch.zeros_like(hidden))
    network(hidden).square().sum().backward()
    network.zero_grad()
    (network(hidden) - 1).square().sum().backward()
    assert network.up.weight.grad.abs().sum() > 0


def test_an_unknown_initialization_is_refused():
    with pytest.raises(ValueError, match="`initialization` should be one of xavier, identity, got 'zero'"):
        RepresentationTransform(8, 4, initialization="zero")
