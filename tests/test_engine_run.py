"""`Model.run` and `Model.unembed` against plain hooks and full passes of single prompts."""

from __future__ import annotations

import pytest
import torch
from families import DEPTH, FAMILIES, VOCAB, WIDTH, WRITERS, blocks_of, loaded, tiny, tiny_tokenizer
from oracle import CLOSE, Patch, error, full_logits, states

import patchscopes
from patchscopes.core.errors import PatchscopesError, SiteError, VectorError
from patchscopes.model import Model

PROMPTS = ("the cat sat on it", "a dog", "birds?", "x")
EQUALLY_LONG = ("seven k", "letters", "to sum!")
LAYERS = [f"resid.{layer}" for layer in range(DEPTH + 1)]


def ids_of(model: Model, text: str) -> list[int]:
    return list(model.tokens(text).ids)


def writers(family: str) -> list[str]:
    return ["attn_out", "mlp_out"] if WRITERS[family][1] else ["attn_out"]


# -------------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("family", WRITERS)
def test_reads_are_what_plain_hooks_capture_bit_for_bit(family: str) -> None:
    model = loaded(family)
    want = states(model.hf, family, torch.tensor([ids_of(model, text) for text in EQUALLY_LONG]))
    run = model.run(EQUALLY_LONG, read=["resid.*", *(f"{site}.*" for site in writers(family))])
    assert bool(run.mask.all())
    assert torch.equal(run.logits, want.pop("logits"))
    for site, value in want.items():
        assert torch.equal(run[site], value), (family, site)
    assert len(run.values) == len(want) == DEPTH + 1 + DEPTH * len(writers(family))


@pytest.mark.parametrize("family", WRITERS)
def test_each_layer_is_the_one_before_and_what_its_block_adds(family: str) -> None:
    run = loaded(family).run(PROMPTS[0], read=["resid.*", *(f"{site}.*" for site in writers(family))])
    for b in range(DEPTH):
        added = sum(run[f"{site}.{b}"] for site in writers(family))
        assert added.norm() > 0.1 * run[f"resid.{b}"].norm()  # blocks matter in these models
        assert error(run[f"resid.{b}"] + added, run[f"resid.{b + 1}"]) <= 1e-6


@pytest.mark.parametrize("family", ["rwkv", "gemma3n", "gemma4"])
def test_the_check_claims_no_sum_where_there_is_none(family: str) -> None:
    """RWKV's first block norms the residual first, Gemma-3n mixes four streams, Gemma-4 has a third writer."""
    model = loaded(family)
    assert not model.capabilities.ok("writers")
    assert loaded("granite").capabilities.ok("writers") and loaded("mamba").capabilities.ok("writers")


@pytest.mark.parametrize("family", WRITERS)
def test_a_ragged_batch_equals_single_runs(family: str) -> None:
    model, sites = loaded(family), [*LAYERS, "attn_out.2"]
    run = model.run(PROMPTS, read=sites)
    longest = max(len(ids_of(model, text)) for text in PROMPTS)
    for p, text in enumerate(PROMPTS):
        n = len(ids_of(model, text))
        alone = states(model.hf, family, torch.tensor([ids_of(model, text)]))
        assert run.mask[p].tolist() == [False] * (longest - n) + [True] * n  # padded on the left
        assert error(run.logits[p, run.mask[p]], alone["logits"][0]) <= CLOSE
        for site in sites:
            assert error(run[site][p, run.mask[p]], alone[site][0]) <= CLOSE, (family, site)
            assert torch.equal(run.at(site, prompt=p, position=0), run[site][p, longest - n])
            assert torch.equal(run.at(site, prompt=p, position=-1), run[site][p, -1])


def test_sites_may_be_named_in_any_way_and_those_not_read_say_so() -> None:
    run = loaded("gpt2").run("abc", read=["blocks.1.hook_resid_post", "resid.-1", "attn_out.-1"])
    assert torch.equal(run["resid.2"], run["blocks.2.hook_resid_pre"])
    assert run[f"resid.{DEPTH}"] is run["resid.-1"]
    assert run[f"attn_out.{DEPTH - 1}"].shape == (1, 4, WIDTH)
    with pytest.raises(SiteError, match=r"resid\.1 was not read.*resid\.2, resid\.5, attn_out\.4"):
        run["resid.1"]


