"""Experiment files as plain documents: TOML, YAML and JSON, and the paths that stand in them."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from patchscopes import organisms
from patchscopes.core.errors import InputError

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
PATHS = ("file", "vectors", "affine", "tuned_lens", "jacobian_lens", "edits")  # keys whose text is a path


def read_document(path: Path) -> dict[str, Any]:
    """The table that a file holds, told by its suffix. InputError if there is no such file, or with the line of what is wrong in it."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{str(path)!r} is no experiment file; expected the suffix {', '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no file {str(path)!r}; expected an experiment as TOML, YAML or JSON") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{str(path)!r} is not UTF-8 text: byte {e.start} cannot be read") from None
    except OSError as e:
        raise InputError(f"{str(path)!r} could not be read: {e.strerror or e}") from None
    document = {".toml": _toml, ".json": _json}.get(path.suffix.lower(), _yaml)(text, str(path))
    if not isinstance(document, dict):
        kind = "nothing" if document is None else f"a {type(document).__name__}"
        raise InputError(f"{str(path)!r} holds {kind}; expected the keys of an experiment, such as prompts = …")
    return document


def _toml(text: str, path: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:  # its message ends in the line
        raise InputError(f"{path!r} is not valid TOML: {e}") from None


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _each_once(pairs, path))
    except json.JSONDecodeError as e:
        raise InputError(f"{path!r} is not valid JSON: {e.msg} (at line {e.lineno}, column {e.colno})") from None
    except RecursionError:
        raise InputError(f"{path!r} is nested too deep to be an experiment") from None


def _each_once(pairs: Iterable[tuple[str, Any]], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{path!r} says {key!r} twice; expected each key once in a table")
        found[key] = value
    return found


def _yaml(text: str, path: str) -> Any:
    import yaml  # here, because few need it

    class Loader(yaml.SafeLoader):
        """Safe, and with each key once: YAML's own loader would keep the last and say nothing."""

    def table(loader: Any, node: Any) -> dict[str, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [str(key) for k, key in enumerate(keys) if key in keys[:k]]
        if twice:
            raise InputError(
                f"{path!r} says {twice[0]!r} twice (at line {node.start_mark.line + 1} and below); expected each key once in a table"
            )
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", table)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise InputError(f"{path!r} is not valid YAML: {problem}{line}") from None
    except RecursionError:
        raise InputError(f"{path!r} is nested too deep to be an experiment") from None


# ----------------------------------------------------------------------------------------------------------------------------- paths


def absolute(path: str | Path, base: Path | None = None) -> str:
    """The path, seen from `base` (None: the working directory), without "~" and ".."; links are kept."""
    return os.path.abspath((base or Path()) / Path(path).expanduser())


def model_name(name: str, base: Path | None = None) -> str:
    """The name of a model; of a folder its absolute path. Bundled models come first, then folders, then Hugging Face ids."""
    if name in organisms.bundled():
        return name
    folder = absolute(name, base)
    there = any(os.path.exists(os.path.join(folder, file)) for file in ("config.json", "adapter_config.json"))
    return folder if name.startswith((".", "/", "~")) or there else name


def each_path(data: Any, change: Callable[[str, dict[str, Any]], Any], keys: Sequence[str] = PATHS) -> Any:
    """A copy of a document in which every path is what `change(path, its table)` makes of it. Labels are no paths."""
    if isinstance(data, dict):
        return {
            key: change(value, data)
            if key in keys and isinstance(value, str)
            else value
            if key == "labels"
            else each_path(value, change, keys)
            for key, value in data.items()
        }
    return [each_path(item, change, keys) for item in data] if isinstance(data, (list, tuple)) else data


def rooted(data: Any, base: Path) -> Any:
    """The document with its paths, and models that are folders, absolute as seen from `base`."""
    return _rooted_models(each_path(data, lambda path, _: absolute(path, base)), base)


def _rooted_models(data: Any, base: Path) -> Any:
    if isinstance(data, list):
        return [_rooted_models(item, base) for item in data]
    if not isinstance(data, dict):
        return data
    return {key: _rooted_model(value, base) if key == "model" else _rooted_models(value, base) for key, value in data.items()}


def _rooted_model(value: Any, base: Path) -> Any:
    if isinstance(value, list):
        return [_rooted_model(item, base) for item in value]
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {**value, "name": model_name(value["name"], base)}
    return model_name(value, base) if isinstance(value, str) else value
