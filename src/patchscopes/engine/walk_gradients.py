"""Gradients of what patched runs say next with respect to the vectors written, through runs that begin where the edit is made.

    m_r = metric(logits after the target's last token in row r)        ∂m_r / ∂v_r

Rows share prefix and base (see `patch`), which hold no gradient: what stands there does not depend on the vectors. On models that
cannot be differentiated behind a prefix (states updated in place) the whole prompt runs, from the layer of the edit on; else plain
hooks do. Which of these is right is measured once a model, on a few random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.core.errors import InputError
from patchscopes.core.sites import Site
from patchscopes.engine.costs import activation_bytes
from patchscopes.engine.engine import Engine
from patchscopes.engine.gradients import frozen
from patchscopes.engine.memory import free_bytes
from patchscopes.engine.patch import ROUTES, Route, Stem
from patchscopes.engine.refuse import refuse_quantised
from patchscopes.engine.rows import Row
from patchscopes.engine.tolerance import tolerance

LogitMetric = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]


@dataclass(frozen=True, eq=False)
class WalkGradients:
    """metric [row], and for each row ∂ metric / ∂ value, [d_model]."""

    metric: Float[Tensor, " row"]
    values: list[Tensor]


def walk_gradients(engine: Engine, target: Int[Tensor, "1 pos"], rows: Sequence[Row], metric: LogitMetric) -> WalkGradients:
    """Of every row, which must write something. `metric` gets the next token's logits [row, vocab], some rows at a time."""
    if any(row.value is None for row in rows):
        raise InputError("a row writes nothing, so there is nothing to take a gradient of; expected a vector in each")
    refuse_quantised(engine.model)
    return _by_route(engine, target, rows, metric, route_of(engine))


def route_of(engine: Engine) -> Route:
    """The fastest route whose gradients are those of plain hooks. Measured once."""
    if engine.gradient_route is None:
        length = 10 if engine.context is None else min(10, engine.context)
        ids = torch.randint(min(3, engine.vocab - 1), engine.vocab, (1, length), generator=torch.Generator().manual_seed(1))
        ids = ids.to(engine.device)
        states = engine.read(ids, range(engine.n_layers + 1)).h
        layers = sorted({0, engine.n_layers // 2, engine.n_layers - 1})
        tries = []  # a continuation that is shorter than its prefix, and one that is longer: attention may be computed in another way
        for position in sorted({length - 2, min(2, length - 2)}):
            rows = [Row(Site("resid", layer), position, states[layer][..., 0, 1, :].clone()) for layer in layers]
            tries.append((rows, _by_route(engine, ids, rows, _first_logit, "hooks")))
        scale = max(float(g.float().abs().max()) for _, truth in tries for g in truth.values) or 1.0
        allowed = tolerance(tries[0][1].values[0].dtype, engine.device) * scale
        engine.gradient_route = next(
            route for route in ROUTES if all(_agrees(engine, ids, rows, route, truth, allowed) for rows, truth in tries)
        )
    return engine.gradient_route


def _first_logit(logits: Tensor) -> Tensor:
    return logits[:, 0]


def _agrees(engine: Engine, ids: Tensor, rows: Sequence[Row], route: Route, truth: WalkGradients, allowed: float) -> bool:
    if route == "hooks":
        return True
    try:
        got = _by_route(engine, ids, rows, _first_logit, route)
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
    ):  # a model's own code, on a pass it was not made for
        return False
    pairs = zip(got.values, truth.values, strict=True)
    return max(float((a - b).float().abs().max()) for a, b in pairs) <= allowed


def _by_route(engine: Engine, target: Tensor, rows: Sequence[Row], metric: LogitMetric, route: Route) -> WalkGradients:
    last = target.shape[1] - 1
    order = sorted(range(len(rows)), key=lambda r: rows[r].join(engine.n_layers))  # rows that skip as many blocks run together
    found: dict[int, tuple[Tensor, Tensor]] = {}
    stem = Stem(engine, target, rows, route=route, caching=False, shared=None)
    each = engine.n_layers * activation_bytes(engine, target.shape[1] - stem.start, target.shape[1]) + 12.0 * engine.vocab
    size = max(1, int(free_bytes(engine.device) / 4 / each))
    with frozen(engine.model), torch.enable_grad():
        for some in (order[k : k + size] for k in range(0, len(order), size)):
            values = [value.detach().clone().requires_grad_() for r in some if (value := rows[r].value) is not None]
            leaves = [replace(rows[r], value=value) for r, value in zip(some, values, strict=True)]
            with stem.attending():
                number = metric(stem.walk(leaves, [last]).logits[:, 0])
                if number.shape != (len(some),):
                    raise InputError(f"the metric gave {tuple(number.shape)}; expected one number for each row, ({len(some)},)")
                gradients = torch.autograd.grad(number.sum(), values)
            found.update({r: (m.detach(), g) for r, m, g in zip(some, number, gradients, strict=True)})
    return WalkGradients(torch.stack([found[r][0] for r in range(len(rows))]), [found[r][1] for r in range(len(rows))])
