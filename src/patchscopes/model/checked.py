"""The self-check of big models, remembered: it costs a few passes, and only the architecture and the versions decide its outcome."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from patchscopes.engine.check import MEANING, Ability, Capabilities, check
from patchscopes.engine.engine import Engine
from patchscopes.engine.tolerance import tolerance

BIG = 10**9  # parameters


def cache_folder() -> Path:
    """Where the project keeps what can be measured again: PATCHSCOPES_CACHE, or the user's cache folder."""
    named = os.environ.get("PATCHSCOPES_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "patchscopes"


def checked(engine: Engine, dtype: torch.dtype, *, big: int = BIG) -> Capabilities:
    """The model's abilities, measured now; for models of at least `big` parameters read from the cache if they were measured before."""
    if sum(p.numel() for p in engine.model.parameters()) < big:
        return check(engine, dtype)
    file = cache_folder() / "checks" / f"{_key(engine, dtype)}.json"
    if file.exists():
        stored = json.loads(file.read_text())
        abilities = {
            name: Ability(a["ok"], math.nan if a["error"] is None else a["error"], a["reason"])
            for name, a in stored["abilities"].items()
        }
        return Capabilities(abilities, stored["tolerance"])
    found = check(engine, dtype)
    abilities = {n: {**asdict(a), "error": None if math.isnan(a.error) else a.error} for n, a in found.abilities.items()}
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a home folder may be read-only or full: then the check runs again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"tolerance": found.tolerance, "abilities": abilities}))
        aside.replace(file)
    return found


def _key(engine: Engine, dtype: torch.dtype) -> str:
    """A hash of what decides the outcome: architecture, settings, number format, kind of device, versions, and what is measured."""
    parts = [type(engine.model).__name__, engine.config.to_json_string(), str(dtype), engine.device.type]
    parts.append(str(tolerance(dtype, engine.device)))
    parts += [
        torch.__version__,
        transformers.__version__,
        str(getattr(engine.config, "_attn_implementation", None)),
        *MEANING.values(),
    ]
    parts += sorted({type(m).__name__ for m in engine.model.modules()})  # quantised layers, adapters
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
