"""Data parallelism: two processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import HiddenShift, sentences, snapshot, weight_net

from meta_trainer import MetaModuleList

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def train_in_two_processes(folder, **settings):
    """What each of them has to report."""
    folder.mkdir(exist_ok=True)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(HERE / "two_processes.py"), str(folder), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for report in reports:
        assert report["world_size"] == 2
        assert report["wrapped"]
        assert report["meta_steps"] == 4
    return reports


COUNT_BYTES = 3 * 8
"""The number of meta labels of this process, sent, and of both, received."""


@pytest.mark.parametrize(("num_candidates", "perturb"), [(2, "all"), (5, "head")])
def test_a_meta_step_sends_losses_scores_and_meta_gradients_only(tmp_path, num_candidates, perturb):
    for report in train_in_two_processes(tmp_path, num_candidates=num_candidates, perturb=[perturb]):
        # K losses by numerator and denominator, K scores, H gradients and the validation loss, in single precision.
        numbers = 3 * num_candidates + report["lambda_size"] + 1
        assert report["sent_bytes"] == [4 * numbers + COUNT_BYTES] * 4
        assert report["theta_size"] > 10 * numbers


def test_a_finite_difference_sends_its_direction_besides(tmp_path):
    for report in train_in_two_processes(tmp_path, hypergradient="finite_difference"):
        numbers = report["theta_size"] + 2 * 2 + report["lambda_size"] + 1
        assert report["sent_bytes"] == [4 * numbers + COUNT_BYTES] * 4


def test_two_processes_share_forward_passes_with_the_same_result(tmp_path):
    shared, _ = train_in_two_processes(tmp_path / "shared", perturb=["head"])
    separate, _ = train_in_two_processes(tmp_path / "separate", perturb=["head"], general_path=True)

    assert shared["shared"]
    assert not separate["shared"]
    for key in ("theta", "lambda"):
        for name, values in separate[key].items():
            torch.testing.assert_close(torch.tensor(shared[key][name]), torch.tensor(values))


GUIDED = {"noise": "guided", "inner_step": "optimizer", "meta_guard": "change", "meta_trust_region": 1e-3}


NORMALIZED = {"noise": "guided", "inner_step": "normalized"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"hypergradient": "finite_difference"}, GUIDED, NORMALIZED],
    ids=["evograd", "fd", "guided", "normalized"],
)
def test_two_processes_learn_one_meta_module_from_disjoint_meta_batches(tmp_path, settings):
    first, second = train_in_two_processes(tmp_path, **settings)
    assert first["lambda"] == second["lambda"]
    assert first["theta"] == second["theta"]
    assert all(torch.tensor(values).isfinite().all() for values in first["lambda"].values())
    start = snapshot(MetaModuleList([weight_net(), HiddenShift()]))
    assert any(not torch.equal(torch.tensor(first["lambda"][name]), start[name]) for name in start)
    assert (tmp_path / "checkpoint-4/meta_module/model.safetensors").is_file()
    assert (tmp_path / "checkpoint-4/meta_state.pt").is_file()
    names = {"meta/loss", "meta/grad_norm", "meta/learning_rate", "meta/max_candidate_weight", "meta/skipped"}
    assert all(names <= set(log) for log in first["logs"])

    # A pass over the seven meta examples is cut into batches of two times three.
    for ours, theirs in zip(first["meta_batches"][:1], second["meta_batches"][:1], strict=True):
        assert not {tuple(row) for row in ours} & {tuple(row) for row in theirs}
    seen = [tuple(row) for report in (first, second) for batch in report["meta_batches"] for row in batch]
    # 24 examples were read: each of the seven three times, and three of them once more.
    counts = [seen.count(tuple(example["input_ids"].tolist())) for example in sentences(7, 2)]
    assert sorted(counts) == [3, 3, 3, 3, 4, 4, 4]
