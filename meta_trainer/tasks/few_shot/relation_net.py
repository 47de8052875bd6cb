"""RelationNet: a network that learns how alike a query image and the support images of a class are."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, ResNetConfig, ResNetModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetPreTrainedModel

from meta_trainer.modules.feature_wise_transform import FeatureWiseTransform, find_channels

DEPTHS = {"resnet10": (1, 1, 1, 1), "resnet34": (3, 4, 6, 3)}
STEMS = {"imagenet": 4, "small": 1, "small_pooled": 2}
"""Stems, and by how much each scales images down."""

RELATION_SIZE = 8
"""Of the hidden layer before the score, as in the paper."""


class RelationNetConfig(PreTrainedConfig):
    """Sizes of a :class:`RelationNet`.

    Args:
        backbone: ``"resnet10"`` or ``"resnet34"``, of basic blocks.
        backbone_width: Channels of its first stage; every further stage has twice as many.
        stem: ``"imagenet"``, 7x7 convolution of stride 2 and pooling; ``"small"``, 3x3 of stride 1;
            ``"small_pooled"``, the same with pooling.
        image_size: Height and width of the images, which the relation module's size depends on.
        n_way: Classes of an episode.
        k_shot: Support images of each class.
        num_train_classes: Classes of the auxiliary classifier; 0 for none.
        fixed_transform: Whether training passes go through a feature-wise transformation that does not learn.
        **kwargs: Those of every configuration of transformers.
    """

    model_type = "relation_net"

    def __init__(
        self,
        backbone: str = "resnet10",
        backbone_width: int = 64,
        stem: str = "imagenet",
        image_size: int = 224,
        n_way: int = 5,
        k_shot: int = 5,
        num_train_classes: int = 0,
        fixed_transform: bool = False,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        self.backbone_width = backbone_width
        self.stem = stem
        self.image_size = image_size
        self.n_way = n_way
        self.k_shot = k_shot
        self.num_train_classes = num_train_classes
        self.fixed_transform = fixed_transform
        super().__init__(**kwargs)

    @property
    def feature_channels(self) -> int:
        """Channels of the features: those of the last of four stages."""
        return self.backbone_width * 8

    @property
    def feature_size(self) -> int:
        """Height and width of the features; three stages halve them, rounding up."""
        return math.ceil(self.image_size / (STEMS[self.stem] * 8))

    def resnet_config(self) -> ResNetConfig:
        """The backbone's configuration."""
        width = self.backbone_width
        return ResNetConfig(
            embedding_size=width,
            hidden_sizes=[width, width * 2, width * 4, width * 8],
            depths=list(DEPTHS[self.backbone]),
            layer_type="basic",
        )


