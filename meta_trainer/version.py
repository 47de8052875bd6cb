"""The version of meta_trainer; the only place where it is written."""

__version__ = "0.1.0"
