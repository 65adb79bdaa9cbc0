"""Edits: what to write where. Data, not code: they print, save, load, compare and hash.

With x what stands at the site, v the edit's value and a its amount, x becomes

    replace          v                        scale          a x
    replace_matched  a v ‖x‖ / ‖v‖            interpolate    x + a (v − x)
    add              x + a v                  mask           x · v, elementwise
    add_matched      x + a v ‖x‖ / ‖v‖
    stop_gradient  x, behind which no gradient flows
    knock_out      no attention from `position` to `keys`: −∞ at `scores`, 0 at `pattern`

Through a coordinate system the same is done to its features (`coordinates`), or to some of them (`features`).
`project_out`, `swap`, `knock_out`, `freeze` and `stop_gradient` below make the common ones; `save_edits` and `load_edits` are in
`edit_files`, and reached from here too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from patchscopes.core.coordinates import Coordinates, Subspace
from patchscopes.core.errors import InputError, SiteError, UnknownName, VectorError, nearest
from patchscopes.core.positions import Positions
from patchscopes.core.sites import EDGES, resolve_sites

if TYPE_CHECKING:
    from patchscopes.core.edit_files import load_edits as load_edits
    from patchscopes.core.edit_files import save_edits as save_edits

Write = Literal["replace", "add", "add_matched", "replace_matched", "scale", "interpolate", "mask", "stop_gradient", "knock_out"]
WRITES: tuple[Write, ...] = (
    "replace",
    "add",
    "add_matched",
    "replace_matched",
    "scale",
    "interpolate",
    "mask",
    "stop_gradient",
    "knock_out",
)
OF_SCOPES: tuple[Write, ...] = ("replace", "add", "add_matched", "replace_matched")  # what a Patchscope may do with a state
_WITHOUT_VALUE = ("scale", "stop_gradient", "knock_out")
Steps = Literal["prompt", "always"] | tuple[int, ...]


def __getattr__(name: str) -> Any:
    if name in ("save_edits", "load_edits"):
        from patchscopes.core import edit_files

        return getattr(edit_files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class Edit:
    """Write at a site ("resid.2", "z.3.1", "pattern.*") and at positions of a prompt, or of every prompt if `prompt` is None.

    position     indices of real tokens, negative from the end, or pieces of the prompt's text; a list of them; None: all tokens.
                 At `scores` and `pattern`: of the queries
    value        [width]; or [head, width] at sites with heads; or with an axis [position, …] in front, one for each
    amount       a of the formulas above
    keys         only at `scores` and `pattern`: the positions attended to; None: all
    steps        "prompt": in the prompt; "always": and at every token generated after it; (0, 2): at the first and the third of
                 these only (then position is not used)
    coordinates  the value is in these coordinates, and everything else of what stands there is kept
    features     only these coordinates
    """

    site: str
    position: Positions = None
    value: Tensor | None = None
    write: Write = "replace"
    prompt: int | None = None
    amount: float = 1.0
    keys: Positions = None
    steps: Steps = "prompt"
    coordinates: Coordinates | None = None
    features: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.write not in WRITES:
            raise UnknownName(f"unknown write {self.write!r}. {nearest(str(self.write), WRITES)}")
        if (self.value is None) != (self.write in _WITHOUT_VALUE):
            wants = "takes no value" if self.value is not None else "needs a value"
            raise VectorError(f"the edit {self.write!r} at {self.site} {wants}")
        if not math.isfinite(self.amount):
            raise VectorError(f"the edit at {self.site} has the amount {self.amount}; expected a finite number")
        edges = self.site.split(".")[0] in EDGES or "scores" in self.site or "pattern" in self.site
        if self.keys is not None and not edges:
            raise SiteError(f"keys were given for {self.site}; only {' and '.join(EDGES)} have keys")
        if self.write == "knock_out" and not edges:
            raise SiteError(f"knock_out at {self.site}: attention is knocked out at {' or '.join(EDGES)}")
        if self.features is not None and not len(self.features):
            raise InputError(f"the edit at {self.site} names no features; leave them out to write all, or leave out the edit")
        some = isinstance(self.steps, tuple) and bool(self.steps) and all(t >= 0 for t in self.steps)
        if not (some or self.steps in ("prompt", "always")):
            raise InputError(
                f"steps is {self.steps!r}; expected 'prompt', 'always', or numbers of generated tokens such as (0, 2)"
            )

    def __repr__(self) -> str:
        shown = [repr(self.site)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                shown.append(f"{field.name}={str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
            elif value != field.default:
                shown.append(f"{field.name}={value.name if field.name == 'coordinates' else repr(value)}")
        return f"Edit({', '.join(shown)})"

    @property
    def digest(self) -> str:
        """A hash of everything in it: "sha256:…"."""
        from patchscopes.core.edit_files import described  # which knows edits, and imports this module

        tensors: dict[str, Tensor] = {}
        digest = hashlib.sha256(json.dumps(described(self, "0", tensors), sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
            digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@runtime_checkable
class HasSites(Protocol):
    """A run, as far as `freeze` needs it."""

    @property
    def mask(self) -> Tensor:
        """[batch, pos], True at real tokens."""
        ...

    @property
    def n_layers(self) -> int:
        """Of the model."""
        ...

    def __getitem__(self, site: str) -> Tensor: ...


# ------------------------------------------------------------------------------------------------------------------- the common ones


def project_out(site: str, directions: Tensor, position: Positions = None, **where: Any) -> Edit:
    """Take everything along `directions` [*, width] away."""
    return Edit(site, position, write="scale", amount=0.0, coordinates=Subspace.spanned_by(directions), **where)


def swap(site: str, directions: Tensor, state: Tensor, position: Positions = None, **where: Any) -> Edit:
    """Replace what lies in the span of `directions` by what `state` [width], of another run, has there."""
    space = Subspace.spanned_by(directions)
    return Edit(site, position, space.encode(state), coordinates=space, **where)


def knock_out(
    blocks: str | int, queries: Positions, keys: Positions, *, heads: Sequence[int] = (), after: bool = False, **where: Any
) -> list[Edit]:
    """No attention from `queries` to `keys` in `blocks` (3, "2:6", "*"): before the softmax, so that the others get more;
    or `after` it, so that they do not."""
    name = EDGES[after]
    sites = [f"{name}.{blocks}.{head}" for head in heads] or [f"{name}.{blocks}"]
    return [Edit(site, queries, write="knock_out", keys=keys, **where) for site in sites]


def freeze(run: HasSites, sites: Iterable[str]) -> list[Edit]:
    """Set these sites to what they were in `run`, all prompts and positions: a pattern, a norm's scale ("attn_scale.3"), anything."""
    found = []
    for site in (one for text in sites for one in resolve_sites(text, run.n_layers)):
        value = run[str(site)].detach()
        if site.name not in EDGES:  # streams, which some models have in front, follow the position
            inner = value.ndim - 2 if site.name == "state" else site.features - (site.head is not None)
            value = value.movedim((-2 - inner, -1 - inner), (0, 1))
        for prompt, real in enumerate(run.mask):
            at = real.nonzero()[:, 0].to(value.device)
            own = value[prompt][..., at, :][..., at] if site.name in EDGES else value[prompt][at]
            found.append(Edit(str(site), None, own, prompt=prompt))
    return found


