"""Runs that are killed, at any moment and in the middle of a save, end in the same bytes as one that was not."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KILLED, TERMINATED = -9, 143

pytestmark = pytest.mark.slow

STEPS = 10
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "meta_lr_scheduler_type": "linear",
    "meta_learning_rate": 0.05,
    "per_device_meta_batch_size": 3,
}
RARE = {"gradient_accumulation_steps": 2, "meta_every": 2, "save_total_limit": 1}
RESULT = ["model.safetensors", "meta_module/model.safetensors", "optimizer.pt", "scheduler.pt", "meta_state.pt"]


class Server:
    """The other end of `killed_runs.py`."""

    def __init__(self) -> None:
        path = os.pathsep.join((str(ROOT), str(HERE.parent / "trainer")))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "killed_runs.py")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, folder, settings, processes=1, expected=(0, KILLED), **fate):
        """Exit codes and the time of a run."""
        request = {"folder": str(folder), "settings": settings, "processes": processes, **fate}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        logs = [Path(f"{folder}.{rank}.log").read_text()[-3000:] for rank in range(processes)]
        assert not answer["timed_out"], logs
        # A process whose peer was killed may have noticed before it was killed itself.
        if KILLED not in answer["codes"]:
            assert set(answer["codes"]) <= set(expected), logs
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def result(folder, processes=1):
    """What a run ends in: the bytes of its last checkpoint."""
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    last = folder / f"checkpoint-{STEPS}"
    return {name: (last / name).read_bytes() for name in (*RESULT, *states)}


def differences(found, expected):
    return [name for name in expected if found[name] != expected[name]]


@pytest.mark.parametrize("settings", [{}, RARE], ids=["every step", "rare meta steps, one checkpoint"])
def test_runs_killed_in_the_middle_of_a_save_end_as_if_they_had_not_been(server, tmp_path, settings):
    settings = {**SETTINGS, **settings}
    server.run(tmp_path / "straight", settings)
    expected = result(tmp_path / "straight")
    dice, kills = random.Random(len(settings)), 0
    while True:
        # About eleven writes make a checkpoint.
        answer = server.run(tmp_path / "killed", settings, write=dice.randint(1, 26))
        if answer["codes"] == [0]:
            break
        kills += 1
    assert kills >= 7
    assert differences(result(tmp_path / "killed"), expected) == []


def test_runs_killed_at_any_moment_end_as_if_they_had_not_been(server, tmp_path):
    settings = {**SETTINGS, **RARE, "save_total_limit": 2}
    seconds = server.run(tmp_path / "straight", settings)["seconds"]
    expected = result(tmp_path / "straight")
    dice, kills, runs = random.Random(0), 0, 0
    while kills < 8:
        folder = tmp_path / f"killed-{runs}"
        if server.run(folder, settings, seconds=seconds * dice.uniform(0.1, 0.9))["codes"] == [KILLED]:
            kills += 1
            continue
        assert differences(result(folder), expected) == []
        runs += 1
    server.run(folder, settings)
    assert differences(result(folder), expected) == []


@pytest.mark.distributed
def test_two_processes_of_which_one_is_killed_go_on_together(server, tmp_path):
    settings = {**SETTINGS, "meta_every": 2, "save_total_limit": 2}
    server.run(tmp_path / "straight", settings, processes=2)
    expected = result(tmp_path / "straight", 2)
    # The second process writes its random state only.
    for rank, write in ((0, 17), (1, 3), (0, 9), (0, 29)):
        answer = server.run(tmp_path / "killed", settings, processes=2, rank=rank, write=write)
        assert KILLED in answer["codes"]
    assert server.run(tmp_path / "killed", settings, processes=2)["codes"] == [0, 0]
    for rank in (0, 1):
        report = json.loads((tmp_path / f"killed/rank-{rank}.json").read_text())
        assert (report["world_size"], report["wrapped"]) == (2, True)
    assert differences(result(tmp_path / "killed", 2), expected) == []


@pytest.mark.distributed
def test_two_processes_refuse_damaged_checkpoints_with_the_same_error(server, tmp_path):
    settings = {**SETTINGS, "max_steps": 1}
    server.run(tmp_path / "run", settings, processes=2)
    (tmp_path / "run/checkpoint-1/meta_state.pt").unlink()
    answer = server.run(tmp_path / "run", settings, 2, (1,), resume=True)
    assert answer["codes"] == [1, 1]
    for rank in (0, 1):
        assert "ValueError: No checkpoint in" in (tmp_path / f"run.{rank}.log").read_text()


@pytest.mark.distributed
def test_two_processes_of_which_one_gets_sigterm_stop_after_the_same_step(server, tmp_path):
    settings = {**SETTINGS, "meta_every": 2, "save_steps": 100}
    server.run(tmp_path / "straight", settings, processes=2)
    answer = server.run(tmp_path / "stopped", settings, 2, (TERMINATED,), rank=1, sigterm=3)
    assert answer["codes"] == [TERMINATED, TERMINATED]
    assert [folder.name for folder in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    assert server.run(tmp_path / "stopped", settings, processes=2)["codes"] == [0, 0]
    assert differences(result(tmp_path / "stopped", 2), result(tmp_path / "straight", 2)) == []


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise": "guided", "meta_guard": "change", "meta_trust_region": 1e-3},
        {"hypergradient": "finite_difference", "meta_guard": "ascent"},
        {"hypergradient": "t1t2", "meta_trust_region": 1e-3},
    ],
    ids=["evograd", "guided", "finite differences", "second order"],
)
def test_two_processes_skip_the_meta_step_that_one_has_nan_in(server, tmp_path, settings):
    settings = {**SETTINGS, "save_strategy": "no", "max_steps": 4, **settings}
    assert server.run(tmp_path / "run", settings, processes=2, rank=1, spoil=1)["codes"] == [0, 0]
    first, second = (json.loads((tmp_path / f"run/rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert (first["world_size"], first["wrapped"], first["skipped"]) == (2, True, 1)
    assert "NaN" not in json.dumps(first["lambda"])
