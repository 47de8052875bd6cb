"""RelationNet: the score of a pair, the two losses, and which statistics normalize."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import EvalPrediction

from meta_trainer.scope import select_parameters
from meta_trainer.tasks.few_shot.build import make_relation_net
from meta_trainer.tasks.few_shot.metrics import episode_scores
from meta_trainer.tasks.few_shot.relation_net import RelationModule, RelationNet, RelationNetConfig


def config(**changes):
    settings = {"backbone_width": 2, "stem": "small", "image_size": 8, "n_way": 3, "k_shot": 2, "num_train_classes": 7}
    return RelationNetConfig(**(settings | changes))


def batch(size=8, episodes=2, queries=4):
    return {
        "pixel_values": torch.randn(episodes, 6 + queries, 3, size, size),
        "labels": torch.randint(0, 3, (episodes, queries)),
    }


def test_a_pair_is_scored_as_by_a_convolution_over_both_maps_side_by_side():
    module = RelationModule(channels=3, size=5).double().eval()
    classes, queries = torch.randn(2, 4, 3, 5, 5).double(), torch.randn(2, 6, 3, 5, 5).double()
    joint_weight = torch.cat([module.of_class.weight, module.of_query.weight], dim=1)
    scores = module(classes, queries)
    assert scores.shape == (2, 6, 4)
    for episode, query, way in ((0, 0, 0), (1, 5, 3), (1, 2, 0)):
        pair = torch.cat([classes[episode, way], queries[episode, query]])[None]
        hidden = module.second(module.first(F.conv2d(pair, joint_weight, padding=1)))
        assert_close(scores[episode, query, way], module.score(hidden)[0, 0])


@pytest.mark.parametrize("stem", ["imagenet", "small", "small_pooled"])
@pytest.mark.parametrize("size", [8, 20, 33])
def test_the_sizes_of_the_features_are_those_that_the_relation_module_expects(stem, size):
    model = RelationNet(config(stem=stem, image_size=size)).eval()
    with torch.no_grad():
        features = model.resnet(torch.randn(1, 3, size, size)).last_hidden_state
        assert model(**batch(size)).logits.shape == (2, 4, 3)
    assert features.shape[1:] == (16, model.config.feature_size, model.config.feature_size)


@pytest.mark.parametrize(("backbone", "blocks"), [("resnet10", 4), ("resnet34", 16)])
def test_backbones_have_the_papers_depth(backbone, blocks):
    model = RelationNet(config(backbone=backbone))
    convolutions = [m for m in model.resnet.encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 2 * blocks


def test_the_loss_is_the_cross_entropy_of_the_scores_and_of_the_auxiliary_classes():
    model, inputs = RelationNet(config()).double().eval(), batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    class_ids, weight = torch.randint(0, 7, (2, 10)), torch.tensor([0.5, 2.0]).double()
    plain, joint = model(**inputs), model(**inputs, class_ids=class_ids, auxiliary_weight=weight)
    chosen = torch.log_softmax(plain.logits, -1).gather(-1, inputs["labels"][..., None])
    assert_close(plain.loss, -chosen.mean())
    features = model.resnet(inputs["pixel_values"].flatten(0, 1)).last_hidden_state.mean(dim=(2, 3)).view(2, 10, -1)
    auxiliary = -torch.log_softmax(model.auxiliary_classifier(features), -1).gather(-1, class_ids[..., None])
    assert_close(joint.loss, plain.loss + (0.5 * auxiliary[0].mean() + 2 * auxiliary[1].mean()) / 2)
    assert model(inputs["pixel_values"]).loss is None


def test_a_class_is_the_mean_of_its_support_images_in_any_order():
    model, inputs = RelationNet(config()).double().eval(), batch()
    pixels = inputs["pixel_values"].double()
    order = [1, 0, 3, 2, 5, 4, *range(6, 10)]
    assert_close(model(pixels[:, order]).logits, model(pixels).logits)
    swapped = [2, 3, 0, 1, 4, 5, *range(6, 10)]
    assert_close(model(pixels[:, swapped]).logits, model(pixels).logits[..., [1, 0, 2]])


def test_running_statistics_normalize_where_the_batch_asks_for_it_and_stay_as_they_are():
    model, inputs = RelationNet(config()).train(), batch()
    for _ in range(3):
        model(**inputs)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    asked = model(**inputs, use_running_statistics=True)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert_close(asked.logits, model.eval()(**inputs).logits)
    assert not torch.allclose(asked.logits, model.train()(**inputs).logits)


def test_the_fixed_transformation_acts_in_training_only_and_does_not_learn():
    model, inputs = RelationNet(config(fixed_transform=True)).train(), batch()
    assert not torch.allclose(model(**inputs).logits, model(**inputs).logits)
    assert not any("fixed_transform" in name for name, p in model.named_parameters() if p.requires_grad)
    assert_close(
        model(**inputs, use_running_statistics=True).logits, model(**inputs, use_running_statistics=True).logits
    )
    model.eval()
    assert_close(model(**inputs).logits, model(**inputs).logits)
    torch.manual_seed(0)
    plain = RelationNet(config())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "fixed_transform" not in k})
    assert_close(plain.eval()(**inputs).logits, model(**inputs).logits)


def test_saving_and_loading_gives_the_same_model(tmp_path):
    model, inputs = RelationNet(config(fixed_transform=True, stem="small_pooled")).train(), batch()
    model(**inputs)
    model.eval().save_pretrained(tmp_path)
    loaded = RelationNet.from_pretrained(tmp_path).eval()
    assert loaded.config.backbone_width == 2
    assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (make_relation_net(config(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.relation_module.of_class.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_papers_scope_is_all_but_the_auxiliary_classifier():
    model = RelationNet(config())
    scope = {id(p) for p in select_parameters(model, ["resnet", "relation_module"])}
    assert {name for name, p in model.named_parameters() if id(p) not in scope} == {
        "auxiliary_classifier.weight", "auxiliary_classifier.bias",
    }  # fmt: skip


def test_the_score_of_a_test_is_the_mean_over_episodes_with_its_interval():
    labels = np.array([[0, 1], [0, 1], [1, 0]])
    predicted = np.array([[0, 1], [0, 0], [0, 1]])  # accuracies 1, 1/2 and 0
    scores = episode_scores(EvalPrediction(predictions=np.eye(2)[predicted], label_ids=labels))
    assert scores["accuracy"] == pytest.approx(0.5)
    assert scores["accuracy_interval"] == pytest.approx(1.96 * (1 / 6) ** 0.5 / 3**0.5)
