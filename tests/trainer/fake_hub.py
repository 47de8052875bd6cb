"""A Hub on this machine, and what a run leaves in a folder."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

META_FILES = {"meta_module/config.json", "meta_module/model.safetensors"}


def files(folder):
    return {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}


class Hub:
    """The part of the Hub that Trainer speaks to, on this machine."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, set[str]]] = []

    def create_repo(self, name: str, **kwargs):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path, path_in_repo="", ignore_patterns=(), **kwargs):
        kept = {f for f in files(folder_path) if not any(fnmatch(f, pattern) for pattern in ignore_patterns)}
        self.uploads.append((path_in_repo, kept))
        return SimpleNamespace(is_done=lambda: True, result=lambda: None)
