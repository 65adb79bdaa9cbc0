"""Experiments as data: what is read, through which scopes, with which controls; the same as Python object, file, options and schema.

    spec            the table itself, from `spec_tables`; its keys are told in `keys`, what may stand in them in `grammar`
    documents       files of experiments, and the paths in them; `table`: what all tables share
    prompts         prompts of files; `dataset_folder`: of Hugging Face data sets on disk
    looks           sources and scopes of an experiment; `written_down`: an experiment of sources and scopes
    resolve         an experiment as a run records it

Names are imported when first used: reading an experiment needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchscopes.experiment.spec import Experiment

__all__ = ["Experiment"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("patchscopes.experiment.spec"), name)
    raise AttributeError(f"module 'patchscopes.experiment' has no attribute {name!r}; it has {', '.join(__all__)}")
