"""Edits: what to write where. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from patchscopes.core.errors import VectorError

Write = Literal["replace", "add", "add_matched"]
WRITES: tuple[Write, ...] = ("replace", "add", "add_matched")


@dataclass(frozen=True, eq=False)
class Edit:
    """Write `value` [d_model] at `site` ("resid.2") and `position` of a prompt, or of every prompt of a batch if `prompt` is None.

    position  index of a real token, negative from the end, or a piece of the prompt's text (the last token of its only occurrence)
    write     "replace"; "add"; "add_matched": add the value, rescaled to the norm of what it is added to
    """

    site: str
    position: int | str
    value: Tensor
    write: Write = "replace"
    prompt: int | None = None


def written(value: Tensor, old: Tensor, write: Write) -> Tensor:
    """What stands at the site afterwards. value, old: [..., d_model]. VectorError for a zero vector with "add_matched"."""
    value = value.to(old)
    if write == "replace":
        return value.expand_as(old)
    if write == "add_matched":
        if not bool(value.any(dim=-1).all()):
            raise VectorError(
                "a zero vector cannot be added in proportion (add_matched): it has no direction. Use write='add', or another vector"
            )
        value = value * (old.norm(dim=-1, keepdim=True) / value.norm(dim=-1, keepdim=True))
    return old + value