def test_asking_a_run_for_what_it_has_not_is_the_users_error() -> None:
    run = loaded("gpt2").run(["abc", "a"], read=["resid.*"])
    asked = [
        lambda: run["resid.*"],
        lambda: run["resid.6"],
        lambda: run["nonsense"],
        lambda: run.at("resid.1", position=4),
        lambda: run.at("resid.1", prompt=1, position=2),  # two tokens, of which the padding is none
        lambda: run.at("resid.1", prompt=1, position=-3),
        lambda: run.at("resid.1", prompt=2, position=0),
    ]
    for ask in asked:
        with pytest.raises(PatchscopesError):
            ask()


def test_a_model_without_a_second_writer_says_so() -> None:
    with pytest.raises(SiteError, match=r"mlp_out\.0 .*one residual writer, 'mixer'"):
        loaded("mamba").run("abc", read=["mlp_out.0"])


# -------------------------------------------------------------------------------------------------------------------- editing


@pytest.mark.parametrize("family", WRITERS)
def test_edits_of_a_ragged_batch(family: str) -> None:
    """Several edits at once, of one prompt or of all, two of them at one place, one after the other."""
    model, second = loaded(family), f"{writers(family)[-1]}.4"
    v = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(6))
    edits = [
        patchscopes.Edit("resid.1", -1, v[0]),
        patchscopes.Edit("resid.3", 1, v[1], "add", prompt=2),
        patchscopes.Edit("attn_out.2", 0, v[2], "add_matched", prompt=0),
        patchscopes.Edit(second, -2, v[3], prompt=1),
        patchscopes.Edit(f"resid.{DEPTH}", -1, v[4], prompt=-1),
        patchscopes.Edit("resid.-1", -1, v[5], "add", prompt=3),
        patchscopes.Edit("resid.2", "cat", v[5], prompt=0),
    ]
    run = model.run(PROMPTS, edits=edits, read=["resid.*"])
    lasts = [len(ids_of(model, text)) - 1 for text in PROMPTS]
    t_of_cat = 7  # <s>the cat
    more = [
        [Patch("attn_out.2", 0, v[2], "add_matched"), Patch("resid.2", t_of_cat, v[5])],
        [Patch(second, lasts[1] - 1, v[3])],
        [Patch("resid.3", 1, v[1], "add")],
        [Patch(f"resid.{DEPTH}", lasts[3], v[4]), Patch(f"resid.{DEPTH}", lasts[3], v[5], "add")],
    ]
    for p, text in enumerate(PROMPTS):
        patches = [Patch("resid.1", lasts[p], v[0]), *more[p]]
        want = full_logits(model.hf, family, ids_of(model, text), *patches)
        assert error(run.logits[p, run.mask[p]], want) <= CLOSE, (family, text)
        fewer = full_logits(model.hf, family, ids_of(model, text), *patches[:-1])
        assert error(fewer, want) > 10 * CLOSE  # each edit matters
    # what is read shows what was written there
    assert all(torch.equal(run.at("resid.1", prompt=p, position=-1), v[0]) for p in range(len(PROMPTS)))
    assert torch.equal(run.at("resid.2", prompt=0, position=t_of_cat), v[5])
    assert error(run.at(f"resid.{DEPTH}", prompt=3, position=-1), v[4] + v[5]) <= 1e-6


