"""Sites: places in a model where a value can be read or written, named `name.index[.head]`.

Of the residual stream, layer ℓ in 0…L:

    resid.ℓ                                         [batch, pos, d_model]

of block b in 0…L−1:

    attn_in.b    mlp_in.b                           what attention and MLP read (normed, where the block norms)
    attn_out.b   mlp_out.b                          what they add to the residual stream    [batch, pos, d_model]
    attn_scale.b mlp_scale.b                        what their norm divides by              [batch, pos, 1]
    q.b  k.b  v.b  z.b                              queries, keys (both after the rotary embedding), values; pattern · v
                                                    [batch, pos, head, d_head]; k and v have the key-value heads
    head_out.b                                      what each head adds                     [batch, pos, head, d_model]
    scores.b  pattern.b                             before and after the softmax            [batch, head, query, key]
    neurons.b                                       what the MLP's last linear map reads    [batch, pos, d_mlp]
    router.b                                        logits of the experts                   [batch, pos, expert]
    expert_out.b                                    what each expert says, routed or not    [batch, pos, expert, d_model]
    gate.b delta.b B.b C.b                          of a state-space mixer: the gate before its activation, the time step Δ, and the
                                                    maps into and out of the state          [batch, pos, …]
    state.b                                         its state after each token              [batch, pos, …]

and of the whole model: `embed` (token embeddings), `final_norm`, `final_scale`, `logits`.

`*` stands for every index ("resid.*"), "2:6" for a range, a negative index counts from the end; a head (or expert) may follow:
"z.3.1". TransformerLens' names are accepted and printed as ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchscopes.core.errors import LayerError, SiteError, nearest
from patchscopes.core.layers import resolve_layers

SCOPED = ("resid", "attn_in", "attn_out", "mlp_in", "mlp_out")  # d_model wide, with an index: what scopes read and write
WHOLE = ("embed", "final_norm", "final_scale", "logits")  # of the model, not of a block
EDGES = ("scores", "pattern")
HEADS = ("q", "k", "v", "z", "head_out")
STATE_SPACE = ("gate", "delta", "B", "C", "state")
NAMES = (
    "resid",
    "embed",
    *SCOPED[1:],
    *("attn_scale", "mlp_scale", *HEADS, *EDGES, "neurons", "router", "expert_out"),
    *STATE_SPACE,
    *WHOLE[1:],
)
_HEADED = (*HEADS, *EDGES, "expert_out")  # those that may be followed by a head or an expert
_TRANSFORMER_LENS = {
    "resid_pre": ("resid", 0),
    "resid_post": ("resid", 1),
    "attn_out": ("attn_out", 0),
    "mlp_out": ("mlp_out", 0),
    "attn.hook_rot_q": ("q", 0),  # hook_q and hook_k are before the rotary embedding there: no site of ours
    "attn.hook_rot_k": ("k", 0),
    "attn.hook_v": ("v", 0),
    "attn.hook_z": ("z", 0),
    "attn.hook_result": ("head_out", 0),
    "attn.hook_attn_scores": ("scores", 0),
    "attn.hook_pattern": ("pattern", 0),
    "mlp.hook_post": ("neurons", 0),
    "ln1.hook_normalized": ("attn_in", 0),
    "ln2.hook_normalized": ("mlp_in", 0),
    "ln1.hook_scale": ("attn_scale", 0),
    "ln2.hook_scale": ("mlp_scale", 0),
}
_TRANSFORMER_LENS_WHOLE = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm", "ln_final.hook_scale": "final_scale"}


@dataclass(frozen=True)
class Site:
    """One place: the residual stream at layer `index`, a place in block `index`, or one of the whole model (index 0).

    `head`: one head or expert of it; None: all.
    """

    name: str
    index: int = 0
    head: int | None = None

    def __str__(self) -> str:
        head = "" if self.head is None else f".{self.head}"
        return self.name if self.name in WHOLE else f"{self.name}.{self.index}{head}"

    def __lt__(self, other: Site) -> bool:
        return self._key < other._key

    @property
    def _key(self) -> tuple[str, int, int]:
        return self.name, self.index, -1 if self.head is None else self.head

    @property
    def whole(self) -> Site:
        """The same place with all its heads."""
        return Site(self.name, self.index)

    @property
    def features(self) -> int:
        """How many axes follow [batch, pos]: 2 where there are heads (or experts), else 1. Edges: see `EDGES`."""
        return 2 if self.name in _HEADED else 1


def resolve_sites(text: str, n_layers: int) -> list[Site]:
    """The sites that `text` names ("resid.3", "z.2.0", "attn_out.*", "blocks.2.hook_resid_post"). SiteError if there is none."""
    text = _from_transformer_lens(text.strip())
    name, _, place = text.partition(".")
    index, _, head = place.partition(".")
    if name not in NAMES:
        raise SiteError(f"unknown site {text!r}: expected name.index with a name of {', '.join(NAMES)}. {nearest(name, NAMES)}")
    if name in WHOLE:
        if place:
            raise SiteError(f"site {text!r}: {name} belongs to the whole model and has no index; write {name!r}")
        return [Site(name)]
    if head and (name not in _HEADED or not re.fullmatch(r"\d+|\*", head)):
        what = "has no heads" if name not in _HEADED else f"has {head!r} where a head (0, 1, …) may stand"
        raise SiteError(f"site {text!r} {what}; expected {name}.{index}" + (" or, for one head, .0" if name in _HEADED else ""))
    count = n_layers + (name == "resid")
    one = None if head in ("", "*") else int(head)
    if index == "*":
        return [Site(name, i, one) for i in range(count)]
    if not re.fullmatch(r"-?\d+|-?\d*:-?\d*", index):
        raise SiteError(f"site {text!r} has no index; expected {name}.0 to {name}.{count - 1}, {name}.2:6, or {name}.* for all")
    try:
        return [Site(name, i, one) for i in resolve_layers(index, count - 1)]
    except LayerError:
        raise SiteError(
            f"site {text!r} is out of range; this model has {name}.0 to {name}.{count - 1} (-1 is the last)"
        ) from None


def _from_transformer_lens(text: str) -> str:
    if text in _TRANSFORMER_LENS_WHOLE:
        return _TRANSFORMER_LENS_WHOLE[text]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", text) or re.fullmatch(r"(resid_pre|resid_post)\.(\d+)", text)
    if match is None:
        return text
    first, second = match.groups()
    index, name = (first, second) if first.isdigit() else (second, first)
    name = name if name in _TRANSFORMER_LENS else name.removeprefix("hook_")
    if name not in _TRANSFORMER_LENS:
        return text
    ours, shift = _TRANSFORMER_LENS[name]
    return f"{ours}.{int(index) + shift}"
