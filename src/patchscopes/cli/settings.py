"""Where the settings of an experiment come from, and which wins:

    defaults < user file < project file < experiment file < environment < flags

The user file is patchscopes/config.toml in $XDG_CONFIG_HOME (~/.config), the project file patchscopes.toml in the working directory;
a variable is PATCHSCOPES_ with the name of the flag: PATCHSCOPES_LAYERS=0:4.

The files hold keys of an experiment; the first two also those of how models are loaded (device, dtype, …), which then hold for every
model that says nothing itself. What comes from a variable or a flag holds for all parts, scopes and models of the experiment file.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchscopes.cli.flags import FLAGS, MAPS, Flag, of_text
from patchscopes.core.errors import InputError

PREFIX = "PATCHSCOPES_"
LOADING = ("dtype", "device", "device_map", "attention", "trust_remote_code")  # of models
PLACES = ("device", "device_map")  # one of them says where a model goes
IN_PROMPTS = ("column", "at_column", "labels", "split", "limit", "sample", "chat", "tensor")
IN_SCOPES = {"target_layer": "layer"} | {key: key for key in ("map", "tokens", "stop", "temperature", "draws")}


@dataclass
class Settings:
    """A document of an experiment, and for each of its keys where it comes from."""

    document: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)  # how models are loaded that say nothing themselves
    loading_all: dict[str, Any] = field(default_factory=dict)  # how all are loaded, whatever they say

    def filled(self) -> dict[str, Any]:
        """The document, with how models are loaded in every model."""
        document = copy.deepcopy(self.document)
        _fill_models(document, self.loading, over=False)
        _fill_models(document, self.loading_all, over=True)
        return document


def user_file() -> Path:
    """The settings of a user; the file need not be there."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "patchscopes" / "config.toml"


def project_file() -> Path:
    """The settings of the working directory; the file need not be there."""
    return Path("patchscopes.toml").absolute()


