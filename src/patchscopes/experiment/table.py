"""The tables of an experiment file: unknown keys are refused with a suggestion, and what is wrong is said in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from patchscopes.core.errors import InputError, nearest

AT_MOST = 5  # mistakes told at once


class Table(BaseModel):
    """A frozen table with known keys. What is wrong with one is an InputError."""

    # Numbers are no texts and texts no numbers: "5" or true where 5 belongs is a slip that should be seen.
    # Validators are built when first used, so that importing this costs little.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    elsewhere: ClassVar[Mapping[str, str]] = {}  # keys that are often put here, and the table they belong into

    def __init__(self, **keys: Any) -> None:
        try:
            super().__init__(**keys)
        except ValidationError as e:
            raise told(e) from None

    # Says to pydantic that the method above adds nothing to validation, so that tables inside tables do not go through it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """The table that a document describes. InputError if it describes none."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as e:
            raise told(e) from None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise InputError(f"found {shown(data)}; expected a table with keys such as {', '.join(list(cls.model_fields)[:3])}")
        require_known(data, cls.model_fields, cls.elsewhere)
        return data


def require_known(data: Iterable[object], known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> None:
    """InputError naming the first key that is not known, and the one that was probably meant, or where it belongs."""
    known = list(known)
    for key in data:
        if key not in known:
            if table := (elsewhere or {}).get(str(key)):
                raise InputError(f"unknown key {str(key)!r}; it belongs into the table {table}: {table} = {{ {key} = …, … }}")
            raise InputError(f"unknown key {str(key)!r}. {nearest(str(key), known)}")


def shown(value: object) -> str:
    """A value as a message shows it: short, and with the name of its kind where that is the mistake."""
    kinds = {str: "the text ", bool: "", int: "the number ", float: "the number ", dict: "the table ", list: "the list "}
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return kinds.get(type(value), f"the {type(value).__name__} ") + (text if len(text) <= 60 else f"{text[:59]}…")


def told(error: ValidationError, said_in: Mapping[str, str] | None = None) -> InputError:
    """What is wrong, in plain words, each with its place. said_in: for a key of the outermost table where it was said."""
    lines = []
    for one in error.errors(include_url=False):
        at = place(one["loc"])
        origin = (said_in or {}).get(str(one["loc"][0]), "") if one["loc"] else ""
        origin = f" ({origin})" if origin else ""
        lines.append(f"{at}{origin}: {_problem(one)}" if at else _problem(one))
    lines = list(dict.fromkeys(lines))
    more = f"\n… and {len(lines) - AT_MOST} more mistakes" if len(lines) > AT_MOST else ""
    return InputError("\n".join(lines[:AT_MOST]) + more)


def place(loc: Sequence[int | str]) -> str:
    """("parts", 1, "layers") as parts[1].layers. Steps in brackets <…> are pydantic's, and left out."""
    text = ""
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            text += f".{step}" if text else step
    return text


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a table",
    "finite": "a finite number",
    "greater": "a number above {gt}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
    "literal": "{expected}",
}


def _problem(one: Any) -> str:
    kind, context = one["type"], one.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "this key is missing, and needed"
    expected = EXPECTED.get(kind) or EXPECTED.get(kind.split("_")[0])
    if expected is None:
        return one["msg"]
    if kind == "literal_error" and isinstance(one["input"], str):
        words = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        return f"found {shown(one['input'])}; expected {context['expected']}. {nearest(one['input'], words)}"
    return f"found {shown(one['input'])}; expected {expected.format(**context)}"
