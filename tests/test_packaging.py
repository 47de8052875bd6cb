import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from meta_trainer.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["dev"]]
SCRIPTS = [".ci/run", "scripts/run", "scripts/test"]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def pinned_version(requirement: Requirement) -> str:
    pin = constraints()[canonicalize_name(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return specifier.version


def run(*command: str | Path, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **settings)


def test_the_version_is_written_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text().count(__version__) == 1
    package = (ROOT / "meta_trainer").rglob("*.py")
    assert [path.name for path in package if f'"{__version__}"' in path.read_text()] == ["version.py"]
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *DEV], ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_floor_and_a_pin_above_it(requirement):
    assert ">=" in str(requirement.specifier)
    assert requirement.specifier.contains(pinned_version(requirement))


@pytest.mark.parametrize(("name", "version"), [("torch", "2.11"), ("transformers", "5.17"), ("accelerate", "1.15")])
def test_the_floors_admit_the_oldest_supported_releases(name, version):
    (requirement,) = [requirement for requirement in DEPENDENCIES if requirement.name == name]
    assert requirement.specifier.contains(version)


def test_torch_is_pinned_without_a_local_version_so_that_every_build_fits():
    pin = constraints()["torch"]
    assert re.fullmatch(r"==\d+\.\d+\.\d+", str(pin.specifier))
    assert pin.specifier.contains("2.13.0+cpu")


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/_environment.sh"])
def test_every_shell_script_parses(script):
    assert run("bash", "-n", ROOT / script).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_executable(script):
    assert os.access(ROOT / script, os.X_OK)


def test_scripts_run_without_a_recipe_shows_how_to_use_it(tmp_path):
    shown = run(ROOT / "scripts" / "run", cwd=tmp_path)
    assert shown.returncode == 2
    assert shown.stderr.startswith("usage: scripts/run RECIPE")


def test_scripts_run_refuses_a_key_before_the_recipe(tmp_path):
    shown = run(ROOT / "scripts" / "run", "--seed", "1", cwd=tmp_path)
    assert shown.returncode == 2
    assert "expected a recipe first, got '--seed'" in shown.stderr


def checkout_with_python(folder: Path, version: str) -> Path:
    """A copy of the scripts beside a ``python3`` that claims to be another version."""
    scripts = folder / "a checkout" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("run", "_environment.sh"):
        (scripts / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    for name in ("pyproject.toml", "constraints.txt"):
        (scripts.parent / name).write_bytes((ROOT / name).read_bytes())
    python = folder / "python3"
    python.write_text(f'#!/bin/sh\ncase "$2" in *platform*) echo {version} ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    return scripts.parent


def test_scripts_run_refuses_an_old_python_by_name(tmp_path):
    checkout = checkout_with_python(tmp_path, "3.9.2")
    python = tmp_path / "python3"
    shown = run("bash", checkout / "scripts" / "run", "recipe.yaml", env={**os.environ, "PYTHON": str(python)})
    assert shown.returncode == 1
    assert f"expected Python 3.11 or newer, '{python}' is 3.9.2" in shown.stderr
    assert not (checkout / ".venv").exists()


def test_scripts_run_says_so_when_there_is_no_python(tmp_path):
    checkout = checkout_with_python(tmp_path, "3.11.0")
    shown = run("bash", checkout / "scripts" / "run", "recipe.yaml", env={**os.environ, "PYTHON": "no-such-python"})
    assert shown.returncode == 1
    assert "expected a working Python 3.11 or newer as 'no-such-python'" in shown.stderr


def build(target: str, folder: Path) -> Path:
    """Build without an isolated environment, which would need the network."""
    built = run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (path,) = folder.iterdir()
    return path


def test_the_wheel_holds_the_package_and_every_recipe(tmp_path):
    recipes = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
    assert Path("recipes/quickstart.yaml") in recipes
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
    assert {f"meta_trainer/{path.as_posix()}" for path in recipes} <= names
    package = (ROOT / "meta_trainer").rglob("*.py")
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names
    assert {name.split("/")[0] for name in names} == {"meta_trainer", f"meta_trainer-{__version__}.dist-info"}


def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    files = ["constraints.txt", "LICENSE", "README.md", "CHANGELOG.md", "recipes/quickstart.yaml", *SCRIPTS]
    assert set(files) <= names
    assert "tests/test_packaging.py" in names
