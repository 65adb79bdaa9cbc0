"""The conditions under which cells are computed: what must not change unnoticed within a run.

    models    of each: a hash of its files (or of its weights, if it was given as an object), number format, attention implementation
    versions  of this package, its computing code, torch, transformers, tokenizers
    device    its kind: cpu, cuda, …

A model's key, which is part of every cell's id, is a hash of its files and its number format.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.experiment.spec_tables import ModelSpec
from patchscopes.model.files import fingerprint

if TYPE_CHECKING:
    from patchscopes.model import Model

PACKAGES = ("patchscopes", "torch", "transformers", "tokenizers", "safetensors", "numpy", "polars")
COMPUTING = (
    "core",
    "engine",
    "model",
    "lenses",
    "maps",
    "controls",
    "scopes",
    "runs/plan.py",
    "experiment/looks.py",
    "runs/work.py",
)  # code that decides

Conditions = dict[str, Any]


def load_spec(spec: ModelSpec, device: str | None = None) -> Model:
    """The model of a spec, on `device` if the spec names none."""
    from patchscopes.model.loading import load

    return load(
        spec.name,
        dtype=spec.dtype,
        device=None if spec.device_map is not None else spec.device or device,
        revision=spec.revision,
        device_map=spec.device_map,
        attention=spec.attention,
        trust_remote_code=spec.trust_remote_code,
    )


def outline_spec(spec: ModelSpec, device: str) -> Model:
    """The same without weights, for planning. device: the kind that workers will have, which decides the number format."""
    from patchscopes.model.loading import outline

    dtype = spec.dtype or ("float32" if (spec.device or device).startswith("cpu") and spec.device_map is None else "auto")
    return outline(spec.name, revision=spec.revision, dtype=dtype, trust_remote_code=spec.trust_remote_code)


def files_of(spec: ModelSpec) -> str:
    """A hash of a model's files."""
    return fingerprint(spec.name, spec.revision)


def conditions(models: Mapping[str, Model], files: Mapping[str, str], device: str) -> Conditions:
    """The conditions of `models`, by what the experiment calls them. files: a hash for each."""
    about = {
        name: {
            "files": files[name],
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": getattr(model.engine.config, "_attn_implementation", None),
        }
        for name, model in models.items()
    }
    return {"models": about, "versions": versions(), "device": device.partition(":")[0]}


def keys(found: Conditions) -> dict[str, str]:
    """The key of every model."""
    return {
        name: hashlib.blake2b(f"{about['files']} {about['dtype']}".encode(), digest_size=8).hexdigest()
        for name, about in found["models"].items()
    }


def versions() -> dict[str, str]:
    """Of what computes. `code`: a hash of this package's own computing code."""
    return {**{name: importlib.metadata.version(name) for name in PACKAGES}, "code": code_hash()}


@cache
def code_hash() -> str:
    """A hash of the modules that decide what comes out."""
    root = Path(__file__).parent.parent
    digest = hashlib.blake2b(digest_size=8)
    for part in COMPUTING:
        place = root / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def differences(before: Conditions, now: Conditions) -> list[str]:
    """What changed, one line each: "versions.torch was 2.12.0 and is 2.13.0"."""
    return [
        f"{where} was {old} and is {new}"
        for where in sorted({**_flat(before), **_flat(now)})
        if (old := _flat(before).get(where, "absent")) != (new := _flat(now).get(where, "absent"))
    ]


def _flat(tree: Any, where: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {where: str(tree)}
    return {path: leaf for key, value in tree.items() for path, leaf in _flat(value, f"{where}.{key}" if where else key).items()}


def machine() -> dict[str, Any]:
    """Where it runs. The host's name is left out if PATCHSCOPES_NO_HOST is set."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "host": None if os.environ.get("PATCHSCOPES_NO_HOST") else platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": gpus,
        "cuda": torch.version.cuda,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "command": sys.argv[:1] and [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
