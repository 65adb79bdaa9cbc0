"""The maps of cross-model patching: which models and layers, fitting, files, floors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.core.errors import InputError
from patchscopes.evaluate.frame import Asked

if TYPE_CHECKING:
    from patchscopes.experiment.spec_tables import ModelSpec
    from patchscopes.model import Model

MAPPED, SHUFFLED, UNMAPPED = MAPS = ("mapped", "shuffled", "unmapped")


@dataclass(frozen=True)
class Pair:
    """M and M* as they are known before weights are loaded, and the layers of the grid."""

    source_spec: ModelSpec
    target_spec: ModelSpec
    source: Model
    target: Model
    layers: tuple[int, ...]
    target_layers: tuple[int, ...]

    @property
    def one_vocabulary(self) -> bool:
        """Whether token ids mean the same."""
        return self.source.tokenizer.get_vocab() == self.target.tokenizer.get_vocab()

    @property
    def grid(self) -> list[tuple[int, int]]:
        """Every (ℓ, ℓ*)."""
        return [(layer, other) for layer in self.layers for other in self.target_layers]

    @property
    def inner(self) -> tuple[list[int], list[int]]:
        """Layers at which attributes are looked for: without the embeddings and without layer L."""
        first = [layer for layer in self.layers if 0 < layer < self.source.n_layers]
        second = [layer for layer in self.target_layers if 0 < layer < self.target.n_layers]
        return first, second


def maps_of(asked: Asked, pair: Pair, texts: Sequence[str], given: Path | None) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Files of the maps, by name, and how good the fitted ones are on held-out texts. given: a file of maps, instead of fitting.

    They lie below the runs under a hash of all that they hang on, and are fitted if they are not there yet; every run copies those that
    it uses into its folder.
    """
    from patchscopes.maps import provenance_of
    from patchscopes.maps.states import digest_of_texts
    from patchscopes.runs.conditions import files_of, versions

    if asked.models is not None:
        models = [model.weight_hash for model in (pair.source, pair.target)]
    else:
        models = [files_of(spec) for spec in (pair.source_spec, pair.target_spec)]
    about = [models, pair.source_spec.key, pair.target_spec.key, digest_of_texts(texts), pair.grid, asked.seed, versions()]
    key = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = Path(asked.runs).resolve() / "maps" / key
    found = {name: folder / f"{name}.safetensors" for name in MAPS}
    if given is not None:
        found[MAPPED] = _checked(given.resolve(), pair)
    if absent := {name: path for name, path in found.items() if not path.exists()}:
        _write(asked, pair, texts, absent)
    return found, [dict(one) for one in provenance_of(found[MAPPED]).get("reports", ())]


def _checked(path: Path, pair: Pair) -> Path:
    """InputError, LayerError or VectorError if the file holds no maps between the layers of the grid."""
    import torch

    from patchscopes.core.errors import VectorError
    from patchscopes.maps import load_map, map_between

    f = load_map(path)
    for layer, other in pair.grid:
        made = map_between(f, layer, other)(torch.ones(pair.source.d_model))
        if made.shape[-1] != pair.target.d_model:
            raise VectorError(
                f"the map {f.name!r} of {path.name!r} makes vectors {made.shape[-1]} wide; {pair.target.name} is {pair.target.d_model} "
                "wide. Give maps that were fitted between these two models, or none"
            )
    return path


def _write(asked: Asked, pair: Pair, texts: Sequence[str], files: Mapping[str, Path]) -> None:
    """Fit, and write each file. InputError if the texts have too few tokens for the width."""
    from patchscopes.core.files import make_folder
    from patchscopes.maps import fit, save_map
    from patchscopes.runs.conditions import load_spec

    if len(texts) < 2:
        raise InputError(
            f"{len(texts)} texts are left to fit maps to: those that are read are not taken, nor, with unseen, those that mention an "
            "entity that is asked about. Give more texts"
        )
    source, target = (
        (pair.source, pair.target) if asked.models is not None else (load_spec(pair.source_spec), load_spec(pair.target_spec))
    )
    told = -1

    def progress(done: int, of: int, what: str) -> None:
        nonlocal told
        if told != (told := 4 * done // of):  # a line for each quarter
            for listener in asked.listeners:
                listener({"seq": 0, "time": "", "kind": "note", "message": f"fitting maps: {what}, {done:,} of {of:,} texts"})

    for path in files.values():
        make_folder(path.parent)
    for name, path in files.items():
        if name == UNMAPPED:
            save_map(path, _unmapped(source, target, texts))
            continue
        found = fit(source, texts, pair.grid, target=target, shuffled=name == SHUFFLED, seed=asked.seed, progress=progress)
        n = found.reports[0].n_fitted or 0
        if n <= source.d_model:
            raise InputError(
                f"the {len(texts):,} texts have {n:,} tokens to fit to, but the states of {source.name} have {source.d_model} dimensions: "
                "such a map fits anything. Give more texts (--set texts=FILE, --set fit=…)"
            )
        found.save(path)


def _unmapped(source: Model, target: Model, texts: Sequence[str]) -> Any:
    """What there is without a map: the identity; between widths the first coordinates, zeros behind them, at the target's length."""
    import torch

    from patchscopes.maps import Affine, Identity, NormMatch

    if source.d_model == target.d_model:
        return Identity()
    padded = Affine(torch.eye(target.d_model, source.d_model), name="padded")
    return NormMatch.of(target.run(list(texts[:64]), read=["resid.*"]), before=padded)


def stand_ins(pair: Pair) -> dict[str, Path]:
    """Maps of the right widths, in files that go when the process ends: enough to plan with."""
    import atexit
    import shutil
    import tempfile

    import torch

    from patchscopes.maps import Mean, save_map

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = {name: folder / f"{name}.safetensors" for name in MAPS}
    for k, path in enumerate(found.values()):  # which differ, since equal cells are planned once
        save_map(path, Mean(torch.full((pair.target.d_model,), 1.0 + k)))
    return found
