"""The feature-wise transformation: its formula, where it acts, and that all candidates see one draw."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from meta_trainer import FeatureWiseTransform, MetaModule, MetaTrainer, MetaTrainingArguments
from meta_trainer.hypergrad import BilevelProblem, t1t2
from meta_trainer.modules import feature_wise_transform
from meta_trainer.modules.feature_wise_transform import find_channels, random_affine


class ConvNet(nn.Module):
    """A classifier of images with two normalized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
        self.head = nn.Linear(5, 2)

    def forward(self, pixel_values, labels=None):
        logits = self.head(torch.tanh(self.body(pixel_values)).mean(dim=(2, 3)))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


LAYERS = [("body.1", 4), ("body.3", 5)]


def basic_resnet(depths=(1, 1, 1, 1), width=64):
    sizes = [width, width * 2, width * 4, width * 8]
    config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=list(depths), layer_type="basic")
    return ResNetForImageClassification(config)


def images(number=6):
    return [{"pixel_values": torch.randn(3, 7, 7), "labels": i % 2} for i in range(number)]


def softplus(value):
    return torch.log1p(torch.exp(value))


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 4, 5, 3), 1), ((2, 7, 4), -1), ((6, 4), 1)])
def test_every_channel_is_scaled_and_shifted_by_one_draw(shape, channel_dim):
    layer, hidden = nn.Identity(), torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(layer)
    module = FeatureWiseTransform([("0", 4)], channel_dim=channel_dim).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)

    torch.manual_seed(7)
    with module.attach(model, {}):
        transformed = model(hidden)

    torch.manual_seed(7)
    gamma = 1 + softplus(module.scales[0]) * torch.randn(4, dtype=torch.float64)
    beta = softplus(module.shifts[0]) * torch.randn(4, dtype=torch.float64)
    expected = torch.stack(
        [g * h + b for g, b, h in zip(gamma, beta, hidden.unbind(channel_dim), strict=True)], dim=channel_dim
    )
    assert_close(transformed, expected)


def test_the_noise_has_mean_zero_and_the_size_that_is_learned():
    scale, shift = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    gamma, beta = (drawn.view(20000, 2) for drawn in random_affine(scale.repeat(20000), shift.repeat(20000)))
    assert_close(gamma.mean(0), torch.ones(2).double(), atol=0.03, rtol=0)
    assert_close(beta.mean(0), torch.zeros(2).double(), atol=0.05, rtol=0)
    assert_close(gamma.std(0), softplus(scale), atol=0, rtol=0.03)
    assert_close(beta.std(0), softplus(shift), atol=0, rtol=0.03)


def test_it_starts_from_the_papers_values_and_says_how_large_the_noise_is():
    module = FeatureWiseTransform(LAYERS)
    assert all(torch.equal(p.detach(), torch.full_like(p, 0.3)) for p in module.scales)
    assert all(torch.equal(p.detach(), torch.full_like(p, 0.5)) for p in module.shifts)
    nn.init.constant_(module.scales[1], 1.0)
    scale = (4 * softplus(torch.tensor(0.3)) + 5 * softplus(torch.tensor(1.0))) / 9
    assert_close(module.summary(), {"mean_scale_noise": scale, "mean_shift_noise": softplus(torch.tensor(0.5))})


