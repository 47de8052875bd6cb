"""What a run leaves on disk and on the Hub."""

import json
from types import SimpleNamespace

import pytest
import transformers.trainer
from fake_hub import META_FILES, Hub, files
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import HiddenShift, IdentityModule, meta_trainer, same, sentences, snapshot, weight_net

from meta_trainer import MetaModuleList, MetaWeightNet


def test_save_model_writes_the_meta_module_beside_the_model(tmp_path):
    trainer = meta_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    assert files(tmp_path) >= META_FILES
    config = json.loads((tmp_path / "meta_module/config.json").read_text())
    assert config == {"meta_module": "MetaWeightNet", "hidden_size": 4, "loss_input": "shared", "num_classes": None}
    loaded = MetaWeightNet.from_pretrained(tmp_path / "meta_module")
    assert same(snapshot(loaded), snapshot(trainer.meta_module))
    assert loaded.to_config() == trainer.meta_module.to_config()


def test_save_model_takes_another_folder(tmp_path):
    trainer = meta_trainer(tmp_path / "run", [weight_net(), IdentityModule()])
    trainer.save_model(str(tmp_path / "elsewhere"))
    loaded = MetaModuleList.from_pretrained(tmp_path / "elsewhere/meta_module")
    assert same(snapshot(loaded), snapshot(trainer.meta_module))
    assert not META_FILES & files(tmp_path / "run")


def test_a_checkpoint_keeps_the_meta_module_apart_from_the_model(tmp_path):
    trainer = meta_trainer(tmp_path, HiddenShift(), save_strategy="steps", save_steps=4)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert files(checkpoint) >= {*META_FILES, "meta_state.pt", "model.safetensors", "optimizer.pt"}
    assert set(load_file(checkpoint / "model.safetensors")) == set(trainer.model.state_dict())
    assert same(load_file(checkpoint / "meta_module/model.safetensors"), snapshot(trainer.meta_module))


def test_save_only_model_keeps_the_meta_module_without_the_state_of_its_optimizer(tmp_path):
    meta_trainer(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True).train()
    assert files(tmp_path / "checkpoint-4") >= META_FILES
    assert "meta_state.pt" not in files(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("times", [1, 2])
def test_the_model_card_tells_of_the_meta_module_once(tmp_path, times):
    trainer = meta_trainer(tmp_path, sigma=0.0625)
    trainer.train()
    for _ in range(times):
        trainer.create_model_card(model_name="tiny", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## Meta-learning") == 1
    assert "**MetaWeightNet** (13 parameters)" in card.text
    assert "| `sigma` | 0.0625 |" in card.text
    assert 'MetaWeightNet.from_pretrained("meta_module")' in card.text
    assert "## Training procedure" in card.text.replace("###", "##")
    assert {"meta-learning", "meta-trainer", "mine"} <= set(card.data.tags)
    assert len(card.data.tags) == len(set(card.data.tags))


def test_the_model_card_of_several_meta_modules_names_each_and_its_own_estimator_alone(tmp_path):
    trainer = meta_trainer(tmp_path, [weight_net(), HiddenShift()], hypergradient="t1t2")
    tmp_path.mkdir(exist_ok=True)
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "README.md").read_text()
    assert "**MetaWeightNet and a HiddenShift** (21 parameters)" in text
    assert "| `hypergradient` | t1t2 |" in text
    assert "`sigma`" not in text


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: hub)
    return hub


def test_pushing_uploads_the_meta_module_and_the_card(tmp_path, hub):
    trainer = meta_trainer(tmp_path, hub_model_id="somebody/tiny")
    trainer.train()
    trainer.push_to_hub()
    ((folder, uploaded),) = hub.uploads
    assert folder == ""
    assert uploaded >= {*META_FILES, "model.safetensors", "README.md"}
    assert "## Meta-learning" in (tmp_path / "README.md").read_text()


def test_pushing_at_every_save_uploads_the_meta_module_of_the_checkpoint(tmp_path, hub, monkeypatch):
    seen = []
    upload = hub.upload_folder

    def upload_folder(**kwargs):
        weights = load_file(tmp_path / "meta_module/model.safetensors")
        # What was loaded is mapped to the file, which is written again at the next save.
        seen.append({name: weight.clone() for name, weight in weights.items()})
        return upload(**kwargs)

    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    done = SimpleNamespace(is_done=lambda: True, wait_until_done=lambda: None)
    monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda jobs: done)
    trainer = meta_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_strategy="every_save",
        hub_model_id="somebody/tiny",
        keywords={"train_dataset": sentences(24, 1)},
    )
    trainer.train()
    pushes = [uploaded for folder, uploaded in hub.uploads if folder == ""]
    assert len(pushes) >= 2
    assert all(uploaded >= META_FILES for uploaded in pushes)
    assert not any(name.startswith("checkpoint-") for name in pushes[0])
    for step, weights in ((2, seen[0]), (4, seen[1])):
        assert same(weights, load_file(tmp_path / f"checkpoint-{step}/meta_module/model.safetensors"))
