"""What runs compute, counted: a fast path must not only be right but be taken.

A token-block is one position of one row in one block. Blocks are counted by a hook on what mixes positions inside them, which a
block that steps aside does not call. With a prefix of `start` positions, a target prompt of T tokens and L blocks,

    prefix  L · start           base  L · (T − start)           each row  (L − ℓ*) · (T − start)           each later token  L
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH, WRITERS, blocks_of, loaded, prompt, row_of, target
from oracle import Patch, error, say
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import patchscopes
from patchscopes.engine.engine import Engine
from patchscopes.engine.generate import Decoding, generate
from patchscopes.engine.patch import next_logits
from patchscopes.engine.score import score

LENGTH, I_STAR = 10, 6
LAYERS = (4, 0, 2, DEPTH, 0, 3)
STAIRS = [family for family in FAMILIES if family != "mamba"]  # Mamba-1 cannot continue a prompt: no prefix


@contextmanager
def counted(hf: nn.Module, family: str, width: int = WIDTH) -> Iterator[list[int]]:
    """The token-blocks of every call of every block, as they run."""
    calls: list[int] = []

    def note(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> None:
        calls.append((out[0] if isinstance(out, tuple) else out).numel() // width)

    attention = WRITERS[family][0]
    handles = [block.get_submodule(attention).register_forward_hook(note) for block in blocks_of(hf, family)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def patches(layers: Sequence[int] = LAYERS, position: int = I_STAR, site: str = "resid") -> list[Patch]:
    generator = torch.Generator().manual_seed(0)
    return [Patch(f"{site}.{layer}", position, torch.randn(WIDTH, generator=generator)) for layer in layers]


def cost(layers: Sequence[int], *, length: int = LENGTH, start: int) -> int:
    """Token-blocks up to the next token: prefix, base and rows."""
    return DEPTH * length + sum(DEPTH - layer for layer in layers) * (length - start)


@pytest.mark.parametrize("family", STAIRS)
def test_the_next_token_of_a_grid_costs_only_what_patches_change(family: str) -> None:
    model, ids = loaded(family), target(prompt(LENGTH))
    with counted(model.hf, family) as calls:
        next_logits(model.engine, ids, [row_of(patch) for patch in patches()], model.capabilities.readout_route)
    assert sum(calls) == cost(LAYERS, start=I_STAR)
    assert sum(calls) < 0.6 * len(LAYERS) * DEPTH * LENGTH  # of full passes


@pytest.mark.parametrize("family", STAIRS)
def test_later_tokens_cost_one_token_block_a_block(family: str) -> None:
    model, ids, steps = loaded(family), target(prompt(LENGTH)), 4
    with counted(model.hf, family) as calls:
        generate(model.engine, ids, [row_of(patch) for patch in patches()], Decoding(steps), route=model.capabilities.route)
    assert sum(calls) == cost(LAYERS, start=I_STAR) + (steps - 1) * len(LAYERS) * DEPTH


def test_without_a_prefix_rows_still_join_at_their_layers() -> None:
    model, ids, steps = loaded("mamba"), target(prompt(LENGTH)), 3
    with counted(model.hf, "mamba") as calls:
        generate(model.engine, ids, [row_of(patch) for patch in patches()], Decoding(steps), route=model.capabilities.route)
    assert model.capabilities.route == "whole"
    assert sum(calls) == cost(LAYERS, start=0) + (steps - 1) * len(LAYERS) * DEPTH


def test_the_prefix_ends_at_the_first_edit_and_unedited_rows_are_free() -> None:
    model, ids = loaded("llama"), target(prompt(LENGTH))
    rows = [row_of(patches([3], 7)[0]), row_of(patches([1], 4)[0]), row_of(None, last=LENGTH - 1)]
    with counted(model.hf, "llama") as calls:
        next_logits(model.engine, ids, rows, "stairs")
    assert sum(calls) == cost([3, 1, DEPTH], start=4)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_edits_inside_a_block_start_at_that_block(site: str) -> None:
    model, ids, blocks = loaded("llama"), target(prompt(LENGTH)), (4, 1, 2)
    with counted(model.hf, "llama") as calls:
        next_logits(model.engine, ids, [row_of(patch) for patch in patches(blocks, site=site)], "stairs")
    assert sum(calls) == cost(blocks, start=I_STAR)


@pytest.mark.parametrize("family", STAIRS)
def test_scoring_shares_prefix_and_base_and_runs_all_tokens_in_one_pass(family: str) -> None:
    """The base has a row a text; the last token of a text is never read."""
    model, texts = loaded(family), [prompt(4, seed=1), prompt(4, seed=2)]
    rows = [row_of(patch, target=k % 2) for k, patch in enumerate(patches())]
    with counted(model.hf, family) as calls:
        score(model.engine, target(prompt(LENGTH)), rows, texts, route=model.capabilities.readout_route)
    suffix = LENGTH + 4 - 1 - I_STAR
    assert sum(calls) == DEPTH * I_STAR + len(texts) * DEPTH * suffix + sum(DEPTH - layer for layer in LAYERS) * suffix


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_one_pass(family: str) -> None:
    model, vector = loaded(family), torch.ones(WIDTH)
    edits = [patchscopes.Edit("resid.2", -1, vector), patchscopes.Edit("attn_out.3", 0, vector)]
    with counted(model.hf, family) as calls:
        run = model.run(["abc", "bcd"], read=["resid.*", "attn_out.*"], edits=edits)
    assert calls == [run.mask.numel()] * DEPTH


@pytest.mark.parametrize("family", FAMILIES)
def test_unembedding_runs_no_block(family: str) -> None:
    model = loaded(family)
    with counted(model.hf, family) as calls:
        model.unembed(torch.ones(3, WIDTH))
    assert calls == []


def test_rows_that_have_finished_leave_the_batch() -> None:
    """Each row is run for the tokens that it said, and not one more."""
    model, ids, steps, last = loaded("llama"), prompt(LENGTH), 6, LENGTH - 1
    some = patches(LAYERS, last)
    said = [say(model.hf, "llama", ids, patch, steps).tokens for patch in some]
    end = frozenset({said[0][1], said[1][3]})
    lengths = [next((k for k, token in enumerate(tokens) if token in end), steps) for tokens in said]
    assert len(set(lengths)) >= 3 and steps in lengths
    with counted(model.hf, "llama") as calls:
        got = generate(model.engine, target(ids), [row_of(patch) for patch in some], Decoding(steps, end))
    assert [len(g.tokens) for g in got] == lengths
    assert sum(calls) == cost(LAYERS, start=last) + DEPTH * sum(min(length, steps - 1) for length in lengths)


def test_a_patchscope_takes_the_fast_path() -> None:
    """All source layers × all target layers, through the public interface: the source once, then one walk."""
    model = loaded("gpt2")
    scope = patchscopes.Patchscope("hello {x}", layer="all", max_new_tokens=1)
    source = patchscopes.Source(model, "ab cd", position=-1, layer="all")
    with counted(model.hf, "gpt2") as calls:
        readings = scope(source, controls=False)
    assert readings.table.height == (DEPTH + 1) ** 2
    read, written = len(model.tokens("ab cd")), len(model.tokens("hello x"))
    grid = [layer for _ in range(DEPTH + 1) for layer in range(DEPTH + 1)]
    assert sum(calls) == DEPTH * read + cost(grid, length=written, start=written - 1)


# ----------------------------------------------------------------------------------------------------------------------- FLOP


@pytest.fixture(scope="module")
def gpt2_small() -> GPT2LMHeadModel:
    """A random model of 124 million parameters. Eager attention, which the counter sees."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    return hf.requires_grad_(False)


