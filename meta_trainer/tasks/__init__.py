"""What a task needs from data to metric, one package per task."""

from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.task import Task

__all__ = ["ModelArguments", "Task"]
