"""Every site of every family: what is read there obeys the formulas, and what is written there does what plain hooks do.

The page docs/sites.md, which families have which sites, is written here.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from families import CONFIGS, FAMILIES, blocks_of, loaded, prompt, tiny
from oracle import CLOSE, error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import patchscopes as ps
from patchscopes.core.edits import Edit, knock_out
from patchscopes.core.errors import SiteError
from patchscopes.core.sites import NAMES, STATE_SPACE, WHOLE, Site
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import hooked
from patchscopes.engine.places import at_sites
from patchscopes.model import Model

IDS = torch.tensor([prompt(7, seed=1), prompt(7, seed=2)])
PAGE = Path(__file__).parents[1] / "docs" / "sites.md"
KNOWN: dict[str, dict[str, str]] = {}  # family -> site -> "all", "some" or "none" of its blocks
UNMOVED = {
    # these change nothing downstream by their nature: a norm of queries and keys takes any scale away; hash routing and a saturated
    # mixer of experts do not look at the size of the logits
    ("gemma4", "attn_scale"),
    ("phimoe", "router"),
    ("deepseek_v4", "router"),
}


def sites_here(engine: Engine) -> dict[Site, Tensor]:
    """The value of every site that the model has, in one pass a site."""
    found: dict[Site, Tensor] = {}
    for name in NAMES:
        for b in range(1 if name in WHOLE else engine.n_layers):
            site = Site(name, b)
            if name == "state":
                continue
            try:
                hooks = at_sites(engine, {site: lambda x, site=site: found.__setitem__(site, x.clone())})
            except SiteError:
                continue
            with hooked(hooks):
                engine.forward(IDS)
    return found


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_site_of_every_family(family: str) -> None:
    engine = Engine(tiny(family))
    own = engine.forward(IDS)
    scale = float(own.abs().max())
    values = sites_here(engine)
    moved: dict[str, float] = {}
    for site, value in values.items():
        generator = torch.Generator().manual_seed(0)
        noise = 1 + 0.3 * torch.rand(value.shape, generator=generator)
        with hooked(at_sites(engine, {site: torch.clone})):
            same = engine.forward(IDS)
        with hooked(at_sites(engine, {site: lambda x, noise=noise: (x * noise).to(x)})):
            other = engine.forward(IDS)
        assert float((same - own).abs().max()) <= 1e-5 * scale, site
        moved[site.name] = max(moved.get(site.name, 0.0), float((other - own).abs().max()) / scale)
    still = {name for name, by in moved.items() if by < 1e-7 and (family, name) not in UNMOVED}
    assert not still, f"writing there changes nothing: {still}"
    assert torch.equal(engine.forward(IDS), own)
    for module in engine.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    for b in range(engine.n_layers):
        at = {site.name: value for site, value in values.items() if site.index == b}
        if "pattern" in at:
            sums = at["pattern"].sum(-1)
            assert float(sums.max()) <= 1 + 1e-5
            weights = engine.parts.blocks[b].attention.named_parameters()  # type: ignore[union-attr]
            if not any("sink" in name for name, _ in weights):  # a sink takes its share of the attention
                assert float((sums - 1).abs().max()) < 1e-5
        if {"z", "pattern", "v"} <= set(at):
            v = at["v"].transpose(1, 2).repeat_interleave(at["z"].shape[2] // at["v"].shape[2], 1)
            assert error(at["z"], (at["pattern"].to(v) @ v).transpose(1, 2)) < 1e-4
        if {"head_out", "attn_out"} <= set(at):  # what heads do not say is the same wherever one looks: a bias, normed or not
            rest = at["attn_out"] - at["head_out"].sum(-2)
            if engine.parts.blocks[b].attn_post is None:
                assert float((rest - rest[:1, :1]).abs().max()) <= 1e-4 * float(at["attn_out"].abs().max())
    counts = {name: len([s for s in values if s.name == name]) for name in NAMES}
    of = {name: 1 if name in WHOLE else engine.n_layers + (name == "resid") * 0 for name in NAMES}
    KNOWN[family] = {name: "all" if counts[name] >= of[name] else "some" if counts[name] else "" for name in NAMES}


def test_the_page_of_sites_is_up_to_date() -> None:
    """Last in this file: it needs what the others measured, in the same process."""
    if len(KNOWN) < len(CONFIGS):
        pytest.skip(f"{len(KNOWN)} of {len(CONFIGS)} families ran in this process; run this file alone and whole")
    if transformers.__version__ != "5.23.0":
        pytest.skip(f"the page is of transformers 5.23.0; here is {transformers.__version__}")
    page = written_page()
    old = PAGE.read_text() if PAGE.exists() else ""
    if old != page:
        PAGE.write_text(page)
    assert old == page, f"{PAGE.name} was out of date and has been written anew; look at the difference and commit it"


def written_page() -> str:
    """docs/sites.md."""
    head = PAGE.read_text().split("<!-- table -->")[0] if PAGE.exists() else "# Sites\n\n"
    columns = [name for name in NAMES if name not in ("resid", "state")]
    names = {"all": "●", "some": "◐", "": ""}
    lines = ["| family | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {family} | " + " | ".join(names[KNOWN[family][c]] for c in columns) + " |" for family in sorted(KNOWN)]
    return head + "<!-- table -->\n" + "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------- against plain transformers


EAGER = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "mixtral", "opt", "phi3", "bloom", "falcon", "gptj", "gpt_neo", "mpt")


@pytest.mark.parametrize("family", EAGER)
def test_patterns_are_those_that_eager_attention_returns(family: str) -> None:
    model = loaded(family)
    hf = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), attn_implementation="eager").eval()
    hf.load_state_dict(model.hf.state_dict())
    tokens = model.tokens("a small word")
    with torch.no_grad():
        want = hf(tokens.tensor, output_attentions=True, use_cache=False).attentions
    run = model.run(tokens, read=["pattern.*"])
    for b, pattern in enumerate(want):
        assert error(run[f"pattern.{b}"], pattern) < 1e-5
        assert torch.equal(run[f"pattern.{b}.1"], run[f"pattern.{b}"][:, 1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "phi3", "mixtral"])
def test_a_knocked_out_edge_is_an_edge_that_an_explicit_mask_closes(family: str) -> None:
    model, tokens = loaded(family), loaded(family).tokens("abcdefgh")
    n, queries, keys = len(tokens), [4, 6, n_last := 8], [1, 3]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    for q in queries:
        mask[q, keys] = torch.finfo(torch.float32).min
    with torch.no_grad():
        want = model.hf(tokens.tensor, attention_mask=mask[None, None], use_cache=False).logits
    run = model.run(tokens, edits=knock_out("*", queries, keys), read=["pattern.3"])
    assert error(run.logits, want) <= CLOSE
    assert float(run["pattern.3"][:, :, queries][..., keys].abs().max()) == 0
    assert error(model.run(tokens).logits[:, n_last], want[:, n_last]) > 1e-3  # it matters
    after = model.run(tokens, edits=knock_out("*", queries, keys, after=True), read=["pattern.0", "z.0", "v.0"])
    assert float(after["pattern.0"][:, :, queries][..., keys].abs().max()) == 0
    assert float(after["pattern.0"][:, :, n_last].sum(-1).max()) < 1  # the others got no more for it


def test_closing_all_ways_from_a_token_leaves_no_effect_of_it() -> None:
    model = loaded("llama")
    ways = knock_out("*", range(3, 8), 2)
    a, b = (model.run(f"a{c}cdefg", edits=ways).logits for c in "bx")
    assert torch.equal(a[:, 3:], b[:, 3:]) and not torch.equal(a[:, 2], b[:, 2])


HEADS = {"gpt2": "attn.c_proj", "llama": "self_attn.o_proj", "gpt_neox": "attention.dense", "bloom": "self_attention.dense"}


@pytest.mark.parametrize("family", HEADS)
def test_one_head_written_is_its_slice_of_the_output_map_written(family: str) -> None:
    model, v = loaded(family), torch.randn(16, generator=torch.Generator().manual_seed(3))
    tokens = model.tokens("abcdefgh")

    def write(_module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[0, 5, 32:48] = v  # the third head of four, 16 wide
        return (x,)

    handle = blocks_of(model.hf, family)[2].get_submodule(HEADS[family]).register_forward_pre_hook(write)
    with torch.no_grad():
        want = model.hf(tokens.tensor, use_cache=False).logits
    handle.remove()
    assert error(model.run(tokens, edits=[Edit("z.2.2", 5, v)]).logits, want) <= CLOSE
    # the same through what that head adds to the stream
    plain = model.run(tokens, read=["head_out.2"])
    moved = model.run(tokens, read=["head_out.2"], edits=[Edit("z.2.2", 5, v)])
    by_output = model.run(tokens, edits=[Edit("head_out.2.2", 5, moved.at("head_out.2.2", position=5))])
    assert error(by_output.logits, want) <= CLOSE
    assert error(moved.at("head_out.2.1", position=5), plain.at("head_out.2.1", position=5)) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "granite", "olmo2", "llama"])
def test_what_heads_add_goes_through_what_stands_behind_them(family: str) -> None:
    """A norm behind the attention (Gemma-2, OLMo-2), a multiplier (Granite): without one head, the stream lacks its share."""
    model = loaded(family)
    run = model.run("abcdefgh", read=["head_out.1", "attn_out.1", "resid.2"])
    zero = torch.zeros(model.d_model)
    without = model.run("abcdefgh", edits=[Edit("head_out.1.3", None, zero)], read=["attn_out.1"])
    assert error(without["attn_out.1"], run["attn_out.1"] - run["head_out.1.3"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_all_that_is_added_repeats_the_source_run(family: str) -> None:
    model = loaded(family)
    writers = [f"{name}.*" for name in ("attn_out", "mlp_out") if len(model.engine.anatomy.writers[0]) > (name == "mlp_out")]
    source = model.run(["source", "and it"], read=["resid.0", *writers])
    edits = ps.edits.freeze(source, ["resid.0", *(f"{w[:-2]}.{b}" for w in writers for b in range(model.n_layers))])
    assert error(model.run(["target", "is not"], edits=edits).logits, source.logits) <= CLOSE


# -------------------------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_experts_say_together_what_the_model_makes_of_them(family: str) -> None:
    """Nothing said by any expert is the experts' output zeroed; one expert more is its weight times what it says."""
    model, b = loaded(family), 2
    experts = model.engine.parts.blocks[b].experts
    assert experts is not None
    tokens = model.tokens("abcdefgh")
    handle = experts.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    with torch.no_grad():
        want = model.hf(tokens.tensor, use_cache=False).logits
    handle.remove()
    zero = torch.zeros(model.d_model)
    assert error(model.run(tokens, edits=[Edit(f"expert_out.{b}", None, zero)]).logits, want) <= CLOSE
    assert error(model.run(tokens).logits, want) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_router_is_obeyed(family: str) -> None:
    model, b = loaded(family), 2
    parts, chosen = model.engine.parts.blocks[b], []
    assert parts.experts is not None
    run = model.run("abcdefgh", read=[f"router.{b}"])
    n = run[f"router.{b}"].shape[-1]
    wish = torch.full((n,), -50.0)
    wish[[1, 3]] = 50.0
    handle = parts.experts.register_forward_hook(lambda _m, args, _o: chosen.append(args[1].clone()))
    model.run("abcdefgh", edits=[Edit(f"router.{b}", 4, wish)])
    model.run("abcdefgh")
    handle.remove()
    assert sorted(chosen[0][4].tolist()[:2]) == [1, 3]
    assert torch.equal(chosen[0][[0, 1, 2, 3, 5]], chosen[1][[0, 1, 2, 3, 5]])


