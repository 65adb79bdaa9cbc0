"""What the values of an experiment's keys may look like. Each function returns the canonical form or raises InputError."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError, LayerError, SiteError, UnknownName, nearest
from patchscopes.core.names import DTYPES, SLOT, named_controls, require_scope
from patchscopes.core.sites import SCOPED
from patchscopes.experiment.documents import absolute, model_name
from patchscopes.experiment.table import shown

_PIECE = r"\s*(?:-?\d+|-?\d*\s*:\s*-?\d*(?:\s*:\s*-?\d*)?)\s*"
_LAYERS = re.compile(rf"{_PIECE}(?:,{_PIECE})*")
MAPS = ("scale", "affine", "file", "tuned_lens", "jacobian_lens")  # the key that says which map a table is
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def listed(value: Any) -> Any:
    """One or several as a tuple; a list as it is."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def some(value: Any) -> Any:
    """The same, of at least one."""
    found = listed(value)
    if not found:
        raise InputError("found an empty list; expected at least one")
    return found


def ids(value: Any) -> Any:
    """Token ids."""
    if isinstance(value, (list, tuple)) and not value:
        raise InputError("found an empty list; expected at least one token id")
    return as_tuple(value)


def as_tuple(value: Any) -> Any:
    """Lists and ranges as tuples, which is how a frozen table keeps them."""
    return tuple(value) if isinstance(value, (list, range)) else value


def name(value: Any) -> Any:
    """A name that can stand in tables and be part of a file's name."""
    if isinstance(value, str) and (not value.strip() or _CONTROL.search(value) or len(value) > 200):
        raise InputError(f"found {shown(value)}; expected a name of 1 to 200 characters on one line")
    return value


def position(value: Any) -> Any:
    """An index, a piece of text, or a list of these; or "all". A whole number in a text is an index."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise InputError("found an empty list; expected at least one position, or 'all'")
        if "all" in value:
            raise InputError("found 'all' among other positions; expected 'all' alone")
        return tuple(one_position(one) for one in value)
    return one_position(value)


def one_position(value: Any) -> Any:
    """The same, of one position."""
    if isinstance(value, str) and value:
        return int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(
            f"found {shown(value)}; expected a position: an index (-1 is the last token) or a piece of the prompt's text"
        )
    return value


def span(value: Any) -> Any:
    """A number of tokens of at least 1, also as text, or "piece"."""
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not number and value != "piece":
        raise InputError(f"found {shown(value)}; expected a number of tokens from 1, or 'piece' (those of the piece of text)")
    return value


def spread(value: Any) -> Any:
    """ "here", "below", or distances from the target layer, 0 among them."""
    if isinstance(value, (list, tuple)):
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        if not whole or 0 not in value:
            raise InputError(
                f"found {shown(value)}; expected distances from the target layer with 0, the layer itself, among them"
            )
        return tuple(value)
    if value not in ("here", "below"):
        raise InputError(f"found {shown(value)}; expected 'here', 'below', or distances from the target layer such as [0, 1]")
    return value


def layers(value: Any) -> Any:
    """A layer, a list of them, or text in the grammar of `core.layers`; whether a model has them is said when there is one."""
    if isinstance(value, str):
        if value.strip() != "all" and not _LAYERS.fullmatch(value):
            raise LayerError(
                f"found {shown(value)}, which does not name layers; expected a layer (3), a list (3,5,9), a range (3:9, 3:9:2, :) or 'all'"
            )
        if any(piece.count(":") == 2 and piece.split(":")[2].strip() == "0" for piece in value.split(",")):
            raise LayerError(f"found {shown(value)}, a range with a step of 0; expected a step such as 2")
        return int(value) if re.fullmatch(r"\s*-?\d+\s*", value) else value.strip()
    try:
        if isinstance(value, Iterable):
            found = tuple(operator.index(layer) for layer in value if not isinstance(layer, bool) or _no_layer(layer))
            return found or _no_layer(value)
        return operator.index(value) if not isinstance(value, bool) else _no_layer(value)
    except TypeError:
        return _no_layer(value)


def _no_layer(value: object) -> Any:
    raise LayerError(f"found {shown(value)}; expected a layer (a whole number), a list of them, or text such as '0:8' or 'all'")


def target_layers(value: Any) -> Any:
    """The same, or "same"."""
    return value if value == "same" else layers(value)


def site(value: Any) -> Any:
    """A site that scopes read and write."""
    if isinstance(value, str) and value not in SCOPED:
        raise SiteError(f"unknown site {value!r}; expected one of {', '.join(SCOPED)}. {nearest(value, SCOPED)}")
    return value


def dtype(value: Any) -> Any:
    """A number format."""
    if isinstance(value, str) and value not in DTYPES:
        raise UnknownName(f"unknown dtype {value!r}. {nearest(value, DTYPES)}")
    return value


def controls(value: Any) -> Any:
    """True, false, or names of controls as a tuple."""
    several = isinstance(value, (str, list, tuple))
    if not isinstance(value, bool) and not (several and all(isinstance(one, str) for one in value)):
        raise InputError(f"found {shown(value)}; expected true or false, or a list of controls such as ['nothing', 'zero']")
    return value if isinstance(value, bool) else named_controls(value)


def path(value: Any) -> Any:
    """A path, absolute."""
    if isinstance(value, (str, Path)) and str(value).strip():
        return absolute(value)
    raise InputError(f"found {shown(value)}; expected the path of a file")


def prompt_text(value: Any) -> Any:
    """Text with something in it."""
    if isinstance(value, str) and not value.strip():
        raise InputError(f"found {shown(value)}, which is empty; expected some text")
    return value


def labels(value: Any) -> Any:
    """A table of plain values."""
    if isinstance(value, dict):
        for key, one in value.items():
            number = isinstance(one, float) and not math.isfinite(one)
            if not isinstance(key, str) or number or not isinstance(one, (str, int, float, bool, type(None))):
                raise InputError(f"the label {key!r} is {shown(one)}; expected text, a finite number, true, false or nothing")
    return value


# What may be short: text for a table.


def model_of(value: Any) -> Any:
    """A model's name as a table."""
    return {"name": str(value)} if isinstance(value, (str, Path)) else value


