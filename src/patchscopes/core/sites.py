"""Sites: places in a model where a value can be read or written, named `name.index`.

    resid.ℓ       residual stream at layer ℓ, 0…L             [batch, pos, d_model]
    attn_out.b    what attention adds to it in block b        [batch, pos, d_model]
    mlp_out.b     what the MLP adds to it in block b          [batch, pos, d_model]

`*` stands for every index, a negative index counts from the end. TransformerLens' names are accepted and printed as ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchscopes.core.errors import SiteError, nearest
from patchscopes.core.layers import resolve_layers

NAMES = ("resid", "attn_out", "mlp_out")
_TRANSFORMER_LENS = {
    "resid_pre": ("resid", 0),
    "resid_post": ("resid", 1),
    "attn_out": ("attn_out", 0),
    "mlp_out": ("mlp_out", 0),
}


@dataclass(frozen=True, order=True)
class Site:
    """One place: the residual stream at layer `index`, or an output of block `index`."""

    name: str
    index: int

    def __str__(self) -> str:
        return f"{self.name}.{self.index}"


def resolve_sites(text: str, n_layers: int) -> list[Site]:
    """The sites that `text` names ("resid.3", "resid.*", "attn_out.-1", "blocks.2.hook_resid_post"). SiteError if there is none."""
    text = _from_transformer_lens(text.strip())
    name, _, index = text.partition(".")
    if name not in NAMES:
        raise SiteError(f"unknown site {text!r}: expected name.index with a name of {', '.join(NAMES)}. {nearest(name, NAMES)}")
    count = n_layers + (name == "resid")
    if index == "*":
        return [Site(name, i) for i in range(count)]
    if not re.fullmatch(r"-?\d+", index):
        raise SiteError(f"site {text!r} has no index; expected {name}.0 to {name}.{count - 1}, or {name}.* for all")
    if not -count <= int(index) < count:
        raise SiteError(f"site {text!r} is out of range; this model has {name}.0 to {name}.{count - 1} (-1 is the last)")
    return [Site(name, resolve_layers(int(index), count - 1)[0])]


def _from_transformer_lens(text: str) -> str:
    match = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?(\w+)", text) or re.fullmatch(r"(resid_pre|resid_post)\.(\d+)", text)
    if match is None:
        return text
    first, second = match.groups()
    index, name = (first, second) if first.isdigit() else (second, first)
    if name not in _TRANSFORMER_LENS:
        return text
    ours, shift = _TRANSFORMER_LENS[name]
    return f"{ours}.{int(index) + shift}"
