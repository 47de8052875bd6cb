"""Few-shot learning that starts from the model of an earlier run."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.few_shot import build_few_shot_task
from meta_trainer.tasks.few_shot.build import make_relation_net
from meta_trainer.tasks.few_shot.relation_net import RelationNet, RelationNetConfig
from meta_trainer.tasks.image_classification.lenet import LeNet, LeNetConfig

REFUSED = "few-shot training starts from a model that an earlier run of task='few_shot' has saved, or from none"


def config(**changes):
    settings = {"backbone_width": 2, "stem": "small", "image_size": 8, "n_way": 3, "k_shot": 2, "num_train_classes": 7}
    return RelationNetConfig(**(settings | changes))


@pytest.fixture
def saved(tmp_path):
    """Save a model whose weights and running statistics are no fresh ones; returns it and its folder."""

    def save(**changes):
        model = make_relation_net(config(**changes), seed=9).train()
        sizes = model.config
        model(torch.randn(2, sizes.n_way * sizes.k_shot + 2, 3, sizes.image_size, sizes.image_size))
        model.save_pretrained(tmp_path / "saved")
        return model, str(tmp_path / "saved")

    return save


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_way": 2, "k_shot": 1},
        {"num_train_classes": 11},
        {"num_train_classes": 0},
        {"fixed_transform": True},
    ],
    ids=str,
)
def test_all_but_the_auxiliary_classifier_is_that_of_the_saved_model(saved, changes):
    model, folder = saved(**changes)
    state = torch.get_rng_state()
    fresh, started = make_relation_net(config(), seed=4), make_relation_net(config(), seed=4, warm_start=folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name for name, _ in started.named_children()} == {"resnet", "relation_module", "auxiliary_classifier"}
    assert_same(started.resnet, model.resnet)
    assert_same(started.relation_module, model.relation_module)
    assert_same(started.auxiliary_classifier, fresh.auxiliary_classifier)
    for running_mean in (
        started.resnet.embedder.embedder.normalization.running_mean,
        started.relation_module.first[0].running_mean,
    ):
        assert not torch.equal(running_mean, torch.zeros_like(running_mean))
    assert started.config.to_dict() == fresh.config.to_dict()


def test_a_task_builds_its_models_from_the_folder_that_the_settings_name(arguments, saved):
    model, folder = saved(num_train_classes=5)
    build = {"seed": 1, "with_meta": True, "sampling": "sequential"}
    task = build_few_shot_task(arguments(), ModelArguments(model_name_or_path=folder), **build)
    fresh = build_few_shot_task(arguments(), ModelArguments(), **build).model_init()
    for started in (task.model_init(), task.model_init()):
        assert_same(started.resnet, model.resnet)
        assert_same(started.relation_module, model.relation_module)
        assert_same(started.auxiliary_classifier, fresh.auxiliary_classifier)


@pytest.mark.parametrize(
    ("size", "other", "shown"),
    [
        ("backbone", "resnet34", "'resnet34'"),
        ("backbone_width", 4, "4"),
        ("stem", "small_pooled", "'small_pooled'"),
        ("image_size", 16, "16"),
    ],
)
def test_other_sizes_are_refused_by_the_setting_that_differs(saved, size, other, shown):
    _, folder = saved(**{size: other})
    own = repr(getattr(config(), size))
    message = f"'{folder}' has {size}={shown}, but this run has {own}: set {size} to that of the model to start from"
    with pytest.raises(ValueError, match=message):
        make_relation_net(config(), seed=1, warm_start=folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    folder = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"model_name_or_path='{folder}': {REFUSED}"):
        make_relation_net(config(), seed=1, warm_start=folder)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (lambda: LeNet(LeNetConfig(id2label={0: "a", 1: "b"})), "meta_trainer_lenet"),
        (
            lambda: BertModel(BertConfig(
                vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
            )),
            "bert",
        ),
    ],
    ids=["LeNet", "BERT"],
)  # fmt: skip
def test_another_kind_of_model_is_refused_by_its_name(tmp_path, other, kind):
    other().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{REFUSED}: it is a '{kind}', not a 'relation_net'"):
        make_relation_net(config(), seed=1, warm_start=str(tmp_path))


@pytest.mark.parametrize("content", [None, b"no weights"], ids=["missing", "damaged"])
def test_weights_that_are_missing_or_damaged_are_refused(saved, tmp_path, content):
    _, folder = saved()
    weights = tmp_path / "saved" / "model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"model_name_or_path='{folder}': {REFUSED}"):
        make_relation_net(config(), seed=1, warm_start=folder)


def test_what_starts_from_a_saved_model_can_be_saved_and_loaded_itself(saved, tmp_path):
    _, folder = saved(n_way=2)
    started = make_relation_net(config(), seed=1, warm_start=folder)
    started.save_pretrained(tmp_path / "next")
    assert_same(RelationNet.from_pretrained(tmp_path / "next"), started)


def test_a_file_that_lacks_weights_is_refused_and_not_filled_with_new_ones(saved, tmp_path):
    model, folder = saved()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if "stages.2" not in name}
    save_file(weights, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{REFUSED}: it lacks \d+ weights, resnet\.encoder\.stages\.2"):
        make_relation_net(config(), seed=1, warm_start=folder)
