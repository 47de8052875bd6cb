"""What the small image classifiers of this package have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ImageClassifierConfig(PreTrainedConfig):
    """Shape of the images, and how their pixels were normalised.

    Args:
        image_size: Height and width of an image, in pixels.
        num_channels: Channels of an image.
        image_mean: Mean of each channel, or of all of them, subtracted from pixels between 0 and 1.
        image_std: Standard deviation by which the difference is divided.
        **options: Of every config, `num_labels` among them.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **options: Any,
    ) -> None:
        self.image_size, self.num_channels = image_size, num_channels
        self.image_mean, self.image_std = image_mean or [0.5], image_std or [0.5]
        super().__init__(**options)


class ImageClassifier(PreTrainedModel):
    """An image classifier made of ``features``, from images to vectors, and a ``classifier`` of these.

    A subclass builds both and calls `post_init`.
    """

    base_model_prefix = "features"
    main_input_name = "pixel_values"
    features: nn.Module
    classifier: nn.Module

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Logits ``[B, num_labels]`` of images ``[B, C, H, W]``, and the mean loss where there are labels ``[B]``."""
        shape = [self.config.num_channels, self.config.image_size, self.config.image_size]
        if list(pixel_values.shape[1:]) != shape:
            raise ValueError(
                f"{type(self).__name__} expects `pixel_values` of shape {['B', *shape]}, got "
                f"{list(pixel_values.shape)}. Set `image_size` and `num_channels` of its config to those of the images."
            )
        if pixel_values.is_cuda:
            # Convolutions of few channels take less than half the time in this layout, which they pass on.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        logits = self.classifier(self.features(pixel_values))  # [B, num_labels]
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    @property
    def head_size(self) -> int:
        """Number of classes."""
        return len(self.config.id2label or {})

    def _init_weights(self, module: nn.Module) -> None:
        # As torch does for convolutions, linear layers and batch norms alike.
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