@pytest.mark.slow
def test_a_grid_on_gpt2_small_takes_a_tenth_of_the_flops_of_full_passes(gpt2_small: GPT2LMHeadModel) -> None:
    """12 source vectors × 12 target layers, the next token after 24 with i* = 22; against batched full passes with a hook."""
    hf, vectors = gpt2_small, torch.randn(12, 768, generator=torch.Generator().manual_seed(1))
    ids, i_star = torch.randint(0, 50257, (1, 24), generator=torch.Generator().manual_seed(2)), 22
    engine = Engine(hf)
    grid = [(layer, v) for layer in range(12) for v in range(12)]
    rows = [row_of(Patch(f"resid.{layer}", i_star, vectors[v])) for layer, v in grid]
    with FlopCounterMode(display=False) as fast:
        got = generate(engine, ids, rows, Decoding(1), route="stairs")

    def one_layer_by_full_passes(layer: int) -> tuple[Tensor, int]:
        def write(_module: nn.Module, args: tuple) -> tuple:
            x = args[0].clone()
            x[:, i_star] = vectors
            return (x, *args[1:])

        handle = hf.transformer.h[layer].register_forward_pre_hook(write)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            logits = hf(ids.expand(12, -1), use_cache=False, logits_to_keep=1).logits[:, -1]  # the cheapest that it can be
        handle.remove()
        return logits, counter.get_total_flops()

    slow = 0
    for layer in (0, 9):  # which layer is patched does not matter to the cost of a full pass: two of the twelve are run
        logits, flops = one_layer_by_full_passes(layer)
        assert slow in (0, flops)
        slow = flops
        assert max(error(got[layer * 12 + v].logits, logits[v]) for v in range(12)) <= 1e-4
    ratio = fast.get_total_flops() / (12 * slow)
    print(f"\n{fast.get_total_flops() / 1e9:.1f} GFLOP against {12 * slow / 1e9:.1f}: a share of {ratio:.3f}")
    assert ratio <= 0.1
    # the floor: base and Σ (L − ℓ*) · (T − i*) token-blocks of 24 d_model² FLOP, a head a row; attention and two heads come on top
    block, head = 24 * 768**2, 2 * 768 * 50257
    floor = (12 * 24 + 12 * 78 * 2) * block + 144 * head
    assert fast.get_total_flops() <= 1.02 * floor
