"""Meta steps under DDP, FSDP2 and DeepSpeed ZeRO: two processes on the CPU, each engine against DDP and Trainer."""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPModule",
    "fsdp2_sharded": "FSDPModule",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
SPREAD = {"fsdp2": ["DTensor"], "fsdp2_sharded": ["DTensor"], "zero3": ["Parameter", "ds_tensor"]}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
ENGINES = [
    "ddp",
    "fsdp2",
    *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)),
]
OTHERS = ENGINES[1:]
SAME = ["given", "given_shift", "given_head", "guided", "finite_difference", "frozen", "checkpointed"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of an engine by their names, for both processes; every engine starts once."""
    return cache(lambda engine: start(tmp_path_factory.mktemp(engine), engine))


def start(folder, engine):
    paths = [str(ROOT), str(ROOT / "tests" / "trainer"), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "sharded_child.py"), str(folder), engine],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    processes = [torch.load(folder / f"{engine}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for process in processes:
        for run in process.values():
            assert run["world_size"] == 2
            assert WRAPPERS[engine] in run["wrapper"]
            assert run["spread"] == SPREAD.get(engine, ["Parameter"])
    return processes


@pytest.mark.parametrize("engine", ENGINES)
def test_both_processes_end_with_the_same_parameters(runs, engine):
    first, second = runs(engine)
    for name, run in first.items():
        for part in ("theta", "lambda"):
            assert_equal(run[part], second[name][part])


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("engine", OTHERS)
def test_a_meta_step_is_that_of_ddp(runs, engine, name):
    found, expected = (runs(kind)[0][name]["results"][0] for kind in (engine, "ddp"))

    for part in ("train_losses", "scores", "val_loss", "weights"):
        assert_close(found[part], expected[part], rtol=1e-5, atol=1e-9, msg=lambda m, p=part: f"{p}: {m}")
    # A difference of losses, some thousandths apart, divided by their distance.
    for ours, theirs in zip(found["grads"], expected["grads"], strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("engine", OTHERS)
def test_three_steps_with_weighted_examples_end_where_those_of_ddp_do(runs, engine, name):
    found, expected = (runs(kind)[0][name] for kind in (engine, "ddp"))
    for part in ("theta", "lambda"):
        for key, tensor in expected[part].items():
            assert_close(found[part][key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("engine", [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2)])
@pytest.mark.parametrize("name", ["t1t2", "dealt_out"])
def test_where_parameters_are_whole_the_rest_is_as_under_ddp(runs, engine, name):
    found, expected = (runs(kind)[0][name]["results"][0] for kind in (engine, "ddp"))
    for ours, theirs in zip(found["grads"], expected["grads"], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_weights_are_normalised_over_accumulated_batches_under_fsdp2(runs):
    found, expected = (runs(kind)[0]["accumulated"] for kind in ("fsdp2", "ddp"))
    for key, tensor in expected["theta"].items():
        assert_close(found["theta"][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("run", ["identity", "shift", "head", "between", "inside"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_meta_step_leaves_no_trace_also_one_that_fails(runs, engine, run, accumulation):
    for process in runs(engine):
        found, plain = process[f"{run}_{accumulation}"], process[f"plain_{accumulation}"]
        assert_equal(found["theta"], plain["theta"])
        assert_equal(found["buffers"], plain["buffers"])
        assert found["losses"] == plain["losses"]
        failed = [result is None for result in found["results"]]
        assert failed == [False, run in ("between", "inside"), False]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_meta_step_between_micro_batches_leaves_no_trace_or_is_refused(runs, engine):
    for process in runs(engine):
        assert_equal(process["late"]["theta"], process["plain_2"]["theta"])
        refused = "a meta step should come before the first micro-batch" in process["late"]["refusal"]
        assert refused == (engine == "fsdp2")


@pytest.mark.parametrize("engine", [*ENGINES, "fsdp2_sharded"])
def test_a_resumed_run_ends_in_the_same_bytes(runs, engine):
    for process in runs(engine):
        straight, resumed = process["straight"], process["resumed"]
        assert_equal(resumed["theta"], straight["theta"])
        assert_equal(resumed["lambda"], straight["lambda"])
        assert resumed["losses"] == straight["losses"]
        # They would be equal, too, if the meta module never moved.
        assert not torch.equal(straight["lambda"]["members.1.shift"], torch.full((8,), 0.1))


def test_random_signs_differ_between_shards_and_agree_on_the_rest(runs):
    for process in runs("fsdp2"):
        assert all(
            result["scores"].isfinite().all() and result["scores"].std() > 0 for result in process["sign"]["results"]
        )


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
