"""The three doors, their composition, and the round trip through a folder."""

import json
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from meta_trainer.modules import MetaModule, MetaModuleList, MetaWeightNet, RepresentationTransform

FILES = {"README.md", "config.json", "model.safetensors"}


class AddToBatch(MetaModule):
    """Scales and shifts the input, and leaves word in `log` when it is attached."""

    batch_columns = ("shift",)

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.offset = nn.Parameter(torch.tensor([factor]))
        self.log = []

    def transform_batch(self, batch):
        return {**batch, "x": batch["x"] * self.factor + self.offset}

    @contextmanager
    def attach(self, model, batch):
        self.log.append(f"open {self.factor}")
        yield
        self.log.append(f"close {self.factor}")

    def check_model(self, model):
        self.log.append("check")


class SumLosses(MetaModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def reduce(self, losses, batch, outputs):
        return self.scale * losses.sum()


MODULES = {
    "weight_net": lambda: MetaWeightNet(hidden_size=5, loss_input="candidate"),
    "representation_transform": lambda: RepresentationTransform(6, bottleneck_size=3, layers=["encoder.layer.1", -1]),
    "list": lambda: MetaModuleList([AddToBatch(3.0), MetaWeightNet(hidden_size=4), AddToBatch(factor=0.5)]),
    "one_of_ones_own": lambda: AddToBatch(factor=4.0),
}


def saved(module, folder):
    module.save_pretrained(folder)
    return folder


def assert_same_parameters(left, right):
    assert left.state_dict().keys() == right.state_dict().keys()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), right.state_dict()[name].view(torch.uint8)), name


# ------------------------------------------------------------------------------------------------------ doors


def test_every_door_is_the_identity_by_default():
    module, model, batch = MetaModule(), nn.Linear(2, 2), {"x": torch.ones(3, 2), "labels": torch.zeros(3)}

    assert module.transform_batch(batch) is batch
    with module.attach(model, batch):
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    assert module.reduce(torch.tensor([1.0, 2.0, 6.0]), batch, None) == 3
    assert not module.has_loss_door
    assert module.batch_columns == ()
    assert module.reference_losses is None
    module.check_model(model)


def test_a_module_has_a_loss_door_when_it_overrides_reduce():
    assert SumLosses().has_loss_door
    assert not AddToBatch().has_loss_door


# ------------------------------------------------------------------------------------------------ composition


def test_members_transform_the_batch_in_order():
    first, second = AddToBatch(2.0), AddToBatch(3.0)
    batch = {"x": torch.tensor([1.0])}

    assert MetaModuleList([first, second]).transform_batch(batch)["x"].item() == (1 * 2 + 2) * 3 + 3
    assert MetaModuleList([second, first]).transform_batch(batch)["x"].item() == (1 * 3 + 3) * 2 + 2
    assert batch["x"].item() == 1


def test_members_are_attached_in_order_and_detached_in_reverse():
    first, second = AddToBatch(2.0), AddToBatch(3.0)
    second.log = first.log

    with MetaModuleList([first, second]).attach(nn.Linear(1, 1), {}):
        assert first.log == ["open 2.0", "open 3.0"]
    assert first.log == ["open 2.0", "open 3.0", "close 3.0", "close 2.0"]


def test_a_list_has_the_doors_and_the_wishes_of_its_members():
    plain, weighing = (
        MetaModuleList([AddToBatch(), AddToBatch()]),
        MetaModuleList([AddToBatch(), SumLosses()]),
    )
    losses = torch.tensor([1.0, 2.0])

    assert not plain.has_loss_door
    assert plain.reduce(losses, {}, None) == 1.5
    assert weighing.has_loss_door
    assert weighing.reduce(losses, {}, None) == 9
    assert plain.batch_columns == ("shift",)
    assert weighing.reference_losses is None
    assert MetaModuleList([AddToBatch(), MetaWeightNet()]).reference_losses == "shared"
    assert MetaModuleList([AddToBatch()]).reference_losses is None
    assert len(list(weighing.parameters())) == 2


def test_a_list_asks_every_member_about_the_model():
    members = [AddToBatch(), AddToBatch()]
    MetaModuleList(members).check_model(nn.Linear(1, 1))
    assert [member.log for member in members] == [["check"], ["check"]]


def test_a_list_without_members_is_refused():
    with pytest.raises(ValueError, match="at least one member, got none"):
        MetaModuleList([])


