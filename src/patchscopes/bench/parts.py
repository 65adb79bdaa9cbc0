"""The parts of the benchmark. Each measures one thing and gives figures: ratios, with their goals.

grid      every contestant on a grid of vectors × target layers, for each number of tokens; FLOPs and bytes against the floor
stops     the same on the bundled model, with a scope's own stop strings
prefix    what a long prefix costs: a first call on a target, and a later one
reads     a pass that reads the residual stream at every layer against the plain pass
memory    the peak of a grid against what its rows cannot do without
runs      what recording costs (see `recorded`); only if asked for by name
decoding  tokens a second of a big grid against plain `generate` of as many rows, and the share of the memory's bandwidth
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from patchscopes.bench.contestants import Contestant, answer_of, local, plain_generate
from patchscopes.bench.floor import Floor, floor, own_kv_bytes
from patchscopes.bench.measure import counted_bytes, counted_flops, peak_bytes, timed, token_blocks
from patchscopes.bench.models import Subject
from patchscopes.bench.report import Figure
from patchscopes.bench.turns import Progress, Score, ratios, take_turns
from patchscopes.bench.work import Work, grid, stop_at
from patchscopes.core.errors import InputError
from patchscopes.core.sites import Site
from patchscopes.engine.run import run
from patchscopes.engine.shape import Shape, measure

PARTS = ("grid", "stops", "prefix", "reads", "memory", "decoding", "runs")
ON_GPU = ("decoding",)  # run on a CPU only if asked for by name
SHORT, LONG = 20, 400  # tokens before i*
FLOPS_GOAL = {1: 1.05}  # executed / necessary, at most; more tokens: 1.10
TIME_GOALS = {  # contestant / ours, at least: (next token, more tokens)
    "hooks": (12, 1.8),
    "one_at_a_time": (40, 15),
    "nnsight": (12, None),
    "transformer_lens": (12, None),
    "interp_engine": (12, None),
}
READS = (8, 64)  # prompts and tokens of the pass that is read
ROWS = 1000  # of the grid that decodes
ENTITIES = ("France", "Brazil", "Marie Curie", "copper", "Diana, Princess of Wales", "Japan")


@dataclass(frozen=True)
class Settings:
    """What the user chose. `suffix`: tokens of the target from i* on; `alone`: cells that `one_at_a_time` runs (None: all)."""

    tokens: tuple[int, ...] = (1, 20)
    prefix: int = 22
    suffix: int = 2
    vectors: int = 12
    repeat: int = 5
    alone: int | None = 24
    rows: int = ROWS
    seed: int = 0


@dataclass
class Found:
    """What the parts found: figures, the scores behind them by table, and what else is worth keeping, as plain data."""

    figures: list[Figure] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    floors: dict[str, Any] = field(default_factory=dict)


def grids(
    s: Subject, settings: Settings, *, prefix: int, tokens: int, count: int, vectors: int | None = None, seed: int | None = None
) -> list[Work]:
    """`count` grids of one size, each with its own target and vectors. InputError if they do not fit the model's context."""
    length = prefix + settings.suffix + tokens
    if s.engine.context is not None and length > s.engine.context:
        raise InputError(
            f"a prefix of {prefix}, {settings.suffix} tokens more and {tokens} generated are {length}, but {s.name} reads at most "
            f"{s.engine.context}; give a smaller --prefix or --tokens, leave out the part 'prefix' (--parts), or take another model"
        )
    make = partial(
        grid, s.engine.n_layers, s.d_model, s.engine.vocab, prefix=prefix, suffix=settings.suffix, tokens=tokens, device=s.device
    )
    return [
        make(vectors=vectors or settings.vectors, seed=settings.seed + 1000 * n + prefix + 10**6 * tokens, like=s.dtype)
        for n in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------------- grid


def grid_part(s: Subject, contestants: Sequence[Contestant], settings: Settings, found: Found, progress: Progress) -> None:
    """Every contestant on the same grids."""
    shape = measure(s.engine)
    for tokens in settings.tokens:
        works = grids(s, settings, prefix=settings.prefix, tokens=tokens, count=settings.repeat + 1)
        what = f"grid, {_count(tokens)}"
        scores = take_turns(contestants, s, works, count=True, progress=progress, what=what)
        necessary = floor(shape, works[0])
        found.floors[what] = _plain_floor(necessary)
        found.scores[what] = {name: plain_score(score, scores["ours"]) for name, score in scores.items()}
        found.figures += _counted(s, works[0], necessary, scores["ours"].flops, what)
        found.figures += _times(scores, tokens, what)


def _counted(s: Subject, work: Work, necessary: Floor, flops: int | None, what: str) -> list[Figure]:
    first, second = s.anew(), s.anew()  # each a first call on the target
    _, traffic = counted_bytes(lambda: answer_of(first.engine, work), s.hf)
    with token_blocks(second.engine) as calls:
        answer_of(second.engine, work)
    n, layers, length = len(work.layers), s.engine.n_layers, work.length
    blocks = layers * length + sum(layers - layer for layer in work.layers) * (length - work.position)
    blocks += (work.tokens - 1) * n * layers
    goal = FLOPS_GOAL.get(work.tokens, 1.10)
    needed = necessary.flops.total
    figures = [
        Figure(
            "grid",
            f"{what}: FLOPs executed / necessary",
            flops / needed if flops else None,
            at_most=goal,
            note=f"{(flops or 0) / 1e9:.3f} of {needed / 1e9:.3f} GFLOP, attention run eagerly",
        ),
        Figure(
            "grid",
            f"{what}: token-blocks run / necessary",
            sum(calls) / blocks if calls else None,
            note=f"{sum(calls)} of {blocks}",
        ),
        Figure(
            "grid",
            f"{what}: weight bytes read / necessary",
            traffic.weights / necessary.weight_bytes,
            note=f"{traffic.weights / 1e9:.2f} of {necessary.weight_bytes / 1e9:.2f} GB",
        ),
        Figure(
            "grid",
            f"{what}: bytes that operators moved / necessary",
            traffic.moved / necessary.n_bytes,
            note=f"{traffic.moved / 1e9:.2f} of {necessary.n_bytes / 1e9:.2f} GB; as if nothing stayed in a cache",
        ),
    ]
    return figures


def _times(scores: dict[str, Score], tokens: int, what: str) -> list[Figure]:
    figures = []
    for name, score in scores.items():
        if name == "ours":
            continue
        goal = TIME_GOALS.get(name, (None, None))[tokens > 1]
        figures.append(_time(what, name, score, scores["ours"], goal))
    return figures


def _time(what: str, name: str, score: Score, ours: Score, goal: float | None) -> Figure:
    label = f"{what}: {name} / ours, wall time"
    if score.failure:
        return Figure("grid", label, None, at_least=goal, note=f"not available: {score.failure}")
    found = ratios(score, ours)
    if not found:
        wrong = score if score.agreement is not None and not score.agreement.ok else ours
        why = wrong.failure or (wrong.agreement.reason if wrong.agreement else "")
        return Figure("grid", label, None, at_least=goal, note=f"disagrees, so no ratio ({wrong.name}): {why}")
    note = f"{score.median:.3f} s against {ours.median:.3f} s; {min(found):.1f} to {max(found):.1f} in {len(found)} repetitions"
    if score.variant:
        note += f"; fastest way: {score.variant}"
    if score.sampled:
        note += "; from some cells, scaled"
    return Figure("grid", label, statistics.median(found), at_least=goal, note=note)


# ------------------------------------------------------------------------------------------------------------------ stops


def stops_part(device: str | None, settings: Settings, found: Found, progress: Progress) -> None:
    """The bundled model describes real states until its scope's stop strings; the examples are permuted for each repetition."""
    from patchscopes.model import load
    from patchscopes.scopes.describe import EXAMPLES, describe
    from patchscopes.scopes.target import resolve_target

    model = load("atlas", device=device)
    s = Subject("atlas", model.hf, model.tokenizer, model.engine, model.decode, model.end_ids)
    tokens = max(settings.tokens)
    layers = model.n_layers
    read = [layers // 4, layers // 2]
    states = [
        model.run(f"We talked about {name}", read=[f"resid.{layer}" for layer in read]).at(f"resid.{layer}", position=-1)
        for name in ENTITIES
        for layer in read
    ]
    vectors = torch.stack(states).repeat(layers, 1)
    rows = tuple(layer for layer in range(layers) for _ in states)
    works = []
    for _, names in zip(range(settings.repeat + 1), itertools.permutations(EXAMPLES), strict=False):  # five repetitions at most
        scope = describe({name: EXAMPLES[name] for name in names}, max_new_tokens=tokens, stop=(",", "\n"))
        target = resolve_target(model, scope.prompt if isinstance(scope.prompt, str) else "", scope.position)
        ids = target.tokens.tensor.to(model.device)
        works.append(Work(ids, target.position, rows, vectors, tokens, model.end_ids, stop_at(model.decode, scope.stop)))
    contestants = [local(name, s, alone=settings.alone) for name in ("ours", "hooks", "one_at_a_time")]
    what = f"atlas, up to {_count(tokens)} and a stop"
    scores = take_turns(contestants, s, works, count=False, progress=progress, what=what)
    found.scores[what] = {name: plain_score(score, scores["ours"]) for name, score in scores.items()}
    fresh = s.anew()
    answer, flops = counted_flops(lambda: answer_of(fresh.engine, works[1]), s.hf)
    said = statistics.mean(map(len, answer.tokens))
    needed = floor(measure(s.engine), works[1], [min(len(said) + 1, tokens) for said in answer.tokens])
    found.floors[what] = _plain_floor(needed)
    found.figures.append(
        Figure(
            "stops",
            f"{what}: FLOPs executed / necessary",
            flops / needed.flops.total,
            note=f"{flops / 1e9:.3f} of {needed.flops.total / 1e9:.3f} GFLOP; rows say {said:.1f} tokens on average",
        )
    )
    found.figures += [_time(what, name, score, scores["ours"], None) for name, score in scores.items() if name != "ours"]


# ----------------------------------------------------------------------------------------------------------------- prefix


def prefix_part(s: Subject, settings: Settings, found: Found, progress: Progress) -> None:
    """A one-token grid behind a long prefix and a short one. A later call has the same target and other vectors; what the target left
    in its unpatched run is remembered."""
    times: dict[tuple[int, str], list[float]] = {(n, call): [] for n in (SHORT, LONG) for call in ("first", "later")}
    works = {n: grids(s, settings, prefix=n, tokens=1, count=2 * settings.repeat + 2) for n in (SHORT, LONG)}
    for n in range(settings.repeat + 1):
        progress(n, settings.repeat + 1, "prefix")
        for prefix in (SHORT, LONG) if n % 2 else (LONG, SHORT):
            first, other = works[prefix][2 * n], works[prefix][2 * n + 1]
            later = Work(first.target, first.position, first.layers, other.vectors, 1)
            with s.engine.remembering():
                for call, work in (("first", first), ("later", later)):
                    _, seconds = timed(lambda work=work: answer_of(s.engine, work), s.device)
                    if n:  # the first round warms up
                        times[prefix, call].append(seconds)
    progress(settings.repeat + 1, settings.repeat + 1, "prefix")
    shape = measure(s.engine)
    necessary = [floor(shape, works[n][0]) for n in (LONG, SHORT)]
    bound = {
        "first": necessary[0].flops.total / necessary[1].flops.total,
        "later": (necessary[0].rows.total) / (necessary[1].rows.total),
    }
    for call, goal in (("first", None), ("later", 1.5)):
        pairs = list(zip(times[LONG, call], times[SHORT, call], strict=True))
        medians = [statistics.median(times[n, call]) for n in (LONG, SHORT)]
        found.figures.append(
            Figure(
                "prefix",
                f"one-token grid at prefix {LONG} / prefix {SHORT}, a {call} call on a target",
                statistics.median(a / b for a, b in pairs),
                at_most=goal,
                note=f"{medians[0]:.3f} s against {medians[1]:.3f} s; the floor's own ratio of FLOPs is {bound[call]:.2f}",
            )
        )


# ------------------------------------------------------------------------------------------------------------------ reads


def reads_part(s: Subject, settings: Settings, found: Found, progress: Progress) -> None:
    """One pass with a read at every layer, as `model.run` does it, against the model's own forward."""
    batch, length = READS
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, s.engine.vocab, (batch, min(length, s.engine.context or length)), generator=generator).to(s.device)
    sites = [Site("resid", layer) for layer in range(s.engine.n_layers)]
    prompts = list(ids.split(1))

    def plain() -> Any:
        with torch.no_grad():
            return s.hf(ids, use_cache=False).logits

    def reading() -> Any:
        return run(s.engine, prompts, sites, [], padding_exact=True).logits

    repeat = 4 * settings.repeat  # these are short, and their difference is small
    pairs: list[tuple[float, float]] = []
    for n in range(repeat + 1):
        progress(n, repeat + 1, "reads")
        order = (plain, reading) if n % 2 else (reading, plain)
        seconds = {f: timed(f, s.device)[1] for f in order}
        if n:
            pairs.append((seconds[reading], seconds[plain]))
    progress(repeat + 1, repeat + 1, "reads")
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    found.figures.append(
        Figure(
            "reads",
            f"a forward with {len(sites)} residual reads / the plain forward",
            statistics.median(a / b for a, b in pairs),
            at_most=1.03,
            note=f"{medians[0]:.4f} s against {medians[1]:.4f} s, {batch} prompts of {ids.shape[1]} tokens",
        )
    )


# ----------------------------------------------------------------------------------------------------------------- memory


def memory_part(s: Subject, settings: Settings, found: Found, progress: Progress) -> None:
    """The most bytes alive beyond the weights, against the rows' own keys and values and one batch of activations: the peak of one
    plain pass, without a cache, over as many rows of as many tokens as the grid's prompt pass has."""
    tokens = max(settings.tokens)
    (warm, work) = grids(s, settings, prefix=settings.prefix, tokens=tokens, count=2)
    progress(0, 1, "memory")
    answer_of(s.engine, warm.part(range(min(2, len(warm.layers)))))
    _, peak = peak_bytes(lambda: answer_of(s.engine, work), s.device)
    own = own_kv_bytes(measure(s.engine), work)
    ids = work.target[:, work.position :].expand(len(work.layers), -1)

    def plain() -> Any:
        with torch.no_grad():
            return s.hf(ids, use_cache=False, logits_to_keep=1).logits

    _, activations = peak_bytes(plain, s.device)
    progress(1, 1, "memory")
    found.figures.append(
        Figure(
            "memory",
            f"peak of a grid, {_count(tokens)}, beyond the weights / (rows' own keys and values + one batch of activations)",
            peak / (own + activations),
            at_most=1.5,
            note=f"{peak / 2**20:.0f} MiB against {own / 2**20:.0f} + {activations / 2**20:.0f} MiB",
        )
    )


# --------------------------------------------------------------------------------------------------------------- decoding


def decoding_part(s: Subject, settings: Settings, found: Found, progress: Progress) -> None:
    """Tokens a second after the first: (rows · (m − 1)) / (time for m tokens − time for one), of the grid and of `generate`."""
    tokens = max(2, *settings.tokens)
    vectors = -(-settings.rows // s.engine.n_layers)
    make = partial(grids, s, settings, prefix=settings.prefix, count=settings.repeat + 1, vectors=vectors)
    works = [_first_rows(work, settings.rows) for work in make(tokens=tokens)]
    ones = [_first_rows(work, settings.rows) for work in make(tokens=1)]  # targets of their own
    plain = partial(plain_generate, s)
    ours = partial(answer_of, s.engine)
    speeds: dict[Any, list[float]] = {plain: [], ours: []}
    for n, work in enumerate(works):
        progress(n, len(works), "decoding")
        for say in (plain, ours) if n % 2 else (ours, plain):
            with torch.no_grad():
                both = [timed(lambda w=w, say=say: say(w), s.device)[1] for w in (ones[n], work)]
            if n:
                speeds[say].append(len(work.layers) * (tokens - 1) / (both[1] - both[0]))
    progress(len(works), len(works), "decoding")
    ratio = statistics.median(a / b for a, b in zip(speeds[ours], speeds[plain], strict=True))
    per_second = statistics.median(speeds[ours])
    rows = len(works[0].layers)
    found.figures.append(
        Figure(
            "decoding",
            f"tokens a second of a grid of {rows} rows / plain generate of as many",
            ratio,
            at_least=0.9,
            note=f"{per_second:.0f} against {statistics.median(speeds[plain]):.0f} tokens a second",
        )
    )
    shape = measure(s.engine)
    moved = _step_bytes(shape, works[0])
    bandwidth = copy_bandwidth(s.device)
    found.figures.append(
        Figure(
            "decoding",
            "share of the memory's bandwidth while decoding one block of rows",
            moved * per_second / rows / bandwidth,
            note=f"{moved / 1e9:.2f} GB a step by the floor; a copy moves {bandwidth / 1e9:.0f} GB a second here",
        )
    )


def _first_rows(work: Work, n: int) -> Work:
    """n rows, spread over the layers."""
    total = len(work.layers)
    return work.part([i * total // n for i in range(min(n, total))]) if n < total else work


def _step_bytes(shape: Shape, work: Work) -> float:
    """Bytes that one step of decoding cannot do without: all weights once, and each row's keys and values."""
    middle = work.length + work.tokens // 2
    kv = sum(b.kv_heads * (b.d_qk + b.d_v) * b.seen(middle) for b in shape.blocks) * shape.element
    return sum(b.n_bytes for b in shape.blocks) + shape.head_bytes + len(work.layers) * kv


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the best of five."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(lambda: target.copy_(source), device)[1] for _ in range(6))


# ---------------------------------------------------------------------------------------------------------- as plain data


def plain_score(score: Score, ours: Score) -> dict[str, Any]:
    """A score as JSON has it."""
    found = ratios(score, ours)
    return {
        "seconds": score.seconds,
        "median_seconds": score.median if score.seconds else None,
        "ratio": statistics.median(found) if found else None,
        "ratios": found,
        "variant": score.variant,
        "warm_up_seconds": score.warm_up,
        "flops": score.flops,
        "sampled": score.sampled,
        "agreement": None if score.agreement is None else asdict(score.agreement),
        "failure": score.failure or None,
    }


def _plain_floor(f: Floor) -> dict[str, Any]:
    return {
        "flops": f.flops.total,
        "flops_without_attention": f.flops.matmul,
        "base": asdict(f.base),
        "rows": asdict(f.rows),
        "decode": asdict(f.decode),
        "weight_bytes": f.weight_bytes,
        "kv_bytes": f.kv_bytes,
    }


def _count(tokens: int) -> str:
    return "one token" if tokens == 1 else f"{tokens} tokens"


Part = Callable[[Subject, Settings, Found, Progress], None]
OWN_PARTS: dict[str, Part] = {"prefix": prefix_part, "reads": reads_part, "memory": memory_part, "decoding": decoding_part}
