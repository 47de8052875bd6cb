"""A checkpoint that is not complete is never resumed from."""

import hashlib
import json
import shutil

import pytest
import torch
from tiny import HiddenShift, meta_trainer, same, snapshot, tiny_bert, weight_net

from meta_trainer import MetaTrainer, MetaWeightNet
from meta_trainer.checkpoint import MANIFEST_NAME, defect, newest_complete

SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
FILES = [
    "model.safetensors",
    "meta_module/model.safetensors",
    "meta_module/config.json",
    "meta_state.pt",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    MANIFEST_NAME,
]


def trainer_in(folder, module=None, **settings):
    return meta_trainer(folder, module or weight_net(seed=4), tiny_bert(seed=4), **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a checkpoint after each of three steps, and what it ended in."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_in(folder)
    trainer.train()
    return folder, trainer


@pytest.fixture
def folder(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_manifest_lists_every_file_with_its_size_and_hash(folder):
    checkpoint = folder / "checkpoint-3"
    listed = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    files = {f.relative_to(checkpoint).as_posix(): f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()}
    del files[MANIFEST_NAME], files["meta_module/README.md"]
    assert listed == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert defect(checkpoint) is None


@pytest.mark.parametrize("damage", [halve, flip, lambda file: file.unlink()], ids=["halved", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found(folder, name, damage):
    damage(folder / "checkpoint-3" / name)
    assert name in defect(folder / "checkpoint-3") or name == MANIFEST_NAME
    assert newest_complete(folder) == folder / "checkpoint-2"


def test_a_checkpoint_that_trainer_calls_incomplete_is_not_complete(folder):
    (folder / "checkpoint-3/checkpoint-is-incomplete.txt").touch()
    assert "checkpoint-is-incomplete.txt" in defect(folder / "checkpoint-3")


def test_what_others_add_and_edit_does_no_harm(folder):
    (folder / "checkpoint-3/notes.txt").touch()
    (folder / "checkpoint-3/README.md").touch()
    assert defect(folder / "checkpoint-3") is None


def test_a_run_resumes_from_the_newest_complete_checkpoint_and_says_what_it_passed_over(run, folder, caplog):
    halve(folder / "checkpoint-3/optimizer.pt")
    (folder / "checkpoint-2/trainer_state.json").unlink()
    resumed = meta_trainer(folder, weight_net(seed=7), tiny_bert(seed=7), **SETTINGS)
    with caplog.at_level("WARNING", logger="meta_trainer"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is incomplete and passed over: optimizer.pt has" in caplog.text
    assert "checkpoint-2 is incomplete and passed over: trainer_state.json is missing" in caplog.text
    assert same(snapshot(resumed.model), snapshot(run[1].model))
    assert same(snapshot(resumed.meta_module), snapshot(run[1].meta_module))
    # What was incomplete has been written anew.
    assert defect(folder / "checkpoint-3") is None


def test_an_incomplete_checkpoint_that_is_named_is_refused_before_anything_is_loaded(folder):
    halve(folder / "checkpoint-3/meta_state.pt")
    trainer = trainer_in(folder)
    theta, lam = snapshot(trainer.model), snapshot(trainer.meta_module)
    with pytest.raises(ValueError, match=r"checkpoint-3 is incomplete or was changed: meta_state\.pt has \d+ bytes"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert same(snapshot(trainer.model), theta)
    assert same(snapshot(trainer.meta_module), lam)


def test_a_folder_without_a_complete_checkpoint_is_refused_with_all_reasons(folder):
    for step in (1, 2, 3):
        (folder / f"checkpoint-{step}/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No checkpoint in .* is complete \(checkpoint-3: model\.safetensors is"):
        trainer_in(folder).train(resume_from_checkpoint=True)


def test_a_folder_without_any_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"There is no checkpoint .*checkpoint-9"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_without_a_manifest_a_checkpoint_has_to_be_named(folder, caplog):
    for step in (2, 3):
        (folder / f"checkpoint-{step}" / MANIFEST_NAME).unlink()
    assert newest_complete(folder) == folder / "checkpoint-1"
    assert newest_complete(folder, with_manifest=False) == folder / "checkpoint-3"
    with caplog.at_level("WARNING", logger="meta_trainer"):
        trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "checkpoint-2 cannot be checked: it has no meta_manifest.json" in caplog.text


class Killed(BaseException):
    """Stands for the end of the process."""


class KilledWhileSaving(MetaTrainer):
    """Is killed before the states of step `killed_at` are written."""

    killed_at = 0

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == self.killed_at:
            raise Killed
        super()._save_optimizer_and_scheduler(output_dir)


def test_a_checkpoint_counts_as_incomplete_from_the_moment_it_is_written_anew(folder):
    trainer = meta_trainer(folder, kind=KilledWhileSaving, **SETTINGS)
    trainer.killed_at = 3
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert defect(folder / "checkpoint-3") == "trainer_state.json is missing"
    assert newest_complete(folder) == folder / "checkpoint-2"


def test_rotation_keeps_the_newest_complete_checkpoint(folder, caplog):
    # Without reliable clock times, rotation takes the half-written 9 for the newest.
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    (folder / "checkpoint-9/trainer_state.json").unlink()
    trainer = trainer_in(folder, max_steps=4, save_total_limit=1)
    with caplog.at_level("WARNING", logger="meta_trainer"):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-9 is incomplete and deleted, as there is a `save_total_limit`" in caplog.text
    assert newest_complete(folder) == folder / "checkpoint-4"


def test_models_alone_are_complete_checkpoints_too(tmp_path):
    trainer_in(tmp_path, save_only_model=True).train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"
    listed = json.loads((tmp_path / "checkpoint-3" / MANIFEST_NAME).read_text())["files"]
    assert {"model.safetensors", "meta_module/model.safetensors", "trainer_state.json"} <= listed.keys()
    halve(tmp_path / "checkpoint-3/model.safetensors")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


class Bomb:
    """Unpickled without care, it writes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["meta_state.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_state_file_is_never_run(folder, tmp_path, name):
    torch.save({"optimizer": Bomb(tmp_path / "bang"), "cpu": 1}, folder / "checkpoint-2" / name)
    # As an attacker would, who can write a manifest as well.
    (folder / "checkpoint-2" / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2.* cannot be resumed from: .*Weights only load failed"):
        trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert not (tmp_path / "bang").exists()
    assert newest_complete(folder) == folder / "checkpoint-3"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "meta_module/model.safetensors", "meta_state.pt", "optimizer.pt"]
)
def test_a_halved_file_that_no_manifest_knows_ends_in_one_error(folder, name):
    halve(folder / "checkpoint-2" / name)
    (folder / "checkpoint-2" / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2.*(cannot be resumed from|does not fit)"):
        trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert defect(folder / "checkpoint-1") is None


def test_states_that_are_not_finite_are_refused(folder):
    file = folder / "checkpoint-2/meta_state.pt"
    state = torch.load(file, weights_only=True)
    state["optimizer"]["state"][1]["exp_avg"][0] = float("nan")
    torch.save(state, file)
    (folder / "checkpoint-2" / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=r"state of its optimizer in .*checkpoint-2 is not finite"):
        trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_states_of_another_meta_module_are_refused(folder, tmp_path):
    for step, other, error in (
        (1, HiddenShift(), "it is of 1 parameters, this one has 4"),
        (2, MetaWeightNet(hidden_size=5), r"it has states of the shapes .* for a parameter of the shape \[4, 1\]"),
    ):
        trainer_in(tmp_path / str(step), other, max_steps=1).train()
        checkpoint = folder / f"checkpoint-{step}"
        shutil.copy(tmp_path / f"{step}/checkpoint-1/meta_state.pt", checkpoint)
        (checkpoint / MANIFEST_NAME).unlink()
        with pytest.raises(ValueError, match=rf"meta_state\.pt belongs to another meta module: {error}"):
            trainer_in(folder).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="does not fit this HiddenShift"):
        trainer_in(folder, HiddenShift()).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_meta_steps", -1, "num_meta_steps should be a whole number, got -1"),
        ("num_meta_steps", None, "num_meta_steps should be a whole number, got None"),
        ("meta_batches_read", "7", "meta_batches_read should be a whole number, got '7'"),
        ("scheduler", None, "cannot be resumed from"),
    ],
)
def test_a_meta_state_with_other_values_than_a_run_writes_is_refused(folder, name, value, message):
    file = folder / "checkpoint-2/meta_state.pt"
    torch.save({**torch.load(file, weights_only=True), name: value}, file)
    (folder / "checkpoint-2" / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=message):
        trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_an_empty_state_of_trainer_is_none(folder):
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert defect(folder / "checkpoint-2") == "trainer_state.json is not one that a run writes"


@pytest.mark.parametrize("settings", [{"meta_optim": "sgd"}, {"optim": "sgd"}, {"meta_optim": "adafactor"}])
def test_states_of_another_kind_of_optimizer_are_refused(folder, settings):
    with pytest.raises(ValueError, match="checkpoint-3 was saved with another optimizer: that state has no "):
        trainer_in(folder, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("checkpoint", [5, ["checkpoint-1"], b"checkpoint-1"])
def test_a_checkpoint_is_named_by_a_path(folder, checkpoint):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` should be a folder, True or False, got "):
        trainer_in(folder).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("settings", [{"meta_optim": "schedule_free_adamw"}, {"optim": "adagrad"}])
def test_states_of_the_same_kind_of_optimizer_are_taken(tmp_path, settings):
    trainer_in(tmp_path, **settings).train()
    trainer_in(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=True)
