"""`hub_strategy`: whatever is uploaded, the meta module is in it."""

from types import SimpleNamespace

import pytest
import transformers.trainer
from fake_hub import META_FILES, Hub
from tiny import meta_trainer

CHECKPOINT_FILES = {*META_FILES, "meta_state.pt", "model.safetensors", "optimizer.pt"}


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: hub)
    done = SimpleNamespace(is_done=lambda: True, wait_until_done=lambda: None)
    monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda jobs: done)
    return hub


def uploads_of(hub, folder, **settings):
    trainer = meta_trainer(
        folder, save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="somebody/tiny", **settings
    )
    trainer.train()
    during = list(hub.uploads)
    trainer.push_to_hub()
    (*_, (path, files)) = hub.uploads
    # The last push of all holds the model, its card and the meta module, whatever the strategy.
    assert path == ""
    assert files >= {*META_FILES, "model.safetensors", "README.md"}
    assert not any(file.startswith("checkpoint-") for file in files)
    return during


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", []),
        ("every_save", ["", ""]),
        ("checkpoint", ["", "last-checkpoint", "", "last-checkpoint"]),
        ("all_checkpoints", ["", "checkpoint-2", "", "checkpoint-4"]),
    ],
)
def test_every_upload_has_the_meta_module(tmp_path, hub, strategy, folders, save_only_model):
    during = uploads_of(hub, tmp_path, hub_strategy=strategy, save_only_model=save_only_model)
    assert [path for path, _ in during] == folders
    for path, files in during:
        assert files >= META_FILES | {"model.safetensors"}
        # Without the optimizers' states, that of the meta optimizer is left out, too.
        assert (files >= CHECKPOINT_FILES) == (path != "" and not save_only_model)
        assert ("meta_state.pt" in files) == (path != "" and not save_only_model)
