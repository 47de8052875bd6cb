"""The accelerate config files that come with the recipes."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from meta_trainer.recipe import list_recipes, recipes_folder

FOLDER = recipes_folder() / "accelerate"
EXPECTED = {
    "single": ("NO", 1),
    "ddp": ("MULTI_GPU", 2),
    "fsdp2": ("FSDP", 2),
    "zero2": ("DEEPSPEED", 2),
    "zero3": ("DEEPSPEED", 2),
}


def test_there_is_one_for_every_engine():
    assert {file.stem for file in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == EXPECTED[name]
    assert config.mixed_precision == "no"
    assert not config.use_cpu


def test_the_settings_are_those_that_meta_steps_support():
    fsdp = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert (fsdp["fsdp_version"], fsdp["fsdp_offload_params"]) == (2, False)
    for stage in (2, 3):
        deepspeed = load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config
        assert deepspeed["zero_stage"] == stage
        assert deepspeed["offload_param_device"] == "none"


def test_they_are_no_recipes():
    assert not [name for name, _ in list_recipes() if Path(name).parts[0] == "accelerate"]
