"""Two processes on the CPU against one: the same runs. All runs of the two share one start, which takes longest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import EXACT, ROUNDING, SINGLE, assert_same_run, moved, new_run, report

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

# The global batch holds 16 rows and 8 meta rows in each case.
ONE = {"per_device_train_batch_size": 16, "per_device_meta_batch_size": 8}
TWO = {"per_device_train_batch_size": 8, "per_device_meta_batch_size": 4}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_meta_batch_size": 4}
GUARDED = {"meta_guard": "change", "meta_trust_region": 0.05, "inner_step": "optimizer"}

SAME_BATCHES = {
    "evograd": {},
    "evograd_head": {"perturb": ["head"]},
    "guided": {"estimator": "guided"},
    "guarded": {"estimator": "guided", **GUARDED},
    "finite_difference": {"estimator": "finite_difference", "perturb": ["head"]},
    "t1t2": {"estimator": "t1t2"},
    "t1t2_optimizer": {"estimator": "t1t2", "inner_step": "optimizer", "max_grad_norm": 0.05},
    "decoder": {"module": "weight_net", "decoder": True},
    "every_second": {"meta_every": 2, "max_steps": 5},
}
SHARED = {
    "shared_evograd": {"perturb": ["head"]},
    "shared_evograd_all": {"num_candidates": 5},
    "shared_finite_difference": {"estimator": "finite_difference"},
    "shared_guarded": {"estimator": "guided", "num_candidates": 4, **GUARDED},
}
RESUMED = {
    "mid_epoch": {"dropout": 0.1, "meta_every": 2, "save_steps": 2, **TWO},
    "end_of_epoch": {
        "dropout": 0.1,
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        **TWO,
        "per_device_train_batch_size": 4,
    },
    "stream": {"dropout": 0.1, "stream": True, "save_steps": 2, **TWO},
}
STEPS = {"mid_epoch": 2, "end_of_epoch": 3, "stream": 2}


def scenarios():
    """Name of a run to its settings and the checkpoint that it goes on from."""
    runs = {}
    for name, settings in SAME_BATCHES.items():
        runs[name] = {**TWO, **settings}, None
        runs[f"{name}_accumulated"] = {**ACCUMULATED, **settings}, None
    for name, settings in SHARED.items():
        # Each process's own train batch is that of the single process.
        runs[name] = {**TWO, "share_candidates": True, "max_steps": 1, **settings}, None
    for name, settings in RESUMED.items():
        settings = {"save_strategy": "steps", "max_steps": 6, **settings}
        runs[name] = settings, None
        runs[f"{name}_resumed"] = settings, f"{name}/checkpoint-{STEPS[name]}"
    return runs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "scenarios.json").write_text(json.dumps(scenarios()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def reports(name):
        found = [torch.load(folder / name / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert [r["world_size"] for r in found] == [2, 2]
        assert all(r["wrapped"] for r in found)
        # Replicas stay the same, bit for bit.
        for key in ("theta", "lambda"):
            assert all(torch.equal(found[0][key][name], found[1][key][name]) for name in found[0][key])
        return found[0]

    return reports


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("name", SAME_BATCHES)
def test_two_processes_are_one_with_the_same_batches(tmp_path, two_processes, name, accumulated):
    trainer = new_run(tmp_path, **ONE, **SAME_BATCHES[name])
    before = report(trainer)
    trainer.train()
    expected = report(trainer)

    found = two_processes(f"{name}_accumulated" if accumulated else name)

    assert found["meta_steps"] == trainer._num_meta_steps
    if "guard" not in name:
        assert moved(before["lambda"], expected["lambda"]) > 1e-3
    assert_same_run(found, expected, **SINGLE if name == "decoder" else ROUNDING)


@pytest.mark.parametrize("name", SHARED)
def test_candidates_that_two_processes_share_are_those_of_one(tmp_path, two_processes, name):
    """The meta step of one process on the first one's train batch."""
    trainer = new_run(tmp_path, **{**TWO, "per_device_meta_batch_size": 8, "max_steps": 1, **SHARED[name]})
    before = report(trainer)["lambda"]
    trainer.train()
    expected = report(trainer)["lambda"]

    found = two_processes(name)["lambda"]

    assert moved(before, expected) > 1e-4 or "guard" in name
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **ROUNDING)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_that_were_stopped_end_as_if_they_had_not_been(two_processes, name):
    straight, resumed = two_processes(name), two_processes(f"{name}_resumed")
    assert straight["meta_steps"] == resumed["meta_steps"] > 0
    assert_same_run(resumed, straight, **EXACT)