class RelationNet(ResNetPreTrainedModel):
    r"""Few-shot classifier: a score for each pair of a query and a class, :math:`r(f(query), \bar f(support))`.

    f is a ResNet, :math:`\bar f` the mean over a class's support images. Trained with the cross-entropy of the scores,
    the variant that the papers on feature-wise transformation call softmax. In training, an auxiliary classifier over
    all training classes reads the mean of the same features over positions; its loss is added with a weight that comes
    with the batch.

    Args:
        config: The sizes.

    References:
        Sung et al., `Learning to Compare: Relation Network for Few-Shot Learning <https://arxiv.org/abs/1711.06025>`_,
        CVPR 2018; sizes and loss as in Tseng et al., `<https://arxiv.org/abs/2001.08735>`_, ICLR 2020.
    """

    config: RelationNetConfig  # type: ignore[assignment]
    config_class = RelationNetConfig

    def __init__(self, config: RelationNetConfig) -> None:
        super().__init__(config)
        self.resnet = ResNetModel(config.resnet_config())
        if config.stem != "imagenet":
            pooled = config.stem == "small_pooled"
            self.resnet.embedder = SmallStem(config.backbone_width, pooled)  # type: ignore[assignment]
        # What it gives is not used: the features keep their positions.
        self.resnet.pooler = nn.Identity()  # type: ignore[assignment]
        channels = config.feature_channels
        self.relation_module = RelationModule(channels, config.feature_size)
        self.auxiliary_classifier = (
            nn.Linear(channels, config.num_train_classes) if config.num_train_classes else nn.Identity()
        )
        self.fixed_transform: FeatureWiseTransform | None = None
        if config.fixed_transform:
            self.fixed_transform = FeatureWiseTransform(find_channels(self.resnet)).requires_grad_(False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        class_ids: Tensor | None = None,
        auxiliary_weight: Tensor | None = None,
        use_running_statistics: bool = False,
    ) -> ImageClassifierOutput:
        """Classify the queries of E episodes.

        Args:
            pixel_values: ``[E, N, 3, H, W]``, the images of each episode: k_shot of each class, class by class, then
                the queries.
            labels: ``[E, Q]``, the class of each query within its episode.
            class_ids: ``[E, N]``, the class of each image among all training classes, for the auxiliary loss.
            auxiliary_weight: ``[E]``, that loss's weight.
            use_running_statistics: Normalize as in evaluation, also in train mode.

        Returns:
            The loss, where there are labels, and scores ``[E, Q, n_way]``.
        """
        num_support = self.config.n_way * self.config.k_shot
        with _running_statistics(self) if use_running_statistics else nullcontext():
            features = self._features(pixel_values, self.training and not use_running_statistics)  # [E, N, C, h, w]
            support = features[:, :num_support].unflatten(1, (self.config.n_way, self.config.k_shot))
            scores = self.relation_module(support.mean(dim=2), features[:, num_support:])  # [E, Q, n_way]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
            if class_ids is not None and auxiliary_weight is not None:
                loss = loss + self._auxiliary_loss(features, class_ids, auxiliary_weight)
        return ImageClassifierOutput(loss=loss, logits=scores)

    def _features(self, pixel_values: Tensor, transform: bool) -> Tensor:
        fixed = self.fixed_transform
        with fixed.attach(self.resnet, {}) if fixed is not None and transform else nullcontext():
            features = self.resnet(pixel_values.flatten(0, 1)).last_hidden_state
        return features.unflatten(0, pixel_values.shape[:2])

    def _auxiliary_loss(self, features: Tensor, class_ids: Tensor, weight: Tensor) -> Tensor:
        logits = self.auxiliary_classifier(features.mean(dim=(3, 4)))  # [E, N, classes]
        losses = F.cross_entropy(logits.transpose(1, 2), class_ids, reduction="none").mean(dim=1)  # [E]
        return (weight * losses).mean()


class RelationModule(nn.Module):
    r"""Score pairs of feature maps: two convolutional blocks over the two maps side by side, and two linear layers.

    The first convolution over a joint map is the sum of one over each of its halves. These are computed once for each
    query and each class and then added for every pair.

    Args:
        channels: C of a feature map.
        size: Height and width of a feature map.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.of_class = _convolution(channels)
        self.of_query = _convolution(channels)
        self.first = _normalized_and_pooled(channels)
        self.second = nn.Sequential(_convolution(channels), *_normalized_and_pooled(channels))
        final_size = math.ceil(size / 4)  # both blocks halve it
        self.score = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * final_size**2, RELATION_SIZE), nn.ReLU(), nn.Linear(RELATION_SIZE, 1)
        )

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Scores ``[E, Q, W]`` of classes ``[E, W, C, h, w]`` and queries ``[E, Q, C, h, w]``."""
        of_class = self.of_class(classes.flatten(0, 1)).unflatten(0, classes.shape[:2])
        of_query = self.of_query(queries.flatten(0, 1)).unflatten(0, queries.shape[:2])
        pairs = of_query[:, :, None] + of_class[:, None]  # [E, Q, W, C, h, w]
        return self.score(self.second(self.first(pairs.flatten(0, 2)))).view(pairs.shape[:3])


class SmallStem(nn.Module):
    """A 3x3 convolution of stride 1, for images that the first layers are not to scale down.

    Args:
        channels: Of its output.
        pooled: Whether the output is halved by pooling after all.
    """

    def __init__(self, channels: int, pooled: bool) -> None:
        super().__init__()
        self.embedder = ResNetConvLayer(3, channels, kernel_size=3)
        self.pooler = nn.MaxPool2d(2, ceil_mode=True) if pooled else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features ``[B, C, h, w]`` of images ``[B, 3, H, W]``."""
        return self.pooler(self.embedder(pixel_values))


def _convolution(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)


def _normalized_and_pooled(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))


@contextmanager
def _running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalization as in evaluation."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
