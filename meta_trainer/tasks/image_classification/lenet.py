"""LeNet, for digits and other small images of one channel."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from meta_trainer.tasks.image_classification.image_classifier import ImageClassifier, ImageClassifierConfig

SMALLEST_IMAGE = 16


class LeNetConfig(ImageClassifierConfig):
    """Shape of the images of a LeNet.

    Args:
        image_size: Height and width of an image, in pixels.
        num_channels: Channels of an image.
        **options: As for :class:`ImageClassifierConfig`.

    Raises:
        ValueError: If images are so small that the second pooling leaves nothing of them.
    """

    model_type = "meta_trainer_lenet"

    def __init__(self, image_size: int = 28, num_channels: int = 1, **options: Any) -> None:
        if image_size < SMALLEST_IMAGE:
            raise ValueError(f"`image_size` of a LeNet should be at least {SMALLEST_IMAGE}, got {image_size}.")
        super().__init__(image_size, num_channels, **options)


class LeNet(ImageClassifier):
    """Two convolutions with ReLU and pooling, and three linear layers.

    References:
        LeCun et al., Gradient-based learning applied to document recognition, 1998; with ReLU and the maximum in its
        pools, as in the code of the EvoGrad paper.
    """

    config_class = LeNetConfig

    def __init__(self, config: LeNetConfig) -> None:
        super().__init__(config)
        self.features = nn.Sequential(
            nn.Conv2d(config.num_channels, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        side = ((config.image_size - 4) // 2 - 4) // 2
        self.classifier = nn.Sequential(
            nn.Linear(16 * side**2, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, self.head_size),
        )
        self.post_init()


AutoConfig.register(LeNetConfig.model_type, LeNetConfig)
AutoModelForImageClassification.register(LeNetConfig, LeNet)