def stop_gradient(site: str, position: Positions = None, **where: Any) -> Edit:
    """Let no gradient flow back through a site."""
    return Edit(site, position, write="stop_gradient", **where)


# --------------------------------------------------------------------------------------------------------------------------- written


def written(
    value: Tensor | None,
    old: Tensor,
    write: Write,
    amount: float | Tensor = 1.0,
    coordinates: Coordinates | None = None,
    features: Sequence[int] | None = None,
) -> Tensor:
    """What stands at the site afterwards. value, old: [..., width]. VectorError for a zero vector with "add_matched" and
    "replace_matched"."""
    if coordinates is not None:
        f = coordinates.encode(old)
        if features is None and value is not None and value.ndim and value.shape[-1] not in (1, f.shape[-1]):
            raise VectorError(f"the value is {value.shape[-1]} wide, but {coordinates.name} has {f.shape[-1]} features")
        g = written(value, f, write, amount, None, features)
        return old + (coordinates.decode(g) - coordinates.decode(f))
    if features is not None:
        width, count = old.shape[-1], len(features)
        if not all(0 <= feature < width for feature in features):
            raise VectorError(f"features {tuple(features)} were named, but there are {width}, counted from 0")
        if value is not None and value.ndim and value.shape[-1] not in (1, count, width):
            raise VectorError(
                f"the value is {value.shape[-1]} wide; expected {count}, one for each feature named, or all {width}"
            )
        index = torch.tensor(list(features), device=old.device)
        some = old.index_select(-1, index)
        if value is not None and value.ndim and value.shape[-1] not in (1, count):
            value = value.index_select(-1, index.to(value.device))
        return old.index_copy(-1, index, written(value, some, write, amount))
    if value is None:
        return {"scale": lambda: old * amount, "stop_gradient": old.detach}[write]()
    value = value.to(old)
    if write == "replace":
        return value.expand_as(old)
    if write == "mask":
        return old * value
    if write == "interpolate":
        return old + amount * (value - old)
    if write in ("add_matched", "replace_matched"):
        if not bool(value.any(dim=-1).all()):
            done, plainly = ("added", "add") if write == "add_matched" else ("written", "replace")
            raise VectorError(
                f"a zero vector cannot be {done} in proportion ({write}): it has no direction. Use write='{plainly}', or another vector"
            )
        value = value * (old.norm(dim=-1, keepdim=True) / value.norm(dim=-1, keepdim=True))
        if write == "replace_matched":
            return (amount * value).expand_as(old)
    plain = isinstance(amount, float) and amount == 1.0
    return old + (value if plain else amount * value)
