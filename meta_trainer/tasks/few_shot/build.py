"""Cross-domain few-shot classification as a task."""

from functools import partial

import torch

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
        model: Not for this task: a pretrained text encoder is refused.
        seed: Seed of the weights and of the episodes.
        with_meta: Whether a meta module is trained. If not, train batches hold no meta batch, and are the same.
        sampling: In which order Trainer takes the training rows.

    Returns:
        The task. Rows are numbers of episodes, which the collator draws; there is no validation set.

    Raises:
        ValueError: If data and settings do not fit each other.
    """
    if model.model_name_or_path is not None:
        raise ValueError(
            f"model_name_or_path={model.model_name_or_path!r}: task='few_shot' trains its backbone from scratch. "
            "Choose it by `backbone`."
        )
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
        model_init=partial(make_relation_net, config, seed),
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


def make_relation_net(config: RelationNetConfig, seed: int) -> RelationNet:
    """Build the model; its weights depend on ``seed``, not on the global generator."""
    # Named devices: with several of them, fork_rng would warn that it saves them all.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return RelationNet(config)
