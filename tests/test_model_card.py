"""The model card's words on loading a model, done as they say."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from meta_trainer.model_card import add_loading_section
from meta_trainer.tasks.few_shot.relation_net import RelationNet, RelationNetConfig
from meta_trainer.tasks.image_classification.cifar_resnet import CifarResNet, CifarResNetConfig
from meta_trainer.tasks.image_classification.lenet import LeNet, LeNetConfig

CARD = "---\nlibrary_name: transformers\ntags:\n- mine\n---\n\n# a run\n\nText of Trainer.\n"


def of_this_package() -> list[PreTrainedModel]:
    names = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
    return [
        LeNet(LeNetConfig(image_size=16, **names)),
        CifarResNet(CifarResNetConfig(blocks_per_stage=1, **names)),
        RelationNet(RelationNetConfig(backbone_width=2, stem="small", image_size=8)),
    ]


def card_of(model: nn.Module, folder: Path) -> str:
    file = folder / "README.md"
    file.write_text(CARD)
    add_loading_section(file, model)
    return file.read_text()


@pytest.mark.parametrize("model", of_this_package(), ids=lambda model: type(model).__name__)
def test_the_code_in_the_card_loads_the_model(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    card = card_of(model, tmp_path)
    assert card.startswith(CARD.rstrip())
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(code, found)
    loaded = found["model"]
    assert type(loaded) is type(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_class_that_wraps_the_model_is_not_the_one_that_loads_it(tmp_path):
    class Wrapped(LeNet):
        """As sharding makes them."""

    assert "\nmodel = LeNet.from_pretrained" in card_of(Wrapped(LeNetConfig()), tmp_path)


def test_models_that_transformers_knows_keep_their_card(tmp_path):
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert card_of(BertModel(BertConfig(intermediate_size=8, **sizes)), tmp_path) == CARD