def test_a_state_of_several_streams_can_be_written_back() -> None:
    """What `Run.at` gives, [stream, d_model] in Gemma-3n, `Edit` takes."""
    model, (one, other, _) = loaded("gemma3n"), EQUALLY_LONG
    for site in LAYERS:
        state = model.run(one, read=[site]).at(site, position=3)
        run = model.run(other, edits=[patchscopes.Edit(site, 3, state)])
        assert error(run.logits[0], full_logits(model.hf, "gemma3n", ids_of(model, other), Patch(site, 3, state))) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_all_positions_patched_reproduce_the_source_run(family: str) -> None:
    model, (source, other, _) = loaded(family), EQUALLY_LONG
    run = model.run(source, read=["resid.*"])
    for site in LAYERS:
        edits = [patchscopes.Edit(site, i, run.at(site, position=i)) for i in range(run.logits.shape[1])]
        assert error(model.run(other, edits=edits).logits, run.logits) <= 2e-5, (family, site)


def test_adding_a_vector_without_direction_in_proportion_is_refused() -> None:
    """Zero cannot be given a norm: NaN would go through the model unseen."""
    model, zero = loaded("gpt2"), torch.zeros(WIDTH)
    with pytest.raises(VectorError):
        model.run("abc", edits=[patchscopes.Edit("resid.2", -1, zero, "add_matched")])
    scope = patchscopes.Patchscope("ab {x}", write="add_matched", max_new_tokens=1)
    with pytest.raises(VectorError):
        scope(patchscopes.Source.of_vectors(model, zero, layer=2), controls=False)


@pytest.mark.parametrize("write", ["replace", "add"])
def test_several_vectors_for_one_place_are_refused(write: str) -> None:
    with pytest.raises(VectorError):
        loaded("gpt2").run("abc", edits=[patchscopes.Edit("resid.2", -1, torch.ones(2, WIDTH), write)])


def test_hooks_of_the_user_are_seen_and_stay() -> None:
    hf = tiny("llama")
    model = patchscopes.load((hf, tiny_tokenizer()))
    plain = model.run("abc").logits
    handle = blocks_of(hf, "llama")[2].register_forward_hook(lambda _module, _args, out: out * 0.5)
    own = states(hf, "llama", model.tokens("abc").tensor)
    run = model.run("abc", read=["resid.3"])
    assert torch.equal(run.logits, own["logits"])
    assert torch.equal(run["resid.3"], own["resid.3"])
    assert error(run.logits, plain) > 0.01
    handle.remove()
    assert torch.equal(model.run("abc").logits, plain)


# ------------------------------------------------------------------------------------------------------------------ unembedding


@pytest.mark.parametrize("family", [*WRITERS, "gemma3n", "gemma4", "mamba2", "rwkv"])
def test_the_last_layer_unembedded_is_the_logits(family: str) -> None:
    model = loaded(family)
    run = model.run(EQUALLY_LONG, read=["resid.*"])
    got = model.unembed(run[f"resid.{DEPTH}"])
    assert got.shape == run.logits.shape
    assert error(got, run.logits) <= 1e-6
    assert error(model.unembed(run.at("resid.-1", position=2)), run.logits[0, 2]) <= 1e-6  # one vector, no batch


@pytest.mark.parametrize("family", WRITERS)
def test_any_layer_unembedded_is_what_the_model_says_with_that_as_its_last(family: str) -> None:
    model = loaded(family)
    middle = model.run(PROMPTS[1], read=["resid.2"])["resid.2"]
    patches = [Patch(f"resid.{DEPTH}", 0, h) for h in middle[0]]
    want = torch.stack([full_logits(model.hf, family, [5], patch)[0] for patch in patches])
    assert error(model.unembed(middle)[0], want) <= 1e-6


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_norm_and_head_alone_would_not_do(family: str) -> None:
    """These models cap or scale their logits: the two tests above see that."""
    run = loaded(family).run(PROMPTS[0], read=["resid.-1"])
    hf = loaded(family).hf
    assert error(hf.lm_head(hf.model.norm(run["resid.-1"])), run.logits) > 0.05


def test_unembedding_no_rows_gives_no_logits() -> None:
    assert loaded("gpt2").unembed(torch.zeros(0, WIDTH)).shape == (0, VOCAB)


def test_unembedding_vectors_of_another_width_is_refused() -> None:
    with pytest.raises(VectorError, match=r"65 wide.*64 wide"):
        loaded("gpt2").unembed(torch.zeros(2, WIDTH + 1))