def model(value: Any) -> Any:
    """The name of a model; of a folder its absolute path."""
    if isinstance(value, str) and not value.strip():
        raise InputError("the model's name is empty; expected a bundled model, a folder or a Hugging Face id")
    return model_name(value) if isinstance(value, str) else value


def text_of(value: Any) -> Any:
    """A prompt's text as a table."""
    return {"text": value} if isinstance(value, str) else value


def scope_of(value: Any) -> Any:
    """A scope's name, or a prompt with a slot, as a table."""
    if not isinstance(value, str):
        return value
    require_scope(value)
    return {"prompt": value} if SLOT in value else {"preset": value}


def map_of(value: Any) -> Any:
    """A map, its name checked."""
    if isinstance(value, str) and value != "identity":
        hint = f"{{ {value} = … }}" if value in MAPS else "'identity', { scale = 2.0 } or { affine = 'file.safetensors' }"
        raise UnknownName(f"unknown map {value!r}; expected {hint}")
    if isinstance(value, dict) and sum(key in value for key in MAPS) != 1:
        unknown = next((str(key) for key in value if key not in MAPS), "")
        raise InputError(f"found {shown(value)}; expected one of the keys {', '.join(MAPS)}. {nearest(unknown, MAPS)}")
    if not isinstance(value, (str, dict)) and not hasattr(value, "model_fields_set"):
        raise InputError(f"found {shown(value)}; expected 'identity', {{ scale = 2.0 }} or {{ affine = 'file.safetensors' }}")
    return value


def prompts(value: Any) -> Any:
    """A prompt, or a list of them, as a list; a table that names a file as it is."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, dict):
        if "file" in value or "vectors" in value:
            return value
        if not {"text", "ids"} & set(value):
            unknown = next(iter(map(str, value)), "")
            raise InputError(
                f"found {shown(value)}; expected a table with text, ids, file or vectors. "
                f"{nearest(unknown, ('text', 'ids', 'file', 'vectors'))}"
            )
        value = [value]
    if isinstance(value, (list, tuple)):
        if not value:
            raise InputError("found an empty list; expected at least one prompt")
        return tuple(value)
    if hasattr(value, "model_fields_set"):
        return value
    raise InputError(f"found {shown(value)}; expected a prompt, a list of prompts, or a table that names a file")