def gather(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Everything that was said, merged. `file`: the experiment file; `flags`: those of `flags.FLAGS`, None where one was not given."""
    from patchscopes.experiment.documents import read_document, rooted
    from patchscopes.experiment.spec import Experiment
    from patchscopes.experiment.table import require_known

    found = Settings()
    given = None if file is None else Path(file).expanduser()
    here = [path for path in (user_file(), project_file()) if path.is_file() and not (given and _same(path, given))]
    for path in [*here, *([given] if given else [])]:
        document = read_document(path)
        try:
            if path is given:
                require_known(document, Experiment.model_fields, Experiment.elsewhere)
            else:
                require_known(document, [*Experiment.model_fields, *LOADING])
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        if path == project_file() and path is not given:
            _require_no_code(document, path)
        document = rooted(document, path.resolve().parent)
        found.loading = _with(found.loading, {key: document.pop(key) for key in LOADING if key in document})
        found.origin |= {key: str(path) for key in document}
        found.origin |= {key: str(path) for key in LOADING if found.loading.get(key) is not None and key not in found.origin}
        _merge(found.document, document)
    for flag, value, origin in (*_environment(), *_flags(flags or {})):
        _apply(found, flag, value, origin)
    return found


def _same(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        both = key == "outputs" and isinstance(value, dict) and isinstance(below.get(key), dict)
        below[key] = {**below[key], **value} if both else value


def _require_no_code(document: Any, path: Path) -> None:
    """A file that is read because it lies here must not make foreign code run."""
    if isinstance(document, dict):
        if document.get("trust_remote_code"):
            raise InputError(
                f"{path}: trust_remote_code cannot be said here; say it in the experiment file, or give --trust-remote-code"
            )
        document = list(document.values())
    for item in document if isinstance(document, list) else ():
        _require_no_code(item, path)


# ------------------------------------------------------------------------------------------------------- environment and flags


def _environment() -> Iterator[tuple[Flag, Any, str]]:
    known = {flag.name.upper(): flag for flag in FLAGS if flag.name != "trust_remote_code"}
    for variable, text in os.environ.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or not text:
            continue
        if name in known:
            yield known[name], of_text(known[name], text, f"the variable {variable}"), f"the variable {variable}"
        elif meant := difflib.get_close_matches(name, known, n=1, cutoff=0.8):  # others belong to other parts of the project
            raise InputError(f"unknown variable {variable}. Did you mean {PREFIX}{meant[0]}?")


def _flags(given: Mapping[str, Any]) -> Iterator[tuple[Flag, Any, str]]:
    some = [flag for flag in FLAGS if given.get(flag.name) not in (None, [])]
    for one_of in (("prompt", "prompts", "vectors"), ("controls", "control"), PLACES):
        if len(both := [flag.option for flag in some if flag.name in one_of]) > 1:
            raise InputError(f"{' and '.join(both)} were given; expected one of them")
    for flag in some:
        yield flag, given[flag.name], flag.option


def _apply(found: Settings, flag: Flag, value: Any, origin: str) -> None:
    """Put a value where it belongs; what parts, scopes and models say of the same gives way."""
    document, key = found.document, flag.key
    if flag.name in LOADING:
        found.loading_all = _with(found.loading_all, {flag.name: value})
        found.origin[flag.name] = origin
        return
    if key in IN_PROMPTS:
        _apply_to_prompts(document, key, value, origin)
        return
    if key == "outputs":
        document[key] = {**(document.get(key) or {}), flag.path: value}
    else:
        document[key] = _as_document(flag, value)
    found.origin[key] = origin
    for part in _parts(document):
        if key != "name":  # of the experiment, not of its parts
            part.pop(key, None)
    for table in _scopes(document) if key in IN_SCOPES else ():
        table.pop(IN_SCOPES[key], None)


def _as_document(flag: Flag, value: Any) -> Any:
    """An option's value as an experiment file would say it."""
    if flag.kind is Path:
        return {"vectors" if flag.name == "vectors" else "file": os.path.abspath(Path(value).expanduser())}
    return [_map(one) for one in value] if flag.name == "map" else value


def _map(text: str) -> Any:
    kind, colon, what = text.partition(":")
    if kind in ("affine", "file", "tuned_lens", "jacobian_lens") and what:
        return {kind: os.path.abspath(Path(what).expanduser())}
    if kind == "scale" and colon:
        try:
            return {"scale": float(what)}
        except ValueError:
            raise InputError(f"the map {text!r} has no number after the colon; expected, for example, scale:2") from None
    if text != "identity":
        raise InputError(f"unknown map {text!r}; expected {MAPS}")
    return text


def _apply_to_prompts(document: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Into every table that names a file of prompts; `chat` into every prompt."""
    tables = [table for table in (document, *_parts(document)) if table.get("prompts")]
    for table in tables:
        prompts = table["prompts"]
        if isinstance(prompts, dict) and ("text" in prompts or "ids" in prompts):
            prompts = [prompts]
        if isinstance(prompts, dict):
            table["prompts"] = {**prompts, key: value}
        elif key == "chat":
            several = prompts if isinstance(prompts, list) else [prompts]
            table["prompts"] = [{**(one if isinstance(one, dict) else {"text": one}), key: value} for one in several]
    if not any(isinstance(table["prompts"], dict) or key == "chat" for table in tables):
        raise InputError(f"{origin} is about prompts in a file, and none was named; expected --prompts FILE")


def _parts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = document.get("parts")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _scopes(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for table in (document, *_parts(document)):
        scope = table.get("scope")
        yield from (one for one in (scope if isinstance(scope, list) else [scope]) if isinstance(one, dict))


def _fill_models(document: dict[str, Any], loading: Mapping[str, Any], *, over: bool) -> None:
    """Put into every model how it is loaded: where it says nothing of it, or (`over`) whatever it says."""
    if not loading:
        return
    document.setdefault("model", "atlas")
    for table in (document, *_parts(document), *_scopes(document)):
        if table.get("model") is not None:
            table["model"] = _loaded(table["model"], loading, over)


def _loaded(model: Any, loading: Mapping[str, Any], over: bool) -> Any:
    if isinstance(model, list):
        return [_loaded(one, loading, over) for one in model]
    model = {"name": model} if isinstance(model, str) else model
    if not isinstance(model, dict):
        return model
    placed = any(model.get(key) is not None for key in PLACES)
    if over:
        return _with(model, loading)
    return {**{key: value for key, value in loading.items() if not (placed and key in PLACES)}, **model}


def _with(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second over the first: whichever way it says where a model goes."""
    clear = PLACES if any(key in above for key in PLACES) else ()
    return {**{key: value for key, value in below.items() if key not in clear}, **above}
