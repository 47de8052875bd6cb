"""LeNet and the residual networks for CIFAR: their shapes, their blocks, and where they are saved to."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageClassification

from meta_trainer.scope import select_parameters
from meta_trainer.tasks.image_classification.cifar_resnet import BasicBlock, CifarResNet, CifarResNetConfig
from meta_trainer.tasks.image_classification.lenet import LeNet, LeNetConfig

MODELS = [(LeNet, LeNetConfig(num_labels=10), 44_426), (CifarResNet, CifarResNetConfig(num_labels=10), 464_154)]


@pytest.mark.parametrize(("kind", "config", "number"), MODELS)
def test_the_models_are_of_the_papers_sizes_and_have_a_mean_loss(kind, config, number):
    model = kind(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == number
    images, labels = torch.randn(3, config.num_channels, config.image_size, config.image_size), torch.tensor([0, 4, 9])
    outputs = model(images, labels=labels)
    assert outputs.logits.shape == (3, 10)
    assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert model(images).loss is None


@pytest.mark.parametrize(("kind", "config", "number"), MODELS)
def test_a_saved_model_is_found_by_the_auto_classes(kind, config, number, tmp_path):
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == model.config.to_json_string()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(("kind", "config", "number"), MODELS)
def test_the_head_is_the_classifier(kind, config, number):
    model = kind(config)
    head = {id(p) for p in select_parameters(model, "head")}
    assert head == {id(p) for p in model.classifier.parameters()}


def test_a_resnet_has_as_many_layers_as_its_name_says():
    model = CifarResNet(CifarResNetConfig())
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 32


def test_convolutions_start_with_the_variance_of_he_and_batch_norms_as_the_identity():
    model = CifarResNet(CifarResNetConfig())
    weight = model.features[-3].conv2.weight  # [64, 64, 3, 3]
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert torch.equal(model.features[1].weight, torch.ones(16))


def test_the_shortcut_of_a_wider_block_halves_the_image_and_adds_zeros():
    block, images = BasicBlock(4, 8).eval(), torch.rand(2, 4, 6, 6)
    with torch.no_grad():
        block.norm2.weight.zero_()
    found = block(images)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = images[:, :, ::2, ::2]
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNetConfig(image_size=15), "`image_size` of a LeNet should be at least 16, got 15"),
        (lambda: CifarResNetConfig(blocks_per_stage=0), "`blocks_per_stage` .* at least 1, got 0"),
        (
            lambda: LeNet(LeNetConfig())(torch.zeros(2, 3, 28, 28)),
            r"LeNet expects `pixel_values` of shape \['B', 1, 28, 28\], got \[2, 3, 28, 28\]",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
