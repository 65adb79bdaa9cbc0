"""From an experiment to what is to be looked at through what: sources and scopes of loaded models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from patchscopes.core.edit_files import load_edits
from patchscopes.core.errors import InputError, LayerError, PositionError, PromptError, nearest
from patchscopes.core.names import LENSES, SLOT
from patchscopes.core.positions import Span
from patchscopes.experiment.prompts import Prompted, read_prompts, several
from patchscopes.experiment.spec import Experiment
from patchscopes.experiment.spec_tables import (
    AffineMap,
    At,
    FileMap,
    JacobianLensMap,
    MapSpec,
    Scalar,
    ScaleMap,
    ScopeSpec,
    TunedLensMap,
    VectorFile,
)
from patchscopes.lenses.jacobian_lens import load_jacobian_lens
from patchscopes.lenses.tuned_lens import load_tuned_lens
from patchscopes.maps import Affine, Identity, Map, Scale, load_map
from patchscopes.model.model import Model
from patchscopes.model.tokens import Position, Tokens
from patchscopes.scopes.extract import extract
from patchscopes.scopes.named import named
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source

SHOWN = 300  # characters of a reason, of which there may be many


@dataclass(frozen=True, eq=False)
class Look:
    """Sources of one model that are looked at through one scope. They share model, site and layers, so `scope(sources)` takes them.

    model, target_model   what the experiment calls M and M*
    labels   what is known of each prompt, in the order in which readings count prompts
    numbers  which of the part's prompts each is, from 0; those that were skipped are counted
    """

    part: str
    model: str
    target_model: str
    scope_name: str
    sources: list[Source]
    scope: Patchscope
    labels: list[dict[str, Scalar]]
    numbers: list[int]
    controls: bool | tuple[str, ...]
    evidence: bool = True


def looks(experiment: Experiment, models: Mapping[str, Model]) -> tuple[list[Look], list[str]]:
    """Every part × model × scope, and what a reader of the results should know (caveats).

    models  the loaded model of each of `experiment.models()`, by its `key`

    InputError if prompts cannot be read, for all of them at once (or a caveat, with on_bad_prompt="skip"); and whatever else cannot be
    on these models.
    """
    found: list[Look] = []
    caveats: list[str] = []
    for part in experiment.split():
        for spec in part.model:
            sources, labels, numbers = _sources(part, _of(models, spec.key), caveats)
            for scope in part.scope:
                built = _scope(scope, part, models, sources[0].model)
                target = spec.key if scope.model is None else scope.model.key
                found.append(
                    Look(part.name, spec.key, target, scope.called, sources, built, labels, numbers, part.controls, part.evidence)
                )
    return found, list(dict.fromkeys(caveats))


def _of(models: Mapping[str, Model], key: str) -> Model:
    if key not in models:
        raise InputError(f"the model {key!r} was not loaded. {nearest(key, models)}")
    return models[key]


# --------------------------------------------------------------------------------------------------------------------------- sources


def _sources(part: Experiment, model: Model, caveats: list[str]) -> tuple[list[Source], list[dict[str, Scalar]], list[int]]:
    layers = part.layers if isinstance(part.layers, (int, str)) else list(part.layers)
    if isinstance(part.prompts, VectorFile):
        source = _vectors(part.prompts, model, layers, part.site)
        _require_layers(source, part.name)
        rows = len(source.places())
        return [source], [{} for _ in range(rows)], list(range(rows))
    prompts = read_prompts(part)
    sources: list[Source] = []
    kept: list[int] = []
    wrong: list[str] = []
    notes: list[str] = []
    for k, prompt in enumerate(prompts):
        try:
            words = model.tokens(list(prompt.ids)) if prompt.ids else model.tokens(prompt.text or "", chat=prompt.chat)
            position = _position(words, prompt, piece=part.span == "piece")
        except (PromptError, PositionError) as e:
            reason = str(e) if len(str(e)) <= SHOWN else f"{str(e)[:SHOWN]}…"
            wrong.append(f"{prompt.origin}: {reason}")
            continue
        first = position[0] if isinstance(position, list) else position
        here = words.notes if position == "all" else words.notes_at(words.position(first))
        notes += here[:1]
        sources.append(Source(model, words, position, layers, part.site, span=part.span))
        kept.append(k)
    what = f"{len(wrong)} of {len(prompts)} prompts of {part.name!r} cannot be read by {model.name}"
    if wrong and (part.on_bad_prompt == "refuse" or not sources):
        hint = "" if not sources else "\nCorrect them, or leave them out with on_bad_prompt = 'skip'."
        raise InputError(several(wrong, what) + hint)
    if wrong:
        caveats.append(several(wrong, f"{what} and were skipped") if len(wrong) > 1 else f"skipped {wrong[0]}")
    if notes:
        others = f" ({len(notes)} of {len(prompts)} prompts of {part.name!r} have such a note)" if len(notes) > 1 else ""
        caveats.append(notes[0] + others)
    _require_layers(sources[0], part.name)
    return sources, [dict(prompts[k].labels) for k in kept], kept


def _position(words: Tokens, prompt: Prompted, *, piece: bool) -> Position | list[int | Span]:
    """Where to read, as indices, or as the spans of pieces; or "all"."""
    if prompt.at == "all":
        return "all"
    if isinstance(prompt.at, tuple):
        return list(dict.fromkeys(_index(words, one, piece) for one in prompt.at))
    return _index(words, prompt.at, piece)


def _index(words: Tokens, at: int | str, piece: bool) -> int | Span:
    try:
        last = words.position(at)
        return Span(words.first(at), last) if piece else last
    except PositionError as e:
        if isinstance(at, int) and str(at) in words.text:
            raise PositionError(f"{e}. A whole number is an index; for the text write '{at}#1'") from None
        raise


def _require_layers(source: Source, part: str) -> None:
    try:
        source.layers()
    except LayerError as e:
        raise LayerError(f"{part}: {source.model.name}: {e}") from None


def _vectors(file: VectorFile, model: Model, layers: int | str | list[int], site: str) -> Source:
    rows, names = read_vectors(Path(file.vectors), file.tensor)
    return replace(Source.of_vectors(model, rows, layer=0, labels=names, site=site), layer=layers)


def read_vectors(path: Path, tensor: str | None) -> tuple[Tensor, list[str]]:
    """A matrix [row, d_model] of a safetensors file, and names for its rows (none, if it has none). InputError names what is there."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; expected vectors in a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            there = list(file.keys())
            if tensor is None and len(there) != 1:
                raise InputError(f"{path.name!r} holds {len(there)} tensors ({', '.join(there[:20])}); choose one: tensor = …")
            if tensor is not None and tensor not in there:
                raise InputError(f"{path.name!r} has no tensor {tensor!r}. {nearest(tensor, there)}")
            rows = file.get_tensor(
                tensor or there[0]
            ).clone()  # aligned as other tensors are, so that results are equal to the last bit
            names = json.loads((file.metadata() or {}).get("labels", "[]"))
    except (SafetensorError, json.JSONDecodeError) as e:
        raise InputError(f"{str(path)!r} could not be read as safetensors: {e}") from None
    if rows.ndim not in (1, 2) or not rows.numel() or not rows.is_floating_point():
        raise InputError(
            f"the tensor {tensor or there[0]!r} of {path.name!r} has the shape {tuple(rows.shape)} and the type {rows.dtype}; "
            "expected (row, d_model), floating"
        )
    return rows.reshape(-1, rows.shape[-1]), [str(name) for name in names]


