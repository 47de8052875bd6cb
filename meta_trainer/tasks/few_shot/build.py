"""Cross-domain few-shot classification as a task."""

from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from meta_trainer.tasks.few_shot.arguments import FewShotArguments
from meta_trainer.tasks.few_shot.episodes import Episode, EpisodeCollator
from meta_trainer.tasks.few_shot.images import load_domain
from meta_trainer.tasks.few_shot.metrics import episode_scores
from meta_trainer.tasks.few_shot.relation_net import RelationNet, RelationNetConfig
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.task import Task

IN_ORDER = "sequential"


def build_few_shot_task(
    arguments: FewShotArguments, model: ModelArguments, *, seed: int, with_meta: bool, sampling: str
) -> Task:
    """Load and decode all domains, and put together what a run needs.

    Args:
        arguments: Domains, episodes and model.
        model: For ``model_name_or_path``, a model of this task that training starts from.
        seed: Seed of the weights and of the episodes.
        with_meta: Whether a meta module is trained. If not, train batches hold no meta batch, and are the same.
        sampling: In which order Trainer takes the training rows.

    Returns:
        The task. Rows are numbers of episodes, which the collator draws; there is no validation set.

    Raises:
        ValueError: If data and settings do not fit each other.
    """
    if sampling != IN_ORDER:
        raise ValueError(
            f"train_sampling_strategy should be {IN_ORDER!r}, got {sampling!r}: domains and the weight of the "
            "auxiliary loss change with the number of the episode."
        )
    collator = EpisodeCollator(
        arguments, {name: load_domain(arguments, name) for name in arguments.places}, seed, carry_meta=with_meta
    )
    config = RelationNetConfig(
        backbone=arguments.backbone,
        backbone_width=arguments.backbone_width,
        stem=arguments.stem,
        image_size=arguments.image_size,
        n_way=arguments.n_way,
        k_shot=arguments.k_shot,
        num_train_classes=collator.num_classes if arguments.auxiliary_weight else 0,
        fixed_transform=arguments.fixed_transform,
    )
    return Task(
        model_init=partial(make_relation_net, config, seed, model.model_name_or_path),
        processing_class=None,
        # Trainer takes any sequence of rows.
        train_dataset=[Episode(number) for number in range(arguments.num_train_episodes)],
        meta_dataset=None,
        eval_dataset=None,
        test_dataset=[Episode(number, is_test=True) for number in range(arguments.num_test_episodes)],
        data_collator=collator,
        compute_metrics=episode_scores,
        main_metric="accuracy",
        pipeline_tag="image-classification",
        baseline="hand-tuned transformation" if arguments.fixed_transform else "plain training",
    )


def make_relation_net(config: RelationNetConfig, seed: int, warm_start: str | None = None) -> RelationNet:
    """Build the model; its new weights depend on ``seed``, not on the global generator.

    Args:
        config: Its sizes.
        seed: Of the new weights.
        warm_start: Folder or Hub name of a :class:`RelationNet` whose backbone and relation module are taken over,
            whatever episodes it was trained on. The auxiliary classifier starts anew: its classes are those of one
            run's training domains. None: all weights are new.

    Raises:
        ValueError: If there is no such model, or it has other sizes.
    """
    # Named devices: with several of them, fork_rng would warn that it saves them all.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = RelationNet(config)
        if warm_start is not None:
            found = _load(warm_start, config)
            model.resnet.load_state_dict(found.resnet.state_dict())
            model.relation_module.load_state_dict(found.relation_module.state_dict())
    return model


def _load(name: str, config: RelationNetConfig) -> RelationNet:
    """The model to start from, checked."""
    try:
        found = RelationNetConfig.from_pretrained(name)
        if found.model_type != config.model_type:
            raise ValueError(f"it is a {found.model_type!r}, not a {config.model_type!r}")
        loaded: Any = RelationNet.from_pretrained(name, config=found, output_loading_info=True)
        model: RelationNet = loaded[0]
        if missing := loaded[1]["missing_keys"]:
            raise ValueError(f"it lacks {len(missing)} weights, {min(missing)} among them")
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"model_name_or_path={name!r}: few-shot training starts from a model that an earlier run of "
            f"task='few_shot' has saved, or from none: {error}"
        ) from error
    for size in ("backbone", "backbone_width", "stem", "image_size"):
        if getattr(found, size) != getattr(config, size):
            raise ValueError(
                f"model_name_or_path={name!r} has {size}={getattr(found, size)!r}, but this run has "
                f"{getattr(config, size)!r}: set {size} to that of the model to start from."
            )
    return model
