"""The parts of a decoder, found by their behaviour and not by the model's name.

* Blocks: the ModuleList of `num_hidden_layers` members that run once each, in order, the output of one being bit for bit the
  input of the next.
* Residual writers of block b: the modules whose outputs make up what the block adds,

      resid[b+1] = a · resid[b] + Σ cᵢ · outᵢ,

  found among all modules inside the block by least squares: the smallest set, and in it the outermost modules, that leaves a
  relative error below 1e-5 with a ≠ 0. The first to run is the attention (or whatever mixes positions), the second the MLP.
* Carried: what a block returns beside the hidden state and the next block takes as an argument (T5's position bias, the indices of
  GLM's sparse attention, Zaya's router states), seen by the identity of the tensors.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchscopes.core.errors import RefusedError
from patchscopes.engine.hooks import Handle, first_tensor, hooked, map_tensors, on_arguments

TOLERANCE = 1e-5
COARSE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # the same in 16 bits, where a fit is only the first of two tests
LISTS = 8  # how many module lists are tried
DEPTH = 3  # how deep inside a block a residual writer may lie


@dataclass(frozen=True)
class Writer:
    """`scale` · the output of `module` is added to the residual stream; `path` is its name inside the block."""

    module: nn.Module
    path: str
    scale: float


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    blocks       L modules; block b turns layer b into layer b + 1
    writers      for each block its writers in the order in which they run; empty where no set explains the block
    carries      for each block a, by which it multiplies the stream before it adds to it; 1 nearly everywhere
    rest         what a block returns after the hidden state, None if it returns a bare tensor
    carried      for each block: path of an argument -> index in `rest` of what the block before returned there
    cache_name   the model's argument that takes a cache, if it takes one
    batch_axes   (block, path of an argument) -> (batch axis, entries a row); None where they could not be measured
    """

    blocks: list[nn.Module]
    blocks_path: str
    writers: list[tuple[Writer, ...]]
    carries: list[float]
    rest: tuple | None
    cache_name: str | None
    takes_positions: bool
    takes_keep: bool
    carried: list[dict[tuple, int]]
    batch_axes: dict[tuple, tuple[int, int]] | None = None

    @property
    def n_layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    def parts(self) -> dict[str, str]:
        """The parts by name, as `patchscopes check` prints them."""
        writers = sorted({" + ".join(w.path for w in some) or "not additive" for some in self.writers})
        return {"blocks": f"{self.blocks_path} ({self.n_layers})", "residual writers": "; ".join(writers)}


@torch.no_grad()
def find_anatomy(model: nn.Module, device: torch.device, given: dict[str, Any]) -> Anatomy:
    """The parts of a Hugging Face language model with a decoder, all but `batch_axes`. RefusedError, with what was found, without one.

    given: what a pass gets beside its tokens (for encoder–decoders the encoder's output).
    """
    whole: Any = model.config
    config = whole.get_text_config(decoder=True)
    n_layers, kind = getattr(config, "num_hidden_layers", None), type(model).__name__
    ids = torch.arange(1, 9, device=device).remainder(config.vocab_size).unsqueeze(0)
    ids_name = "decoder_input_ids" if given else "input_ids"

    def run(ids: Tensor) -> Any:
        return model(**{ids_name: ids}, **given, use_cache=False)

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    # The biggest first, whatever its length: LongCat-Flash counts two layers a block, T5's config the layers of its encoder. Smaller
    # ones may be parts of a block that run one after the other, too.
    likely = sorted(lists, key=lambda item: -sum(p.numel() for p in item[1].parameters()))
    for path, blocks in likely[:LISTS]:  # noqa: B007 (both are used after the loop)
        trace = _trace(run, list(blocks), ids)
        if trace is not None:
            break
    else:
        found = ", ".join(f"{name} ({len(m)})" for name, m in lists) or "none"
        raise RefusedError(
            f"no decoder stack found in {kind}: of its module lists ({found}) none holds the {n_layers} blocks that its config "
            "names, running one after the other. patchscopes reads causal language models (decoders)."
        )
    if not _is_causal(run, ids):
        raise RefusedError(
            f"no decoder stack found: in {kind} early positions see later ones, so it is an encoder. "
            "patchscopes reads causal language models (decoders)."
        )
    found = [_writers(b, trace) for b in range(len(blocks))]
    takes = inspect.signature(model.forward).parameters
    return Anatomy(
        blocks=list(blocks),
        blocks_path=path,
        writers=[writers for writers, _ in found],
        carries=[carry for _, carry in found],
        rest=trace.rest,
        cache_name=next((name for name in ("past_key_values", "cache_params") if name in takes), None),
        takes_positions="position_ids" in takes,
        takes_keep="logits_to_keep" in takes,
        carried=trace.carried,
    )