def test_the_exact_hypergradient_is_that_of_an_unrolled_step_with_the_same_draw():
    model, module = ConvNet().double().train(), FeatureWiseTransform(LAYERS).double()
    theta = dict(model.named_parameters())
    x, y = torch.randn(4, 3, 7, 7, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    x_meta = torch.randn(4, 3, 7, 7, dtype=torch.float64)

    def train_loss(parameters):
        with module.attach(model, {}):
            return torch.func.functional_call(model, parameters, (x, y))["loss"]

    torch.manual_seed(3)
    grads = torch.autograd.grad(train_loss(theta), list(theta.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    meta_loss = torch.func.functional_call(model, stepped, (x_meta, y))["loss"]
    expected = torch.autograd.grad(meta_loss, list(module.parameters()))
    # T1-T2 takes the second derivative where it started: the same for a gradient step.
    torch.manual_seed(3)
    problem = BilevelProblem(
        theta=list(theta.values()),
        meta_params=list(module.parameters()),
        train_loss=lambda: train_loss(theta),
        val_loss=lambda: model(x_meta, y)["loss"],
        state=list(model.buffers()),
    )
    result = t1t2(problem, lr=0.1)
    assert_close(result.grads, expected)
    assert all(grad.abs().max() > 0 for grad in result.grads)


def test_all_candidates_and_the_base_step_see_the_same_draw_and_the_next_step_another(tmp_path, monkeypatch):
    drawn, steps = [], []

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            steps.append([torch.cat(drawn[i : i + 2]) for i in range(0, len(drawn), 2)])
            drawn.clear()

    def record(scale, shift):
        gamma, beta = random_affine(scale, shift)
        drawn.append(torch.cat([gamma, beta]).detach())
        return gamma, beta

    monkeypatch.setattr(feature_wise_transform, "random_affine", record)
    args = MetaTrainingArguments(
        str(tmp_path), num_candidates=3, per_device_train_batch_size=3, per_device_meta_batch_size=6, max_steps=2,
        use_cpu=True, meta_learning_rate=0.0, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = MetaTrainer(
        ConvNet(), args, meta_module=FeatureWiseTransform(LAYERS), train_dataset=images(), meta_dataset=images(),
        callbacks=[EndOfStep()],
    )  # fmt: skip
    trainer.train()
    first, second = steps
    assert len(first) == len(second) == 4  # three candidates and the base step
    assert all(torch.equal(draw, first[0]) for draw in first)
    assert all(torch.equal(draw, second[0]) for draw in second)
    assert not torch.equal(first[0], second[0])


def test_hooks_are_gone_after_the_pass_also_after_an_error():
    model, module = ConvNet(), FeatureWiseTransform(LAYERS)
    for pixels in (torch.randn(2, 3, 7, 7), torch.randn(2, 1, 7, 7)):
        try:
            with module.attach(model, {}):
                assert model.body[1]._forward_hooks
                model(pixels)
        except RuntimeError:
            assert pixels.shape[1] == 1
        assert not any(submodule._forward_hooks for submodule in model.modules())


def test_the_rest_of_a_tuple_passes_through_and_blocks_count_from_one():
    class Pair(nn.Module):
        def forward(self, hidden):
            return hidden, "attention"

    model = nn.Module()
    model.blocks = nn.ModuleList([Pair(), Pair()])
    module = FeatureWiseTransform([(1, 4), (-1, 4)], channel_dim=-1)
    with module.attach(model, {}):
        for block in model.blocks:
            hidden, rest = block(torch.ones(2, 3, 4))
            assert rest == "attention"
            assert not torch.equal(hidden, torch.ones(2, 3, 4))


def test_in_a_resnet_10_it_has_the_papers_number_of_parameters():
    model = basic_resnet()
    layers = find_channels(model)
    assert [channels for _, channels in layers] == [64, 128, 128, 256, 256, 512, 512]
    module = FeatureWiseTransform(layers)
    module.check_model(model)
    assert sum(p.numel() for p in module.parameters()) == 3712
    # Blocks are sums of what the noise acts on, and nothing else of the network is.
    assert len(find_channels(basic_resnet((3, 4, 6, 3), width=2))) == 16 + 3


def test_channels_are_found_for_every_kind_of_layer_that_says_how_many_it_has():
    layers = {"a": nn.LayerNorm(3), "b": nn.GroupNorm(2, 4), "c": nn.Conv1d(1, 5, 1), "d": nn.Linear(1, 6)}
    assert find_channels(nn.ModuleDict(layers), ["*"]) == [("a", 3), ("b", 4), ("c", 5), ("d", 6)]


def test_patterns_that_match_nothing_or_what_has_no_channels_are_refused():
    with pytest.raises(ValueError, match=r"'\*\.norm9' matches no submodule of ConvNet\. .* are body\.1, body\.3"):
        find_channels(ConvNet(), ["body.1", "*.norm9"])
    with pytest.raises(ValueError, match=r"channels of body is not known: .* as `layers` of a FeatureWiseTransform"):
        find_channels(ConvNet(), ["body"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, "at least one layer, each once"),
        ({"layers": [("a", 3), ("a", 3)]}, "at least one layer, each once"),
        ({"layers": ["a"]}, "list of pairs of a layer and its number"),
        ({"layers": [("a", 0)]}, "`channels of layer 'a'` should be a positive"),
        ({"channel_dim": 0.5}, "`channel_dim` should be a whole number"),
        ({"scale": "x"}, "`scale` should be a number"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureWiseTransform(**{"layers": LAYERS, **settings})


def test_a_model_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"gives layer 'body\.3' 4 channels, and the model has 5 there"):
        FeatureWiseTransform([("body.3", 4)]).check_model(ConvNet())
    module = FeatureWiseTransform([("body.3", 5)], channel_dim=-1)
    with module.attach(model := ConvNet(), {}), pytest.raises(ValueError, match="expects 5 channels in dimension -1"):
        model(torch.randn(2, 3, 7, 7))


def test_saving_and_loading_gives_the_same_module(tmp_path):
    module = FeatureWiseTransform(LAYERS, channel_dim=-1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.save_pretrained(tmp_path)
    loaded = MetaModule.from_pretrained(tmp_path)
    assert isinstance(loaded, FeatureWiseTransform)
    assert (loaded.layers, loaded.channel_dim) == (module.layers, -1)
    assert_close(dict(loaded.named_parameters()), dict(module.named_parameters()))
