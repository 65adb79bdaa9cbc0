"""The way back: sources and scopes that were made in Python, written down as an experiment, so that a run of them can be recorded,
resumed and reproduced. What is no text goes into files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from safetensors.torch import save_file

from patchscopes.core.edit_files import save_edits
from patchscopes.core.errors import InputError, NotAvailableError, PromptError
from patchscopes.core.files import make_folder
from patchscopes.core.layers import Layers
from patchscopes.core.names import PLACEHOLDER, SLOT
from patchscopes.core.positions import Span
from patchscopes.experiment.documents import model_name
from patchscopes.experiment.prompts import content
from patchscopes.experiment.spec import Experiment
from patchscopes.experiment.spec_tables import ModelSpec
from patchscopes.maps import Affine, Identity, Map, Scale, save_map
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Tokens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source

Looked = tuple[str, Source | Sequence[Source], Patchscope]  # (name of the part, what is looked at, through what)


def experiment_of(looks: Sequence[Looked], *, folder: Path, **settings: Any) -> Experiment:
    """The experiment that asks for the same: a part for each look, named by it, with the same prompts, positions and settings.

    folder    where vectors, maps and edits are saved
    settings  further keys of the experiment: name, outputs, controls, …

    InputError for what cannot be written down: a map of a class of its own, a model that was not loaded by its name.
    """
    if not looks:
        raise InputError("nothing to look at was given; expected at least one (name, source, scope)")
    parts = [
        _part(name, [source] if isinstance(source, Source) else list(source), scope, folder) for name, source, scope in looks
    ]
    return Experiment(**{"model": parts[0]["model"], **settings, "parts": parts})


def models_of(looks: Sequence[Looked]) -> dict[str, Model]:
    """The models of these looks by the key that `experiment_of` gives them."""
    sources = [([source] if isinstance(source, Source) else list(source))[0].model for _, source, _ in looks]
    targets = [scope.model for *_, scope in looks if scope.model is not None]
    return {spec_of(model).key: model for model in (*sources, *targets)}


def spec_of(model: Model) -> ModelSpec:
    """How to load a model again. InputError if that cannot be said."""
    if model.loaded is None:
        raise InputError(
            f"the model {model.name!r} was given as an object, so a recorded run could not load it again; save it with save_pretrained, "
            "its tokenizer too, and load the folder: patchscopes.load('folder')"
        )
    chosen = {key: value for key, value in model.loaded.items() if value is not None}
    if model._given or "quantization" in chosen:
        what = "is bound to images or to an encoder's text" if model._given else "is quantised while it is loaded"
        raise InputError(f"the model {model.name!r} {what}, which a recorded run cannot do again")
    return ModelSpec(name=model_name(model.name), revision=model.revision, **chosen)


# ----------------------------------------------------------------------------------------------------------------------------- parts


def _part(name: str, sources: list[Source], scope: Patchscope, folder: Path) -> dict[str, Any]:
    if not sources:
        raise InputError(f"{name!r} has no source; expected at least one")
    first = sources[0]
    if any(other.model is not first.model or other.site != first.site or other.layers() != first.layers() for other in sources):
        raise InputError(
            f"the sources of {name!r} must share model, site and layers, to be looked at together; give each a look of its own otherwise"
        )
    if any(source._vectors is not None for source in sources):
        if len(sources) > 1:
            raise InputError(f"{name!r} has vectors beside other sources; give each a look of its own")
        prompts: Any = _vectors(first, folder)
    else:
        prompts = [prompt for source in sources for prompt in _prompts(source)]
    spans = {place.span for source in sources for place in source.places()}
    by_text = all(source.span == "piece" and _texts(source.position) for source in sources)
    if len(spans) > 1 and not by_text:
        raise InputError(
            f"the sources of {name!r} have spans of {', '.join(map(str, sorted(spans)))} tokens; expected one length, or pieces of text "
            "with span='piece'; give each a look of its own otherwise"
        )
    return {
        "name": name,
        "model": [spec_of(first.model).model_dump()],
        "prompts": prompts,
        "layers": _layers(first.layer) if isinstance(first.layer, str) else first.layers(),
        "span": "piece" if len(spans) > 1 else spans.pop(),
        "site": first.site,
        "scope": [_scope(scope, first.model, folder)],
        "temperature": float(scope.temperature),
        "draws": scope.draws,
        "seed": scope.seed,
        "second_look": scope.second_look if isinstance(scope.second_look, str) else list(scope.second_look),
    }


def _vectors(source: Source, folder: Path) -> dict[str, Any]:
    rows = source._vectors
    assert rows is not None
    names = {"labels": json.dumps(list(source._labels))}
    return {"vectors": _saved(folder, "vectors", lambda path: save_file({"vectors": rows.cpu().contiguous()}, path, names))}


def _prompts(source: Source) -> list[dict[str, Any]]:
    given = [source.prompt] if isinstance(source.prompt, (str, Tokens)) else list(source.prompt)
    found = [_prompt(source.model, prompt) for prompt in given]
    if source.position == "all":
        return [{**prompt, "at": "all"} for prompt in found]
    if source.span == "piece" and _texts(source.position):
        pieces = _listed(source.position)
        return [{**prompt, "at": pieces if len(pieces) > 1 else pieces[0]} for prompt in found]
    places: dict[int, list[int]] = {}
    for place in source.places():
        places.setdefault(place.prompt, []).append(place.position)
    return [{**prompt, "at": at if len(at) > 1 else at[0]} for prompt, at in zip(found, places.values(), strict=True)]


def _listed(position: Position | Sequence[Position]) -> list[Position]:
    return [position] if isinstance(position, (int, str, Span)) else list(position)


def _texts(position: Position | Sequence[Position]) -> bool:
    """Whether all of it is text that no whole number is mistaken for."""
    return all(isinstance(one, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", one) for one in _listed(position))


def _prompt(model: Model, prompt: Prompt) -> dict[str, Any]:
    """As text where the text gives the same tokens, as a turn of a chat where that does, else as ids."""
    if isinstance(prompt, str) and prompt.strip():
        return {"text": prompt}
    tokens = model.tokens(prompt)
    for text, chat in ((tokens.text, False), (_turn(model, tokens.text), True)):
        if not text.strip():
            continue
        try:
            if model.tokens(text, chat=chat) == tokens:
                return {"text": text, "chat": chat}
        except PromptError:  # too long where it is tokenized otherwise: then it is not these tokens
            pass
    return {"ids": list(tokens.ids)}


def _turn(model: Model, text: str) -> str:
    """What a user said in the text of a chat template; "" if it is no such text."""
    mark = "\u2603"
    try:
        before, _, after = model.tokens(mark, chat=True).text.partition(mark)
    except (NotAvailableError, PromptError):  # no template
        return ""
    inside = text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)
    return text[len(before) : len(text) - len(after)] if inside else ""


# ---------------------------------------------------------------------------------------------------------------------------- scopes


def _scope(scope: Patchscope, origin: Model, folder: Path) -> dict[str, Any]:
    model = scope.model or origin
    own = scope.prompt is None
    prompts = [scope.prompt] if isinstance(scope.prompt, (str, Tokens)) else list(scope.prompt or ())
    maps = [scope.map] if callable(scope.map) else list(scope.map)
    found = {
        "name": scope.name,
        **({"preset": "back-patch"} if own else {"prompt": [_target(model, prompt) for prompt in prompts]}),
        "layer": _layers(scope.layer),
        "map": [_map(one, folder) for one in maps],
        "tokens": scope.max_new_tokens,
        "stop": list(scope.stop),
        "site": scope.site,
        "write": scope.write,
        "spread": scope.spread,
        "carry": scope.carry,
        "guidance": float(scope.guidance),
    }
    if (own and scope.position is not None) or not all(isinstance(prompt, str) and SLOT in prompt for prompt in prompts):
        places = [_place(one) for one in _listed(PLACEHOLDER if scope.position is None else scope.position)]
        found["at"] = places if len(places) > 1 else places[0]
    if scope.edits:
        found["edits"] = _saved(folder, "edits", lambda path: save_edits(str(path), scope.edits))
    if scope.model is not None and scope.model is not origin:
        found["model"] = spec_of(scope.model).model_dump()
    return found


def _target(model: Model, prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    found = _prompt(model, prompt)
    plain = "text" in found and not found["chat"] and SLOT not in found["text"]
    return {"text": found["text"]} if plain else {"ids": list(model.tokens(prompt).ids)}


def _place(position: Position) -> int | str:
    """A whole number that is meant as text would be read as an index."""
    if isinstance(position, Span):
        return position.last
    return f"{position}#1" if isinstance(position, str) and re.fullmatch(r"\s*[+-]?\d+\s*", position) else position


def _layers(layer: Layers) -> int | str | list[int]:
    if isinstance(layer, str):
        return layer
    return layer.__index__() if isinstance(layer, SupportsIndex) else [one.__index__() for one in layer]


def _map(one: Map, folder: Path) -> str | Mapping[str, Any]:
    if type(one) is Identity:
        return "identity"
    if type(one) is Scale:
        return {"scale": float(one.alpha)}
    if type(one) is Affine:
        return {"affine": _saved(folder, "map", lambda path: save_map(path, one))}
    return {"file": _saved(folder, "map", lambda path: save_map(path, one))}


def _saved(folder: Path, kind: str, save: Any) -> str:
    """The path of a file that is named by its content, so that what is the same is there once."""
    draft = make_folder(folder) / f".{kind}.tmp"
    save(draft)
    path = folder / f"{kind}-{content(draft).removeprefix('sha256:')[:12]}.safetensors"
    draft.replace(path)
    return str(path.resolve())