@dataclass
class _Trace:
    """One pass seen from inside: the blocks' inputs and outputs, and in each block (path, module, output) as they ran."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    inside: list[list[tuple[str, nn.Module, Tensor]]] = field(default_factory=list)
    rest: tuple | None = None
    carried: list[dict[tuple, int]] = field(default_factory=list)


def _trace(run: Callable[[Tensor], Any], blocks: list[nn.Module], ids: Tensor) -> _Trace | None:
    """The trace if `blocks` run once each, in order, handing the hidden state on unchanged; else None."""
    trace, order = _Trace(inside=[[] for _ in blocks]), []
    handed: list[Any] = []  # what the block before returned after the hidden state

    def enter(b: int) -> Handle:
        def note(args: tuple, kwargs: dict) -> None:
            if args and isinstance(args[0], Tensor):
                order.append(b)
                trace.inputs.append(args[0].clone())
                trace.carried.append({})

                def compare(path: tuple, t: Tensor) -> Tensor:
                    same = [j for j, other in enumerate(handed) if other is t]
                    if same:
                        trace.carried[-1][path] = same[0]
                    return t

                map_tensors(compare, (args[1:], kwargs))

        return on_arguments(blocks[b], note)

    def leave(b: int) -> Handle:
        def note(_module: nn.Module, _args: tuple, out: Any) -> None:
            value = first_tensor(out)
            if value is not None:
                trace.outputs.append(value.clone())
                handed[:] = out[1:] if isinstance(out, (tuple, list)) else []
                trace.rest = tuple(None if torch.is_tensor(x) else x for x in handed) if out is not value else None

        return Handle(lambda: blocks[b].register_forward_hook(note))

    def look(b: int, path: str, module: nn.Module) -> Handle:
        def note(_module: nn.Module, _args: tuple, out: Any) -> None:
            value = first_tensor(out)
            if value is not None and value.is_floating_point():
                trace.inside[b].append((path, module, value.clone()))

        return Handle(lambda: module.register_forward_hook(note))

    hooks = [hook for b in range(len(blocks)) for hook in (enter(b), leave(b))]
    hooks += [
        look(b, path, module)
        for b, block in enumerate(blocks)
        for path, module in block.named_modules()
        if path and path.count(".") < DEPTH and not isinstance(module, nn.ModuleList)
    ]
    with hooked(hooks):
        run(ids)
    if order != list(range(len(blocks))) or len(trace.outputs) != len(blocks):
        return None
    if any(not torch.equal(a.to(b.device), b) for a, b in zip(trace.outputs, trace.inputs[1:], strict=False)):
        return None
    return trace


def _writers(b: int, trace: _Trace) -> tuple[tuple[Writer, ...], float]:
    """The writers of block b, in running order, and a of the formula; () and 1 if no set of at most three explains what the block adds."""
    start, end = trace.inputs[b].cpu(), trace.outputs[b].cpu()  # on a GPU torch solves no least squares of deficient rank
    before, after = start.double().flatten(), end.double().flatten()
    candidates: list[tuple[str, nn.Module, Tensor]] = []
    for path, module, out in trace.inside[b]:
        if out.numel() != after.numel():
            continue
        value = out.cpu().double().flatten()
        same = next((i for i, (_, _, other) in enumerate(candidates) if torch.equal(other, value)), None)
        if same is None:
            candidates.append((path, module, value))
        elif path.count(".") < candidates[same][0].count("."):  # the outermost of modules with equal outputs
            candidates[same] = (path, module, value)
    columns = torch.stack([before, *(value for _, _, value in candidates)])
    gram, aim = columns @ columns.T, columns @ after
    coarse = end.dtype in COARSE
    for size in (1, 2, 3):
        fits = []
        for chosen in itertools.combinations(range(1, len(columns)), size):
            index = torch.tensor([0, *chosen])
            c = torch.linalg.lstsq(gram[index][:, index], aim[index], driver="gelsd").solution
            error = (c @ columns[index] - after).norm() / after.norm()
            if error >= (COARSE[end.dtype] if coarse else TOLERANCE) or c.abs().min() <= 1e-3:
                continue
            numbers = [_plain(float(x), 2 if coarse else 3, 2e-2 if coarse else 1e-4) for x in c]
            if coarse and not _replays(start, [candidates[i - 1][2] for i in chosen], numbers, end):
                continue
            depth = sum(candidates[i - 1][0].count(".") for i in chosen)
            fits.append((float((c[1:] - c[1]).abs().max()) > (2e-2 if coarse else 1e-3), depth, chosen, numbers))
        if fits:
            _, _, chosen, (carry, *scales) = min(fits, key=lambda fit: fit[:3])
            writers = tuple(
                Writer(candidates[i - 1][1], candidates[i - 1][0], scale) for i, scale in zip(chosen, scales, strict=True)
            )
            return writers, carry
    return (), 1.0


def _plain(x: float, digits: int, near: float) -> float:
    """x, or the number of few digits that it is meant to be."""
    return round(x, digits) if abs(x - round(x, digits)) < near else x


def _replays(before: Tensor, outs: Sequence[Tensor], numbers: Sequence[float], after: Tensor) -> bool:
    """Whether adding the outputs up in the model's own number format gives the same bits, in some order: in 16 bits rounding hides
    what a fit leaves out, and large entries hide it too."""
    carry, *scales = numbers
    start = before.flatten() if carry == 1 else before.flatten() * carry
    parts = [out.to(after.dtype) if s == 1 else out.to(after.dtype) * s for out, s in zip(outs, scales, strict=True)]
    orders = [functools.reduce(torch.add, some, start) for some in itertools.permutations(parts)]
    orders += [start + functools.reduce(torch.add, some) for some in itertools.permutations(parts)]
    return any(torch.equal(x.to(after.dtype), after.flatten()) for x in orders)


def _is_causal(run: Callable[[Tensor], Any], ids: Tensor) -> bool:
    other = ids.clone()
    other[0, -1] = 0
    a, b = (run(x).logits[0, :-1] for x in (ids, other))
    exact = a.dtype in (torch.float32, torch.float64)
    return bool((a - b).abs().max() <= (1e-5 if exact else 1e-2) * a.abs().max())
