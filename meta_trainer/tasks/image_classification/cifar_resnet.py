"""The residual networks for CIFAR, ResNet-20, 32, 44 and so on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification

from meta_trainer.tasks.image_classification.image_classifier import ImageClassifier, ImageClassifierConfig

WIDTHS = (16, 32, 64)


class CifarResNetConfig(ImageClassifierConfig):
    """Shape of the images and depth of a residual network for CIFAR.

    Args:
        image_size: Height and width of an image, in pixels.
        num_channels: Channels of an image.
        blocks_per_stage: Blocks n of each of the three stages, 6n + 2 layers in all: 5 for ResNet-32.
        **options: As for :class:`ImageClassifierConfig`.

    Raises:
        ValueError: If a stage has no block.
    """

    model_type = "meta_trainer_cifar_resnet"

    def __init__(self, image_size: int = 32, num_channels: int = 3, blocks_per_stage: int = 5, **options: Any) -> None:
        if blocks_per_stage < 1:
            raise ValueError(f"`blocks_per_stage` of a residual network should be at least 1, got {blocks_per_stage}.")
        self.blocks_per_stage = blocks_per_stage
        super().__init__(image_size, num_channels, **options)


class CifarResNet(ImageClassifier):
    """A first convolution, three stages of basic blocks of 16, 32 and 64 channels, the mean over pixels, one layer.

    References:
        He et al., `Deep Residual Learning for Image Recognition <https://arxiv.org/abs/1512.03385>`_, CVPR 2016,
        section 4.2, with shortcuts without parameters (option A).
    """

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        blocks, width = [], WIDTHS[0]
        for stage_width in WIDTHS:
            for _ in range(config.blocks_per_stage):
                blocks.append(BasicBlock(width, stage_width))
                width = stage_width
        self.features = nn.Sequential(
            nn.Conv2d(config.num_channels, WIDTHS[0], kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(width, self.head_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut. Shape: ``[B, C, H, W]`` to ``[B, D, H, W]``, half the pixels where D > C."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.added_channels = (1, 0) if width == channels else (2, width - channels)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output; new channels of the shortcut are zero."""
        residual = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(hidden)))))  # [B, D, H, W]
        if self.added_channels:
            before = self.added_channels // 2
            hidden = F.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, before, self.added_channels - before))
        return torch.relu(residual + hidden)


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNet)