# ----------------------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "olmo"])
def test_a_norms_scale_divides(family: str) -> None:
    model = loaded(family)
    run = model.run("abcdefgh", read=["attn_scale.2", "attn_in.2", "resid.2", "final_scale", "final_norm"])
    x = run["resid.2"]
    centred = x - x.mean(-1, keepdim=True) if model.engine.parts.blocks[2].attn_norm.centred else x  # type: ignore[union-attr]
    assert error(run["attn_scale.2"], (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()) < 1e-4
    double = model.run(
        "abcdefgh", edits=[Edit("attn_scale.2", None, write="scale", amount=2.0)], read=["attn_in.2", "attn_scale.2"]
    )
    assert error(double["attn_scale.2"], 2 * run["attn_scale.2"]) < 1e-6
    bias = model.engine.parts.blocks[2].attn_norm.bias  # type: ignore[union-attr]
    assert error(double["attn_in.2"] - bias, (run["attn_in.2"] - bias) / 2) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------- state spaces


def test_the_inner_sites_of_mamba_are_slices_of_its_maps() -> None:
    model, b = loaded("mamba"), 2
    mixer = blocks_of(model.hf, "mamba")[b].mixer
    kept: dict[str, Tensor] = {}
    handles = [
        mixer.x_proj.register_forward_hook(lambda _m, _a, out: kept.__setitem__("x_proj", out.clone())),
        mixer.in_proj.register_forward_hook(lambda _m, _a, out: kept.__setitem__("in_proj", out.clone())),
    ]
    run = model.run("abcdefgh", read=[f"{name}.{b}" for name in ("delta", "B", "C", "gate")])
    for handle in handles:
        handle.remove()
    n = mixer.ssm_state_size
    assert torch.equal(run[f"B.{b}"], kept["x_proj"][..., -2 * n : -n]) and torch.equal(run[f"C.{b}"], kept["x_proj"][..., -n:])
    assert torch.equal(run[f"gate.{b}"], kept["in_proj"][..., kept["in_proj"].shape[-1] // 2 :])
    step = torch.nn.functional.softplus(kept["x_proj"][..., : -2 * n] @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    assert error(run[f"delta.{b}"], step) < 1e-5

    def write(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        new = out.clone()
        new[0, 3, -2 * n : -n] *= 3
        return new

    handle = mixer.x_proj.register_forward_hook(write)
    with torch.no_grad():
        want = model.hf(model.tokens("abcdefgh").tensor, use_cache=False).logits
    handle.remove()
    got = model.run("abcdefgh", edits=[Edit(f"B.{b}", 3, write="scale", amount=3.0)])
    assert error(got.logits, want) <= CLOSE


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "qwen3_next"])
def test_states_are_what_the_cache_carries_on(family: str) -> None:
    model = loaded(family)
    b = next(b for b, parts in enumerate(model.engine.parts.blocks) if parts.state_space)
    tokens = model.tokens("abcdefg")
    run = model.run(tokens, read=[f"state.{b}", "resid.*"])
    full = model.run(tokens, read=["resid.*"])
    assert all(error(run[f"resid.{layer}"], full[f"resid.{layer}"]) <= CLOSE for layer in range(model.n_layers + 1))
    cache = model.engine.new_cache()
    with torch.no_grad():
        model.engine.forward(tokens.tensor[:, :5], cache=cache)
        held = cache.layers[b].recurrent_states
        held = held[0] if isinstance(held, dict) else held
        assert error(run[f"state.{b}"][:, 4], held) < 1e-4
        held.mul_(0.5)
        want = torch.cat(
            [model.engine.forward(tokens.tensor[:, t : t + 1], offset=t, cache=cache) for t in range(5, len(tokens))], 1
        )
    edit = Edit(f"state.{b}", 4, write="scale", amount=0.5)
    got = model.run(tokens, edits=[edit])
    assert error(got.logits[:, 5:], want) <= CLOSE
    assert error(got.logits[:, :5], full.logits[:, :5]) <= CLOSE
    assert error(got.logits[:, 5:], full.logits[:, 5:]) > 1e-4


def test_a_model_without_states_says_so() -> None:
    with pytest.raises(SiteError, match=r"state\.1 is not on this model"):
        loaded("llama").run("abc", read=["state.1"])
    for name in STATE_SPACE[:-1]:
        with pytest.raises(SiteError, match="no state-space mixer"):
            loaded("llama").run("abc", read=[f"{name}.1"])


# ----------------------------------------------------------------------------------------------------------------------- any model


def test_sites_of_the_whole_model() -> None:
    model = loaded("gemma2")
    run = model.run("abc", read=["embed", "final_norm", "logits", "resid.0", "resid.5"])
    with torch.no_grad():
        assert torch.equal(run["embed"], model.hf.model.embed_tokens(model.tokens("abc").tensor))
        assert torch.equal(run["final_norm"], model.hf.model.norm(run["resid.5"]))
    assert torch.equal(run["logits"], run.logits)
    push = torch.zeros(model.vocab)
    push[7] = 100.0
    assert model.run("abc", edits=[Edit("logits", -1, push, "add")]).logits[0, -1].argmax() == 7
    assert model.generate("abc", edits=[Edit("logits", -1, push, "add", steps="always")], max_new_tokens=3)[0].ids == (7, 7, 7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_oss", "bloom", "mamba2"])
def test_a_ragged_batch_reads_at_inner_sites_what_single_runs_read(family: str) -> None:
    model: Model = loaded(family)
    sites = ["attn_in.1"] + (["q.2", "k.2", "z.2", "pattern.2"] if family != "mamba2" else ["delta.2", "gate.2"])
    both = model.run(["abcdefgh", "xyz"], read=sites)
    for p, text in enumerate(["abcdefgh", "xyz"]):
        alone = model.run(text, read=sites)
        for site in sites:
            for position in range(len(model.tokens(text))):
                assert error(both.at(site, prompt=p, position=position), alone.at(site, position=position)) < 1e-4, (
                    site,
                    position,
                )


# ---------------------------------------------------------------------------------------------------------- what went wrong before


@pytest.mark.parametrize("family", ["mamba", "zamba", "mamba2", "jamba"])
def test_sites_inside_a_mixer_are_read_together_and_leave_nothing_behind(family: str) -> None:
    model = loaded(family)
    block = next(b for b, parts in enumerate(model.engine.parts.blocks) if parts.state_space)
    sites = [f"{name}.{block}" for name in ("delta", "B", "C", "gate")]
    texts = ["abcdefgh", "xyz"]
    both = model.run(texts, read=sites)
    assert not any("forward" in vars(module) for module in model.hf.modules())
    for p, text in enumerate(texts):
        for site in sites:
            alone = model.run(text, read=[site])
            prefix = model.run(text[:2], read=[site])  # what stands at a position does not hang on what follows
            for position in range(len(model.tokens(text))):
                assert error(both.at(site, prompt=p, position=position), alone.at(site, position=position)) < 1e-4, site
            assert error(prefix.at(site, position=1), alone.at(site, position=1)) < 1e-4, site


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "qwen3_next"])
def test_states_of_a_ragged_batch_are_those_of_its_prompts_alone(family: str) -> None:
    model, texts = loaded(family), ["abcdefgh", "xyz"]
    block = next(b for b in range(model.n_layers) if _has_state(model, b))
    site, edit = f"state.{block}", Edit(f"state.{block}", -1, write="scale", amount=0.0)
    inside = [f"delta.{block}"] if model.engine.parts.blocks[block].state_space else []
    both, edited = model.run(texts, read=[site, "resid.2", *inside]), model.run(texts, edits=[Edit(site, 1, write="scale")])
    said = model.generate(texts, edits=[edit], max_new_tokens=4)
    for p, text in enumerate(texts):
        n = len(model.tokens(text))
        alone, plain = model.run(text, read=[site, *inside]), model.run(text, read=["resid.2", *inside])
        assert error(both[site][p, -n:], alone[site][0]) < 1e-4
        assert error(both["resid.2"][p, -n:], plain["resid.2"][0]) < 1e-4
        for name in inside:
            assert error(both[name][p, -n:], plain[name][0]) < 1e-4
        assert error(edited.logits[p, -n:], model.run(text).logits[0]) < 1e-4  # scaled by 1
        # generated from there: the whole text anew, with the state emptied at the same place
        text_and_said = model.tokens([*model.tokens(text).ids, *said[p].ids])
        again = model.run(text_and_said, edits=[Edit(site, n - 1, write="scale", amount=0.0)])
        chosen = again.logits[0, n - 1 : -1].argmax(-1).tolist()
        assert tuple(chosen) == said[p].ids
        assert error(again.logits[0, n:], model.run(text_and_said).logits[0, n:]) > 1e-5  # and it matters


def _has_state(model: Model, block: int) -> bool:
    try:
        model.run("a", read=[f"state.{block}"])
    except SiteError:
        return False
    return True


def test_features_are_read_along_with_states() -> None:
    model = loaded("mamba")
    run = model.run(["abcd", "xy"], read=["state.1"], coordinates={"resid.2": ps.coordinates.Whole()})
    plain = model.run(["abcd", "xy"], read=["resid.2"])
    assert error(run.features["resid.2"][run.mask], plain["resid.2"][run.mask]) < 1e-4


def test_a_final_norm_that_norms_the_embeddings_too_is_met_once() -> None:
    model = loaded("nanochat")
    run = model.run("abcd", read=["final_norm", "final_scale", "resid.0", "resid.5"])
    same = ps.edits.freeze(run, ["final_scale"])
    assert error(model.run("abcd", edits=same).logits, run.logits) < 1e-6
    moved = model.run("abcd", edits=[Edit("final_norm", None, write="scale", amount=0.5)], read=["resid.0"])
    assert torch.equal(moved["resid.0"], run["resid.0"]) and not torch.equal(moved.logits, run.logits)


def test_what_is_not_one_value_a_token_is_refused() -> None:
    with pytest.raises(SiteError, match="attends more than once"):
        loaded("diffllama").run("abc", read=["z.1"])
    with pytest.raises(SiteError, match="not one for each"):
        loaded("deepseek_v4").run("abcdefghij", read=["k.3"])
    with pytest.raises(SiteError, match="not go token by token"):
        loaded("minimax").run("abc", read=["state.0"])
    for family in ("diffllama", "deepseek_v4", "minimax"):
        for module in loaded(family).hf.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
