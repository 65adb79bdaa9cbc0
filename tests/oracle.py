"""What everything fast must equal: full passes of a Hugging Face model over one prompt, one plain hook for an edit, no cache.

Written against transformers alone: nothing of patchscopes is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from families import FIRST, LAYOUT, WRITERS, blocks_of
from torch import Tensor, nn

CLOSE = 1e-4  # of the largest logit, in float32


@dataclass(frozen=True, eq=False)
class Patch:
    """One edit of a prompt: `value` [d_model], or [stream, d_model], at `site` ("resid.3") and `position` (from 0)."""

    site: str
    position: int
    value: Tensor
    write: str = "replace"


@contextmanager
def patched(hf: nn.Module, family: str, patch: Patch | None, ratios: list[float] | None = None) -> Iterator[None]:
    """One hook on the module that holds the site. `ratios` collects ‖after‖ / ‖before‖ of what stands there, one a pass."""
    if patch is None:
        yield
        return
    name, index = patch.site.split(".")
    blocks, b = blocks_of(hf, family), int(index)
    factor = 1.0 if name == "resid" else WRITERS[family][2]

    def put(x: Tensor) -> Tensor:
        if name == "resid" and family in LAYOUT:
            return put_in_order(x.movedim(LAYOUT[family], (-3, -2))).movedim((-3, -2), LAYOUT[family]).contiguous()
        return put_in_order(x)

    def put_in_order(x: Tensor) -> Tensor:
        new = x.clone()
        place = new[..., 0, patch.position, :] if x.ndim > 2 else new[patch.position]  # some modules see one row of all tokens
        old, value = place * factor, patch.value
        length = old.norm(dim=-1, keepdim=True)
        matched = value * (length / value.norm(dim=-1, keepdim=True))
        after = {"replace": value, "add": old + value, "add_matched": old + matched, "replace_matched": matched}
        if ratios is not None:
            ratios.append(float((after[patch.write].norm(dim=-1, keepdim=True) / length).mean()))
        place.copy_(after[patch.write] / factor)
        return new

    def on_output(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        return type(out)([put(out[0]), *out[1:]]) if isinstance(out, (tuple, list)) else put(out)

    if name != "resid":
        writer = WRITERS[family][("attn_out", "mlp_out").index(name)]
        handle = blocks[b].get_submodule(writer).register_forward_hook(on_output)
    elif b < len(blocks):
        handle = blocks[b].register_forward_pre_hook(lambda _module, args: (put(args[0]), *args[1:]))
    else:
        handle = blocks[-1].register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def full_logits(hf: nn.Module, family: str, ids: Sequence[int], *patches: Patch | None) -> Tensor:
    """Logits [pos, vocab] of one full pass."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patched(hf, family, patch))
        return hf(torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def states(hf: nn.Module, family: str, ids: Tensor) -> dict[str, Tensor]:
    """What plain hooks see in one pass over `ids` [batch, pos]: resid.0 … resid.L, attn_out.b, mlp_out.b; and "logits"."""
    blocks, seen, handles = blocks_of(hf, family), {}, []
    attention, mlp, factor = WRITERS.get(family, (None, None, 1))

    def on_output(site: str, factor: float) -> None:
        def look(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> None:
            value = out[0] if isinstance(out, (tuple, list)) else out
            value = (value if factor == 1 else value * factor).clone()
            if site.startswith("resid") and family in LAYOUT:
                value = value.movedim(LAYOUT[family], (-3, -2))
            seen[site] = value.reshape(*ids.shape, -1) if value.ndim == 2 else value

        return look

    for b, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda module, args, b=b: on_output(f"resid.{b}", 1)(module, (), args[0])))
        for name, path in (("attn_out", attention), ("mlp_out", mlp)):
            if path is not None:
                handles.append(block.get_submodule(path).register_forward_hook(on_output(f"{name}.{b}", factor)))
    handles.append(blocks[-1].register_forward_hook(on_output(f"resid.{len(blocks)}", 1)))
    try:
        seen["logits"] = hf(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass(frozen=True, eq=False)
class Said:
    """A greedy continuation.

    logits      [step, vocab], those that chose the tokens
    leads       by how much each token led, as a share of the largest logit
    norm_ratio  ‖what stands at the site afterwards‖ / ‖what stood there‖, 1 where nothing was written
    """

    tokens: list[int]
    logits: Tensor
    leads: list[float]
    norm_ratio: float


def say(hf: nn.Module, family: str, ids: Sequence[int], patch: Patch | None, steps: int) -> Said:
    """The whole text again for every token, patched at the same absolute position each time."""
    tokens, logits, ratios = [], [], []
    for _ in range(steps):
        with patched(hf, family, patch, ratios):
            last = full_logits(hf, family, [*ids, *tokens])[-1]
        tokens.append(int(last.argmax()))
        logits.append(last)
    top = torch.stack(logits).topk(2).values
    leads = (top[:, 0] - top[:, 1]) / torch.stack(logits).abs().amax(-1)
    return Said(tokens, torch.stack(logits), leads.tolist(), ratios[0] if ratios else 1.0)


def say_with_cache(hf: nn.Module, family: str, ids: Sequence[int], patch: Patch | None, steps: int) -> Said:
    """`say` for models whose own one-token step is not their own full pass: one patched pass over the prompt, then their own steps."""
    tokens, logits, ratios = [], [], []
    with torch.no_grad(), patched(hf, family, patch, ratios):
        out = hf(torch.tensor([list(ids)]), use_cache=True)
    for step in range(steps):
        last = out.logits[0, -1]
        tokens.append(int(last.argmax()))
        logits.append(last)
        if step + 1 < steps:
            at = torch.tensor([[len(ids) + step]])
            with torch.no_grad():
                out = hf(
                    torch.tensor([tokens[-1:]]),
                    past_key_values=out.past_key_values,
                    position_ids=at + FIRST.get(family, 0),
                    use_cache=True,
                )
    top = torch.stack(logits).topk(2).values
    leads = (top[:, 0] - top[:, 1]) / torch.stack(logits).abs().amax(-1)
    return Said(tokens, torch.stack(logits), leads.tolist(), ratios[0] if ratios else 1.0)


def gradient(hf: nn.Module, family: str, ids: Sequence[int], patch: Patch, token: int) -> Tensor:
    """∂ logit of `token` after `ids` / ∂ the vector that `patch` writes, by autograd through the hooked full pass."""
    value = patch.value.clone().requires_grad_()
    with torch.enable_grad(), patched(hf, family, Patch(patch.site, patch.position, value)):
        logit = hf(torch.tensor([list(ids)]), use_cache=False).logits[0, -1, token]
    return torch.autograd.grad(logit, value)[0]


def padded_logits(hf: nn.Module, family: str, ids: Sequence[int], pads: int) -> Tensor:
    """Logits [pos, vocab] of `ids` behind so many padded places, beside a row without any, as transformers wants it."""
    both = torch.tensor([[*ids[:pads], *ids]] * 2)
    mask = torch.ones_like(both)
    mask[0, :pads] = 0
    takes = inspect.signature(hf.forward).parameters
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0) + FIRST.get(family, 0)} if "position_ids" in takes else {}
    with torch.no_grad():
        return hf(both, attention_mask=mask, use_cache=False, **positions).logits[0, pads:]