@pytest.mark.parametrize("members", [None, 3, "ab", MetaWeightNet, MetaWeightNet(), torch.nn.Linear(1, 1)])
def test_what_is_no_list_of_meta_modules_is_refused(members):
    with pytest.raises(ValueError, match="should be a MetaModule, or a list of them, got "):
        MetaModuleList(members)


def test_a_list_with_a_member_that_is_no_meta_module_is_refused():
    with pytest.raises(ValueError, match=r"or a list of them, got \['MetaWeightNet', 'Linear'\]"):
        MetaModuleList([MetaWeightNet(), torch.nn.Linear(1, 1)])


def test_a_list_with_two_loss_doors_is_refused():
    with pytest.raises(ValueError, match=r"At most one member.*got 2: \['MetaWeightNet', 'SumLosses'\]"):
        MetaModuleList([MetaWeightNet(), AddToBatch(), SumLosses()])


def test_lists_nest():
    nested = MetaModuleList([MetaModuleList([AddToBatch(2.0)]), MetaModuleList([SumLosses(), AddToBatch(3.0)])])
    assert nested.transform_batch({"x": torch.tensor([1.0])})["x"].item() == 15
    assert nested.has_loss_door

    rebuilt = MetaModule.from_config(nested.to_config())
    assert rebuilt.to_config() == nested.to_config()


# ------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", MODULES)
def test_configuration_survives_json(name):
    module = MODULES[name]()
    rebuilt = MetaModule.from_config(json.loads(json.dumps(module.to_config())))

    assert type(rebuilt) is type(module)
    assert rebuilt.to_config() == module.to_config()
    assert str(rebuilt) == str(module)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("by_base_class", [False, True])
def test_a_folder_gives_back_the_module_bit_for_bit(name, by_base_class, tmp_path):
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    module.save_pretrained(tmp_path)

    loaded = (MetaModule if by_base_class else type(module)).from_pretrained(tmp_path)

    assert type(loaded) is type(module)
    assert loaded.to_config() == module.to_config()
    assert_same_parameters(loaded, module)


@pytest.mark.parametrize("name", MODULES)
def test_a_second_round_trip_writes_the_same_bytes(name, tmp_path):
    saved(MODULES[name](), tmp_path / "first")
    saved(MetaModule.from_pretrained(tmp_path / "first"), tmp_path / "second")

    for file in FILES:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("name", MODULES)
def test_a_folder_holds_a_card_a_configuration_and_plain_tensors(name, tmp_path):
    module = MODULES[name]()
    saved(module, tmp_path)

    assert {file.name for file in tmp_path.iterdir()} == FILES
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["meta_module"] == type(module).__name__
    assert load_file(tmp_path / "model.safetensors").keys() == module.state_dict().keys()
    assert "library_name: meta-trainer" in (tmp_path / "README.md").read_text()


def test_saving_twice_keeps_the_newer_parameters(tmp_path):
    module = MetaWeightNet(hidden_size=3)
    module.save_pretrained(tmp_path)
    with torch.no_grad():
        module.network[0].bias.fill_(7)
    module.save_pretrained(tmp_path)

    assert MetaWeightNet.from_pretrained(tmp_path).network[0].bias.tolist() == [7, 7, 7]


def test_a_loaded_module_takes_an_argument_over_the_saved_one(tmp_path):
    saved(MetaWeightNet(hidden_size=3), tmp_path)

    loaded = MetaWeightNet.from_pretrained(tmp_path, loss_input="candidate")

    assert loaded.reference_losses is None
    assert loaded.to_config()["loss_input"] == "candidate"


