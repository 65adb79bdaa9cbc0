"""Where a state goes: which layers and which places of the target, as one row of the engine.

A state is [layer, span, d_model]: of one token of one layer mostly. What stands below ℓ* at the placeholder stays the placeholder's,
in keys and values that later tokens attend to (placeholder contamination, Ghandeharioun et al. 2024, 4.3 and D.3). `spread` says at
which layers beside ℓ* something is written, `carry` what:

    spread "here"       ℓ* alone
           "below"      every layer up to ℓ*: nothing of the placeholder is left
           (0, 1, -2)   ℓ*, ℓ* + 1, ℓ* − 2; those that there are
    carry  "one"        the same vector in all of them
           "each"       into ℓ* + k the source's state at ℓ + k
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from patchscopes.core.edits import Write
from patchscopes.core.errors import InputError, UnknownName
from patchscopes.core.sites import Site
from patchscopes.engine.edits import Placed
from patchscopes.engine.rows import Row
from patchscopes.scopes.target import Target

Spread = Literal["here", "below"] | tuple[int, ...]
Carry = Literal["one", "each"]


def require_spread(spread: object, carry: object) -> None:
    """UnknownName or InputError for what is neither."""
    if not isinstance(spread, tuple) and spread not in ("here", "below"):
        raise UnknownName(f"spread is {spread!r}; expected 'here', 'below', or distances from the target layer such as (0, 1)")
    if isinstance(spread, tuple) and 0 not in spread:
        raise InputError(f"spread is {spread}; expected distances from the target layer, 0 (the layer itself) among them")
    if carry not in ("one", "each"):
        raise UnknownName(
            f"carry is {carry!r}; expected 'one' (the same vector in all layers) or 'each' (a state of its own in each)"
        )


def steps(spread: Spread, carry: Carry, source: tuple[int, int], target: tuple[int, int]) -> list[int]:
    """Distances from ℓ* at which something is written, 0 first. source, target: (layer, the last layer that there is)."""
    wanted = range(-target[0], 1) if spread == "below" else (0,) if spread == "here" else spread
    ends = [target, source] if carry == "each" else [target]
    found = [k for k in dict.fromkeys(wanted) if k and all(0 <= layer + k <= top for layer, top in ends)]
    return [0, *sorted(found)]


def row_of(
    state: Float[Tensor, "layer span *stream d_model"] | None,
    target: Target,
    layer: int,
    steps: Sequence[int],
    *,
    site: str,
    write: Write,
    more: tuple[Placed, ...],
) -> Row:
    """The run in which `state` is written: [:, k] at the k-th placeholder, or its only one at all; [k] at the k-th of `steps`, or
    its only one at all. None: nothing is written but `more`, and the prompt's last logits are wanted."""
    if state is None:
        return Row(Site(site, layer), len(target.tokens) - 1, None, write, more=more)
    further = []
    for k, step in enumerate(steps):
        one = state[k if len(state) > 1 else 0]  # [span, …, d_model]
        places = target.positions if step else target.positions[1:]
        values = one if step or len(one) == 1 else one[1:]
        if places:
            value = values[0] if len(values) == 1 else values
            further.append(Placed(Site(site, layer + step), 0, places, value, write))
    return Row(Site(site, layer), target.position, state[0, 0], write, more=(*more, *further))
