"""Image classification as a task."""

from collections.abc import Callable
from functools import partial

from datasets import Dataset, concatenate_datasets
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, default_data_collator
from transformers.image_processing_utils import BaseImageProcessor

from meta_trainer.tasks.classifier import class_maps, make_model, pretrained_config
from meta_trainer.tasks.image_classification.arguments import ImageClassificationArguments
from meta_trainer.tasks.image_classification.cifar_resnet import CifarResNetConfig
from meta_trainer.tasks.image_classification.image_classifier import ImageClassifierConfig
from meta_trainer.tasks.image_classification.lenet import LeNetConfig
from meta_trainer.tasks.image_classification.loading import ImageData, load_image_data
from meta_trainer.tasks.image_classification.pixels import ImageTransform, ProcessedPixels, ReadPixels, ResizedPixels
from meta_trainer.tasks.labelled_rows import label_record, mark_trusted
from meta_trainer.tasks.metrics import classification_scores
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.pictures import decode
from meta_trainer.tasks.task import Task

CONFIGS: dict[str, Callable[..., ImageClassifierConfig]] = {
    "lenet": LeNetConfig,
    **{f"resnet{6 * n + 2}": partial(CifarResNetConfig, blocks_per_stage=n) for n in (1, 3, 5)},
}
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")


def build_image_classification_task(
    arguments: ImageClassificationArguments,
    model: ModelArguments,
    *,
    seed: int,
    with_meta: bool,
    tells_trusted: bool = False,
) -> Task:
    """Load data and image processor, and put together what a run needs.

    Args:
        arguments: Data, meta set, noise, what is changed in images, and the model that is trained from scratch.
        model: A pretrained model, if there is one.
        seed: Seed of the weights that are not pretrained, and of the noise where the settings have none for it.
        with_meta: Whether a meta module is trained. If not, the meta set is put aside all the same, or trained on
            where ``train_on_meta`` or ``train_on_meta_alone`` says so.
        tells_trusted: Whether the meta module tells trusted rows from others, so that ``train_on_meta`` is for it, too.

    Returns:
        The task. Its training labels may be wrong, those of all other sets are the trusted ones.

    Raises:
        ValueError: If data, settings and model do not fit each other.
    """
    if with_meta:
        arguments.check_meta_set()
    data = load_image_data(arguments, seed)
    processor: BaseImageProcessor | None = None
    if model.model_name_or_path is None:
        config: PreTrainedConfig = _make_config(arguments, data)
        read: ReadPixels = ResizedPixels(config.image_size, config.num_channels, config.image_mean, config.image_std)
    else:
        config, processor = pretrained_config(model, data.classes), _load_processor(model)
        read = ProcessedPixels(processor)
    config.problem_type = "single_label_classification"
    parts = partial(arguments.training_parts, with_meta=with_meta, tells_trusted=tells_trusted)
    train = concatenate_datasets(parts(data.train, data.meta))
    record = concatenate_datasets(parts(data.train_record, data.meta_record))
    num_trusted = len(train) - len(data.train) if with_meta else 0
    if num_trusted:
        train, record = mark_trusted(train, num_trusted), data.train_record
    transform = ImageTransform(
        read, arguments.rotate_train_degrees, arguments.random_crop_padding, arguments.random_flip
    )

    def target(rows: Dataset | None) -> Dataset | None:
        return None if rows is None else rows.with_transform(ImageTransform(read, arguments.rotate_target_degrees))

    return Task(
        model_init=partial(make_model, AutoModelForImageClassification, model, config, seed),
        processing_class=processor,
        train_dataset=train.with_transform(transform),
        meta_dataset=target(data.meta) if with_meta else None,
        eval_dataset=target(data.validation),
        test_dataset=target(data.test),
        data_collator=default_data_collator,
        compute_metrics=classification_scores,
        main_metric="accuracy",
        pipeline_tag="image-classification",
        baseline=arguments.baseline,
        num_trusted=num_trusted,
        training_labels=label_record(record, data.classes),
    )


def _make_config(arguments: ImageClassificationArguments, data: ImageData) -> ImageClassifierConfig:
    """Config of a model that is trained from scratch on images like the first one of the files."""
    first = decode(data.first_image, "The first image")
    num_channels = 1 if first.mode in GREY_MODES else 3
    for name in ("image_mean", "image_std"):
        if len(getattr(arguments, name)) not in (1, num_channels):
            raise ValueError(f"{name} has {len(getattr(arguments, name))} channels, but images have {num_channels}.")
    size = arguments.image_size or min(first.size)
    if arguments.random_crop_padding >= size:
        raise ValueError(
            f"random_crop_padding={arguments.random_crop_padding} must be less than the {size} pixels of an image."
        )
    try:
        return CONFIGS[arguments.image_model](
            image_size=size,
            num_channels=num_channels,
            image_mean=arguments.image_mean,
            image_std=arguments.image_std,
            **class_maps(data.classes),
        )
    except ValueError as error:
        if arguments.image_size is not None:
            raise
        raise ValueError(f"{error} That is the size of the first image: image_size sets another.") from error


def _load_processor(model: ModelArguments) -> BaseImageProcessor:
    name = str(model.model_name_or_path)
    try:
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(
            name, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"No image processor can be loaded from {name!r}: {error}") from error
    return processor