def test_a_loaded_module_works_as_the_saved_one(tmp_path):
    module, losses = MetaWeightNet(hidden_size=8), torch.rand(5)
    saved(module, tmp_path)

    loaded = MetaWeightNet.from_pretrained(str(tmp_path))

    assert_close(loaded.reduce(losses, {}, None), module.reduce(losses, {}, None), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------- what is refused


def test_the_folder_of_another_class_is_refused(tmp_path):
    for module, other in ((MODULES["weight_net"](), MetaModuleList), (MODULES["list"](), MetaWeightNet)):
        folder = saved(module, tmp_path / type(module).__name__)
        with pytest.raises(ValueError, match=f"holds a {type(module).__name__}, not a {other.__name__}"):
            other.from_pretrained(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    saved(MetaWeightNet(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No weights of a meta module at .*model\.safetensors"):
        MetaWeightNet.from_pretrained(tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    saved(MetaWeightNet(), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="should name a meta module under `meta_module`"):
        MetaWeightNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weights_file_is_refused(keep, tmp_path):
    saved(MetaWeightNet(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="does not fit this MetaWeightNet"):
        MetaWeightNet.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    saved(MetaWeightNet(hidden_size=4), tmp_path / "four")
    with pytest.raises(ValueError, match="does not fit this MetaWeightNet"):
        MetaWeightNet(hidden_size=5).load_weights(tmp_path / "four" / "model.safetensors")


def test_weights_of_another_module_are_refused(tmp_path):
    saved(AddToBatch(), tmp_path)
    with pytest.raises(ValueError, match="does not fit this MetaWeightNet"):
        MetaWeightNet().load_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["NoSuchModule", None, "Linear"])
def test_a_configuration_of_an_unknown_class_is_refused(name):
    with pytest.raises(ValueError, match=rf"one of \[.*'MetaWeightNet'.*\], got {name!r}.*has to be imported"):
        MetaModule.from_config({"meta_module": name})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"meta_module": ["MetaWeightNet"]}, "should name a meta module under `meta_module`"),
        ({"meta_module": "MetaWeightNet", "depth": 3}, "of a MetaWeightNet does not fit it: .*'depth'"),
        ({"meta_module": "MetaModule", "hidden_size": 3}, "of a MetaModule does not fit it"),
        ({"meta_module": "RepresentationTransform"}, "does not fit it: .* missing .*'hidden_size'"),
        ({"meta_module": "MetaModuleList"}, "should list its `members`, got None"),
        ({"meta_module": "MetaModuleList", "members": ["MetaWeightNet"]}, "should list its `members`, got "),
    ],
)
def test_a_configuration_that_does_not_fit_its_class_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MetaModule.from_config(config)


def test_a_list_that_holds_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="got 'NoSuchModule'"):
        MetaModule.from_config({"meta_module": "MetaModuleList", "members": [{"meta_module": "NoSuchModule"}]})


# ---------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def uploads(monkeypatch):
    """Repository name to the files that would have been uploaded."""
    found = {}

    def create_repo(self, repo_id, **settings):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **settings):
        found[repo_id] = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        return f"https://huggingface.co/{repo_id}/commit/0"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_push_to_hub_uploads_what_save_pretrained_writes(name, uploads, tmp_path):
    module = MODULES[name]()
    saved(module, tmp_path)

    module.push_to_hub("someone/meta-module")

    assert uploads == {"someone/meta-module": {file.name: file.read_bytes() for file in tmp_path.iterdir()}}


def test_what_was_pushed_can_be_loaded_from_a_copy_of_the_repository(uploads, tmp_path):
    module = MODULES["list"]()
    module.push_to_hub("someone/meta-module")
    for name, content in uploads["someone/meta-module"].items():
        (tmp_path / name).write_bytes(content)

    assert_same_parameters(MetaModule.from_pretrained(tmp_path), module)


def test_a_repository_is_downloaded_file_by_file(monkeypatch, tmp_path):
    saved(MetaWeightNet(hidden_size=3), tmp_path)
    asked = []

    def download(repo_id, filename, **settings):
        asked.append(
            (
                repo_id,
                filename,
                settings["revision"],
                settings["force_download"],
                settings["local_files_only"],
            )
        )
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **named: download(**named))
    monkeypatch.setattr("meta_trainer.modules.meta_module.hf_hub_download", download)

    loaded = MetaWeightNet.from_pretrained("someone/meta-module", revision="v1", local_files_only=True)

    assert asked == [
        ("someone/meta-module", "config.json", "v1", False, True),
        ("someone/meta-module", "model.safetensors", "v1", False, True),
    ]
    assert_same_parameters(loaded, MetaWeightNet.from_pretrained(tmp_path))


def test_a_module_has_nothing_to_say_and_a_list_says_what_all_members_say():
    class Angle(MetaModule):
        def summary(self):
            return {"angle": torch.tensor(30.0)}

    assert MetaModule().summary() == {}
    weighing = MetaWeightNet(4)
    assert MetaModuleList([weighing, Angle()]).summary() == {**weighing.summary(), "angle": torch.tensor(30.0)}


def test_of_several_modules_the_one_that_weighs_examples_says_their_weights():
    weighing, other, losses = MetaWeightNet(4), MetaModule(), torch.rand(3)
    modules = MetaModuleList([other, weighing])
    assert modules.weighs_examples
    assert torch.equal(modules.example_weights(losses, {}), weighing.example_weights(losses, {}))
    assert not MetaModuleList([other]).weighs_examples
    assert MetaModuleList([other]).example_weights(losses, {}) is None