def text_log_p(hf: nn.Module, family: str, ids: Sequence[int], patch: Patch | None, text: Sequence[int]) -> Tensor:
    """log p (nats) of each token of `text` after `ids`, from one full pass over both."""
    if not len(text):
        return torch.zeros(0)
    log_p = full_logits(hf, family, [*ids, *text], patch).log_softmax(-1)
    return torch.stack([log_p[len(ids) - 1 + k, token] for k, token in enumerate(text)])


def random_patches(
    hf: nn.Module,
    family: str,
    ids: Sequence[int],
    places: Sequence[tuple[str, int]],
    generator: torch.Generator,
    writes: Sequence[str] = ("replace",),
) -> list[Patch]:
    """A random vector as large as what stands there for each (site, position), the writes in turn."""
    seen = states(hf, family, torch.tensor([list(ids)]))
    return [
        Patch(site, position, torch.randn(like.shape, generator=generator) * seen[site].std(), writes[k % len(writes)])
        for k, (site, position) in enumerate(places)
        for like in [seen[site][..., 0, position, :]]
    ]


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest entry of `want`."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max())


def agree(got: Sequence[int], want: Said) -> bool:
    """The same tokens, up to where the oracle is undecided: from a tie within the tolerance on, both may go their own way."""
    sure = next((k for k, lead in enumerate(want.leads) if lead < 2 * CLOSE), len(want.tokens))
    return len(got) == len(want.tokens) and list(got[:sure]) == want.tokens[:sure]
