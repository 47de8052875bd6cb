"""The picture of a learned rotation: which runs it reads, and what it shows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from figure_rotation import digits, draw, read_runs

from meta_trainer import InputRotation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds that learned a quarter turn, on a set of two classes."""
    generator = np.random.default_rng(0)
    rows = {"image": list(generator.integers(0, 255, (12, 16, 16), dtype=np.uint8)), "label": [0, 1] * 6}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    settings = {
        "task": "image_classification", "train_file": [str(tmp_path / "train.parquet")], "num_meta_examples": 4,
        "meta_module": ["input_rotation"], "rotate_train_degrees": 0.0, "rotate_target_degrees": 90.0,
        "use_cpu": True,
    }  # fmt: skip
    for seed in (1, 2):
        run = tmp_path / "EvoGrad" / f"seed_{seed}"
        InputRotation(90).save_pretrained(run / "meta_module")
        history = [{"step": 5, "meta_module/angle": 40.0 + seed}, {"step": 10, "loss": 1.0}]
        content = {"settings": {**settings, "output_dir": str(run)}, "results": [{"history": history}]}
        (run / "results.json").write_text(json.dumps(content))
    return tmp_path / "EvoGrad"


def test_every_seed_is_read_from_an_upright_start(folder):
    runs = read_runs(folder)
    assert [run.angles for run in runs] == [[0.0, 41.0], [0.0, 42.0]]
    assert [run.steps for run in runs] == [[0, 5], [0, 5]]


def test_digits_are_shown_upright_as_in_the_target_and_as_learned(folder, tmp_path):
    runs = read_runs(folder)
    shown = digits(runs[0], 2)
    turned = np.rot90(shown["train"].numpy(), 1, (1, 2))
    assert np.allclose(shown["target"].numpy(), turned, atol=1e-5)
    assert np.allclose(shown["train, as learned"].numpy(), turned, atol=1e-5)
    draw(runs, shown, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_an_angle_and_folders_without_runs_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="should hold folders seed_"):
        read_runs(tmp_path / "nowhere")
    file = folder / "seed_1" / "results.json"
    file.write_text(json.dumps({"settings": {}, "results": [{"history": [{"loss": 1.0}]}]}))
    with pytest.raises(ValueError, match="no angle was learned in this run"):
        read_runs(folder)
