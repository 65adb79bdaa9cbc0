"""Run the benchmark: load the model, gather the contestants, run the parts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from patchscopes.bench.contestants import LOCAL, Contestant, local
from patchscopes.bench.models import Subject, subject
from patchscopes.bench.parts import ON_GPU, OWN_PARTS, Found, Settings, grid_part, stops_part
from patchscopes.bench.peer import PEERS, Peer, PeerError, find_python
from patchscopes.bench.report import Figure, document, machine
from patchscopes.bench.turns import Progress

CONTESTANTS = (*LOCAL, *PEERS)


def bench(
    model: str,
    settings: Settings,
    *,
    parts: Sequence[str],
    contestants: Sequence[str] = CONTESTANTS,
    device: str | None = None,
    dtype: str | None = None,
    peers_python: Path | None = None,
    progress: Progress = lambda done, of, what: None,
) -> dict[str, Any]:
    """The report of `parts` on `model`, as `report.document` has it. Peers that are not there are told in it."""
    s = subject(model, device=device, dtype=dtype, seed=settings.seed)
    before = machine(s.device)
    found, peers = Found(), {}
    with ExitStack() as stack:
        if "grid" in parts:
            taking_part, missing = _gather(s, contestants, settings, peers_python, peers, stack)
            grid_part(s, taking_part, settings, found, progress)
            found.figures += [
                Figure("grid", f"{name} / ours", None, note=f"not available: {why}") for name, why in missing.items()
            ]
    for part in parts:
        if part in OWN_PARTS:
            OWN_PARTS[part](s.anew(), settings, found, progress)
        elif part == "stops":
            stops_part(device, settings, found, progress)
        elif part == "runs":
            from patchscopes.bench.recorded import recorded_part

            figures, found.floors["runs"] = recorded_part(settings.repeat, progress)
            found.figures += figures
    return document(
        model=describe(s),
        settings={**asdict(settings), "parts": list(parts), "contestants": list(contestants)},
        machine=before,
        peers=peers,
        figures=found.figures,
        scores=found.scores,
        floors=found.floors,
    )


def default_parts(device: torch.device) -> list[str]:
    """All that make sense there: some need a GPU to say anything."""
    return [part for part in ("grid", "stops", *OWN_PARTS) if device.type == "cuda" or part not in ON_GPU]


def describe(s: Subject) -> dict[str, Any]:
    """The model, in numbers."""
    return {
        "name": s.name,
        "architecture": type(s.hf).__name__,
        "parameters": sum(p.numel() for p in s.hf.parameters()),
        "n_layers": s.engine.n_layers,
        "d_model": s.d_model,
        "vocab": s.engine.vocab,
        "dtype": str(s.dtype).removeprefix("torch."),
        "device": str(s.device),
    }


def _gather(
    s: Subject, names: Sequence[str], settings: Settings, python: Path | None, peers: dict[str, Any], stack: ExitStack
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that are there, and why the others are not. Ours always takes part: ratios are against it."""
    taking_part: list[Contestant] = [local(name, s, alone=settings.alone) for name in LOCAL if name in names or name == "ours"]
    missing: dict[str, str] = {}
    folder: Path | None = None
    for name in (name for name in PEERS if name in names):
        try:
            where = find_python(PEERS[name], python)
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patchscopes-bench-model-")))
                s.save(folder)
            peer = Peer(name, s, folder, where)
        except PeerError as e:
            missing[name] = str(e)
            peers[name] = {"available": False, "reason": str(e)}
            continue
        stack.callback(peer.close)
        taking_part.append(peer)
        peers[name] = {"available": True, "versions": peer.versions, "python": str(where)}
    return taking_part, missing
