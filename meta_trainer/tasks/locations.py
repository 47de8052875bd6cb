"""Where the data that settings name are looked up, and what is refused before anything is loaded."""

import os
from collections.abc import Sequence
from os.path import isdir, isfile
from pathlib import Path


def locate(name: str, data_dir: str | None) -> Path:
    """Return the path of ``name``; a relative one starts from ``data_dir``, else $META_TRAINER_DATA, else here."""
    folder = Path(data_dir or os.environ.get("META_TRAINER_DATA") or ".").expanduser()
    return folder / Path(name).expanduser()


def check_data(setting: str, data: str | None, data_dir: str | None) -> None:
    """Raise ValueError if ``data`` is a file, or is written like the path of a folder and there is none."""
    if not data:
        return
    path = locate(data, data_dir)
    # Not a name to ask the Hub for.
    if isfile(path):
        raise ValueError(
            f"{setting}={data!r} is a file, where a data set of the Hub or a folder is expected: a setting whose name "
            "ends in file takes it."
        )
    # A name that starts like a path is no Hub name; any other may be one and is looked up when loaded.
    if data.startswith(("/", ".", "~")) and not isdir(path):
        raise ValueError(f"{setting}: there is no folder {path.absolute()}.")


def check_file(setting: str, name: str | None, data_dir: str | None, suffixes: Sequence[str]) -> None:
    """Raise ValueError if ``name`` is no file, or none of a known kind; without a name there is nothing to check."""
    if name is None:
        return
    path = locate(name, data_dir)
    if path.suffix not in suffixes:
        raise ValueError(f"{setting}={name!r}: expected a file that ends in one of {', '.join(suffixes)}.")
    if not path.is_file():
        raise ValueError(f"{setting}: there is no file {path.absolute()}; relative paths start from data_dir.")


def data_name(data: str | None, subset: str | None, file: str | None) -> str:
    """Name the data as a model card does: a data set and its subset, or a file."""
    if data is None:
        return Path(str(file)).stem
    return f"{data} ({subset})" if subset else data