# ---------------------------------------------------------------------------------------------------------------------------- scopes


def _scope(spec: ScopeSpec, part: Experiment, models: Mapping[str, Model], origin: Model) -> Patchscope:
    """What is absent from the scope is the part's, and then the preset's. Lenses keep their layer and their one token."""
    model = None if spec.model is None else _of(models, spec.model.key)
    built = named(spec.preset) if spec.preset else _of_prompts(spec, model or origin)
    lens = spec.preset in LENSES
    layer = spec.layer if spec.layer is not None else None if lens else part.target_layer
    chosen: dict[str, Any] = {
        "position": _listed(spec.at) if spec.preset else None,
        "layer": list(layer) if isinstance(layer, tuple) else layer,
        "max_new_tokens": spec.tokens if spec.tokens is not None else None if lens else part.tokens,
        "stop": spec.stop if spec.stop is not None else part.stop,
        "temperature": spec.temperature if spec.temperature is not None else part.temperature,
        "draws": spec.draws if spec.draws is not None else part.draws,
        "site": spec.site,
        "write": spec.write,
        "spread": spec.spread,
        "carry": spec.carry,
        "guidance": spec.guidance,
        "name": spec.name,
        "second_look": part.second_look,
        "edits": None if spec.edits is None else load_edits(_there(spec.edits)),
        "model": model,
    }
    maps = [_map(one, model or origin) for one in (spec.map or part.map)]
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(built, **given, map=maps[0] if len(maps) == 1 else maps, seed=part.seed)


def _of_prompts(spec: ScopeSpec, model: Model) -> Patchscope:
    prompts = [one.text if one.text is not None else model.tokens(list(one.ids or ())) for one in spec.prompt or ()]
    return replace(extract(SLOT), prompt=prompts[0] if len(prompts) == 1 else prompts, position=_listed(spec.at))


def _listed(at: At | None) -> Position | list[Position] | None:
    return list(at) if isinstance(at, tuple) else at


def _map(spec: MapSpec, model: Model) -> Map:
    """model: the one that is patched, which a lens must fit. A model without weights (an outline) says nothing to compare with; those who
    load them do."""
    check = model.device.type != "meta"
    if isinstance(spec, ScaleMap):
        return Scale(spec.scale)
    if isinstance(spec, TunedLensMap):
        return load_tuned_lens(spec.tuned_lens, model, check=check).map
    if isinstance(spec, JacobianLensMap):
        return load_jacobian_lens(spec.jacobian_lens, model, check=check).map
    if isinstance(spec, FileMap):
        return load_map(spec.file)
    if not isinstance(spec, AffineMap):
        return Identity()
    found = load_map(spec.affine)
    if not isinstance(found, Affine):
        raise InputError(
            f"{spec.affine!r} holds the map {found.name!r}, a {type(found).__name__}; expected an affine map, or {{ file = … }}"
        )
    return found


def _there(path: str) -> str:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path!r}; expected edits that save_edits wrote")
    return path
