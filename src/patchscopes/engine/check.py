"""What is exact on this model: measured at load, on one short random prompt, against full passes with plain hooks.

A method that needs an ability which the model lacks takes the slower exact path, or refuses with the reason found here. An attempt
that raises counts as "not able", whatever it raises. Errors are the largest difference relative to the largest reference logit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchscopes.core.errors import PatchscopesError, RefusedError
from patchscopes.core.sites import Site
from patchscopes.engine import check_packing
from patchscopes.engine.engine import Engine
from patchscopes.engine.given import Images, unchanged
from patchscopes.engine.hooks import Handle, hooked, on_output
from patchscopes.engine.packing import Packing
from patchscopes.engine.patch import Route, Stem, next_logits
from patchscopes.engine.rows import Row
from patchscopes.engine.tolerance import tolerance as tolerance_of

PROMPT = 12  # tokens, fewer if the context is shorter
STEPS = 3  # tokens decoded after it

MEANING = {
    "own_pass": "passes with the positions that are given explicitly equal the model's own",
    "hooks_seen": "a hook that changes the residual stream changes the logits",
    "no_op": "hooks that change nothing leave the logits bit-identical",
    "identity": "a state patched onto itself changes nothing, at every layer",
    "unembed": "layer L, decoded alone, gives the model's logits",
    "stairs": "runs resumed at any layer on a shared prefix equal full passes, first token and after",
    "whole": "runs resumed at any layer without a prefix equal full passes, first token and after",
    "readout": "runs resumed at any layer without a cache give the full pass's next token",
    "decoding": "the model's own cached decoding equals its own full pass",
    "left_padding": "a left-padded prompt gives what it gives alone",
    "padded_steps": "a left-padded prompt goes on, token by token from the cache, as it does alone",
    "rows_independent": "a prompt in a batch gives what it gives alone",
    "shared_prefix": "rows that hold their prompt's keys and values together equal rows that hold copies",
    "ragged": "rows of prompts of different lengths give in one batch what they give alone",
    "gaps": "rows that enter a batch while others are being decoded give what they give alone",
    "writers": "each layer is the one before plus attention and MLP outputs",
}


@dataclass(frozen=True)
class Ability:
    """ok, how far off it was (nan: it raised), and why not."""

    ok: bool
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Capabilities:
    """The abilities of one model, by name; `MEANING` says what each compares. `tolerance` is relative to the largest logit."""

    abilities: dict[str, Ability]
    tolerance: float

    def ok(self, name: str) -> bool:
        """Whether the model has this ability."""
        return self.abilities[name].ok

    def require(self, name: str, what: str) -> None:
        """RefusedError, with the reason, if the model lacks the ability that `what` needs."""
        ability = self.abilities[name]
        if not ability.ok:
            raise RefusedError(
                f"{what} is refused on this model: not so that {MEANING[name]} ({ability.reason}). See `patchscopes check`."
            )

    @property
    def route(self) -> Route:
        """The fastest exact way to run patched prompts and generate from them."""
        return "stairs" if self.ok("stairs") else "whole" if self.ok("whole") else "hooks"

    @property
    def packing(self) -> Packing:
        """What the rows of one batch may share."""
        stairs = self.ok("stairs")
        return Packing(
            stairs and self.ok("shared_prefix"), stairs and self.ok("ragged"), self.route != "hooks" and self.ok("gaps")
        )

    @property
    def readout_route(self) -> Route:
        """The fastest exact way to the next token of patched prompts."""
        return "stairs" if self.ok("stairs") else "whole" if self.ok("readout") else "hooks"


@torch.no_grad()
def check(engine: Engine, dtype: torch.dtype) -> Capabilities:
    """Measure all abilities. Random numbers are seeded; the model is left as it was."""
    tolerance = tolerance_of(dtype, engine.device)
    generator = torch.Generator().manual_seed(0)
    top = engine.n_layers
    low = min(3, engine.vocab - 1)
    length = PROMPT if engine.context is None else max(6, min(PROMPT, engine.context - STEPS))
    ids = torch.randint(low, engine.vocab, (1, length), generator=generator).to(engine.device)
    plain = engine.read(ids, range(top + 1))
    reference = plain.logits
    scale = float(reference.float().abs().max()) or 1.0

    def random_vector(layer: int) -> Tensor:
        like = plain.h[layer][..., 0, 0, :]
        return (torch.randn(like.shape, generator=generator) * float(plain.h[layer].float().std())).to(like)

    places = (length - 5, length - 3, length - 1, length - 4)
    rows = [Row(Site("resid", layer), places[layer % 4], random_vector(layer), target=layer) for layer in range(top + 1)]
    rows = [rows[k] for k in torch.randperm(len(rows), generator=generator).tolist()]  # every layer, in no order
    said = torch.randint(low, engine.vocab, (top + 1, STEPS), generator=generator).to(engine.device)
    # several paddings: where attention picks its keys (HY-V4) they do harm to some prompts and not to others
    pads = [*range(STEPS + 1), *range(1, STEPS + 1)]
    long = torch.randint(low, engine.vocab, (len(pads), length + STEPS), generator=generator).to(engine.device)
    shared = [Row(row.site, row.position, row.value) for row in rows]  # the same of one target

    def continued(route: Route) -> Tensor:
        """Logits after the prompt and after each of the tokens `said`, decoded from the cache that the walk leaves."""
        walked = Stem(engine, ids, shared, route=route).walk(shared, [length - 1], caching=True)
        if walked.cache is None:
            raise RefusedError("the model takes no cache")
        steps = [walked.logits[:, 0]]
        mine = said[[row.target for row in rows]]
        for t in range(STEPS):
            steps.append(engine.forward(mine[:, t : t + 1], offset=length + t, cache=walked.cache, keep=[0])[:, 0])
        return torch.stack(steps, 1)

    def oracle(steps: int) -> Tensor:
        """The same by full passes over prompt and tokens, patched by plain hooks, without a cache."""
        whole = torch.cat([ids.expand(top + 1, -1), said[:, :steps]], 1)
        return Stem(engine, whole, rows, route="hooks").walk(rows, range(length - 1, length + steps)).logits

    def behind_two_tokens() -> Tensor:
        """A continuation longer than what it continues: wrong in Doge of transformers 5.15, where a shorter one is right."""
        cache = engine.new_cache()
        engine.forward(ids[:, :2], cache=cache, keep=[1])
        return engine.forward(ids[:, 2:], offset=2, cache=cache)

    def cached_decoding() -> Tensor:
        cache = engine.new_cache()
        if cache is None:
            raise RefusedError("the model takes no cache")
        first = length // 2  # sparse attention (DeepSeek-V3.2, HY-V4) goes wrong at some tokens, so several are looked at
        engine.forward(ids[:, :first], cache=cache, keep=[0])
        steps = [engine.forward(ids[:, t : t + 1], offset=t, cache=cache, keep=[0]) for t in range(first, length)]
        return torch.cat(steps, 1)

    def cached_oracle() -> Tensor:
        """For models whose one-token step differs from their own full pass: hooks in the prompt pass, then their own steps."""

        def put(layer: int) -> Handle:
            def change(x: Tensor) -> Tensor:
                x = x.clone()
                for r, row in enumerate(rows):
                    if row.site.index == layer:
                        x[..., r, row.position, :] = row.value
                return x

            return engine.at_layer(layer, change)

        cache = engine.new_cache()
        with hooked(put(layer) for layer in range(top + 1)):
            steps = [engine.forward(ids.expand(top + 1, -1), cache=cache, keep=[length - 1])[:, 0]]
        mine = said[[row.target for row in rows]]
        for t in range(STEPS):
            steps.append(engine.forward(mine[:, t : t + 1], offset=length + t, cache=cache, keep=[0])[:, 0])
        return torch.stack(steps, 1)

    def padded() -> Tensor:
        mask = torch.ones_like(long)
        for row, some in enumerate(pads):
            mask[row, :some] = 0
        out = engine.forward(long, mask=mask, positions=(mask.cumsum(-1) - 1).clamp(min=0))
        return torch.cat([out[row, some:] for row, some in enumerate(pads)])

    def unpadded() -> Tensor:
        return torch.cat([engine.forward(long[row : row + 1, some:])[0] for row, some in enumerate(pads)])

    def padded_steps() -> Tensor:
        pads, last = 3, length - 1
        both = torch.cat([ids[:, :pads], ids], 1).repeat(2, 1)
        mask = torch.ones_like(both)
        mask[0, :pads] = 0
        positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), engine.new_cache()
        engine.forward(both[:, :-1], cache=cache, mask=mask[:, :-1], positions=positions[:, :-1], keep=[0])
        return engine.forward(both[:, -1:], offset=last + pads, cache=cache, mask=mask, positions=positions[:, -1:])[:1]

    def in_batch() -> Tensor:
        other = torch.randint(low, engine.vocab, (3, length), generator=generator).to(engine.device)
        return engine.forward(torch.cat([other, ids]))[-1:]

    def no_op() -> Tensor:
        sites = [Site("resid", layer) for layer in range(top + 1)]
        with hooked(engine.at_site(site, torch.clone) for site in sites):
            return engine.forward(ids)

    def onto_itself() -> Tensor:
        states = [plain.h[layer][..., 0, length - 2, :] for layer in range(top + 1)]
        same = [Row(Site("resid", layer), length - 2, state) for layer, state in enumerate(states)]
        return next_logits(engine, ids, same, "hooks")

    def zeroed() -> Tensor:
        with hooked([on_output(engine.blocks[top // 2], torch.zeros_like)]):
            return engine.forward(ids)

    found: dict[str, Ability] = {}

    def measure(
        name: str, compute: Callable[[], Tensor], against: Callable[[], Tensor] | Tensor, allowed: float = tolerance
    ) -> None:
        try:
            expected = against() if callable(against) else against
            error = float((compute() - expected).float().abs().max()) / scale
        except torch.OutOfMemoryError:  # says nothing of the model, and must not be remembered as if it did
            raise
        # whatever a model's own code makes of a run that it was not written for: the ability is absent, and the reason is kept
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, NotImplementedError, PatchscopesError) as e:
            found[name] = Ability(False, math.nan, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}")
            return
        ok = error <= allowed
        found[name] = Ability(ok, error, "" if ok else f"off by {error:.1e} of the largest logit, allowed {allowed:.0e}")

    measure("own_pass", lambda: engine.own_logits(ids), reference)
    measure("hooks_seen", zeroed, reference)
    moved = found["hooks_seen"].error
    found["hooks_seen"] = Ability(moved > 1e-6, moved, "" if moved > 1e-6 else "zeroing a block's output changed nothing")
    measure("no_op", no_op, reference, allowed=0.0)
    measure("identity", onto_itself, reference[:, -1])
    measure("unembed", lambda: engine.unembed(plain.h[top][..., 0, :, :]), reference[0])
    measure("decoding", cached_decoding, reference[:, length // 2 :])
    # Zamba-2 and Nemotron-H clamp the time step in a long pass and not in a one-token step (transformers 5.23): close, not equal
    stepwise = tolerance / 10 < found["decoding"].error < max(1e-2, tolerance)
    truth = functools.cache(cached_oracle if stepwise else lambda: oracle(STEPS))
    measure(
        "stairs",
        lambda: torch.cat([continued("stairs").flatten(), behind_two_tokens().flatten()]),
        lambda: torch.cat([truth().flatten(), reference[:, 2:].flatten()]),
    )
    measure("whole", lambda: continued("whole"), truth)
    if not found["decoding"].ok and not stepwise:  # what held for the tokens above need not hold for others
        why = "the model's own cached decoding differs from its own full pass"
        found |= {name: Ability(False, found[name].error, why) for name in ("stairs", "whole") if found[name].ok}
    measure("readout", lambda: next_logits(engine, ids, shared, "whole"), lambda: oracle(0)[:, 0])
    mine = said[[row.target for row in rows]]
    measure("shared_prefix", lambda: check_packing.sharing_prefix(engine, ids, shared, mine), truth)
    modes = (False, True) if found["shared_prefix"].ok else (False,)
    measure(
        "ragged",
        lambda: torch.stack(
            [
                *(check_packing.ragged(engine, ids, shared, mine, shared=mode) for mode in modes),
                check_packing.ragged_early(engine, ids, shared, mine),
            ]
        ),
        lambda: torch.cat([truth(), check_packing.shorter(engine, ids, shared, mine)]).expand(len(modes) + 1, -1, -1, -1),
    )
    way: Route = "stairs" if found["stairs"].ok else "whole"
    modes = modes if way == "stairs" else (False,)
    measure(
        "gaps",
        lambda: torch.stack([check_packing.entering(engine, ids, shared, mine, route=way, shared=mode) for mode in modes]),
        lambda: truth().expand(len(modes), -1, -1, -1),
    )
    measure("left_padding", padded, unpadded)
    measure("padded_steps", padded_steps, reference[:, -1:], allowed=max(tolerance, 1e-2 if stepwise else 0.0))
    measure("rows_independent", in_batch, reference)
    most = 3 if engine.encodes else 2  # attention to the encoded text is a third
    lacking = [b for b, writers in enumerate(engine.anatomy.writers) if not 1 <= len(writers) <= most]
    reason = (
        f"{'one to three' if engine.encodes else 'one or two'} module outputs do not add up to what blocks {lacking} add"
        if lacking
        else ""
    )
    found["writers"] = Ability(not lacking, 0.0 if not lacking else math.nan, reason)
    return Capabilities(found, tolerance)


@torch.no_grad()
def check_images(engine: Engine, images: Images, inputs: dict[str, Tensor], able: Capabilities) -> Capabilities:
    """The abilities of a model bound to a prompt with images: `able`, less what does not hold for it.

    RefusedError if a pass with the positions and inputs that the engine gives is not the model's own.
    """
    ids, top = images.ids, engine.n_layers
    with unchanged(engine.model):
        plain = {name: value.to(engine.device) for name, value in inputs.items() if name != "attention_mask"}
        own = engine.model(**plain, use_cache=False).logits
    scale = float(own.float().abs().max()) or 1.0
    found = engine.read(ids, range(top + 1))
    off = float((found.logits - own).float().abs().max()) / scale
    if not off <= able.tolerance:
        raise RefusedError(
            f"a pass over the prompt with images differs from the model's own by {off:.1e} of the largest logit (allowed "
            f"{able.tolerance:.0e}): its positions or its inputs are not understood. Use the model without images."
        )
    abilities = dict(able.abilities)
    abilities["left_padding"] = Ability(False, math.nan, "prompts with images are not padded")
    first, last = (int(k) for k in images.are_in(ids)[0].nonzero()[:, 0][[0, -1]])
    end = ids.shape[1] - 1
    generator = torch.Generator().manual_seed(0)

    def row(layer: int, position: int) -> Row:
        like = found.h[layer][..., 0, 0, :]
        return Row(Site("resid", layer), position, (torch.randn(like.shape, generator=generator) * float(like.std())).to(like))

    middle = top // 2
    rows = [
        row(layer, place) for layer in (0, middle, top) for place in sorted({max(first - 1, 0), last, min(last + 1, end), end})
    ]
    routes: dict[str, tuple[Route, list[Row]]] = {
        "stairs": ("stairs", rows),
        "whole": ("whole", rows),
        "readout": ("whole", rows),
    }
    truth = torch.cat([next_logits(engine, ids, [one], "hooks") for one in rows])
    for name, (route, some) in routes.items():
        if not able.ok(name):
            continue
        try:
            error = float((next_logits(engine, ids, some, route) - truth).float().abs().max()) / scale
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, PatchscopesError) as e:
            abilities[name] = Ability(False, math.nan, f"with images: {type(e).__name__}: {e}".splitlines()[0])
            continue
        if not error <= able.tolerance:
            abilities[name] = Ability(False, error, f"with images: off by {error:.1e} of the largest logit")
    return Capabilities(abilities, able.tolerance)
