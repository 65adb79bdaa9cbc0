"""Gradients against autograd through plain full passes, finite differences, and each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import DEPTH, FAMILIES, blocks_of, loaded, tiny, tiny_tokenizer
from oracle import error
from torch import Tensor, nn

import patchscopes as ps
from patchscopes.core.coordinates import Dictionary, Subspace
from patchscopes.core.edits import Edit, stop_gradient
from patchscopes.core.errors import InputError, RefusedError, VectorError
from patchscopes.engine.run import Run

CLOSE = 1e-4
OTHERS = ["gemma3n", "gemma4", "mamba2", "granite", "falcon", "qwen3_next", "gpt_oss"]


def difference(run: Run) -> Tensor:
    """Of two logits after the last token, for each prompt."""
    return run.logits[:, -1, 5] - run.logits[:, -1, 7]


def plain_gradients(hf: nn.Module, family: str, ids: Tensor) -> dict[int, Tensor]:
    """∂ difference / ∂ resid.ℓ of one prompt: hooks that keep what blocks read, and autograd through the whole model."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> tuple:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            kept[layer] = x
            return (x.clone(), *args[1:])

        return hook

    handles = [block.register_forward_pre_hook(keep(b)) for b, block in enumerate(blocks_of(hf, family))]
    logits = hf(ids, use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(logits[5] - logits[7], list(kept.values()))
    return dict(zip(kept, found, strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_gradients_are_those_of_plain_autograd_row_by_row(family: str) -> None:
    model = loaded(family)
    texts = ["abcdefgh", "two pets"]  # of one length: some models cannot be padded
    got = model.gradients(texts, difference, wrt=["resid.*"])
    assert torch.equal(got.metric, difference(model.run(texts)))
    for p, text in enumerate(texts):
        for layer, want in plain_gradients(model.hf, family, model.tokens(text).tensor).items():
            assert error(got[f"resid.{layer}"][..., p : p + 1, :, :], want) < CLOSE, layer
    assert not any(q.grad is not None for q in model.hf.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "gemma2", "mixtral", "mamba"])
def test_a_ragged_batch_has_the_gradients_of_each_prompt_alone(family: str) -> None:
    model, texts = loaded(family), ["abcdefgh", "xyz"]
    sites = [
        "resid.1",
        "attn_in.2",
        "attn_out.3",
        *(["pattern.2", "q.1", "z.4", "neurons.1"] if family in ("gpt2", "llama") else []),
    ]
    both = model.gradients(texts, difference, wrt=sites)
    for p, text in enumerate(texts):
        alone = model.gradients(text, difference, wrt=sites)
        assert float((both.metric[p] - alone.metric[0]).abs()) < 1e-4
        for site in sites:
            for position in range(len(model.tokens(text))):
                a, b = (g.at.at(site, prompt=q, position=position) for g, q in ((both, p), (alone, 0)))
                assert float((a - b).abs().max()) <= CLOSE * float(alone[site].abs().max()), site


INNER = {
    "llama": [
        "embed",
        "attn_in.2",
        "q.2",
        "k.2",
        "v.1",
        "scores.2",
        "pattern.2",
        "z.2",
        "head_out.2",
        "attn_out.3",
        "neurons.1",
        "final_norm",
    ],
    "mixtral": ["router.2", "expert_out.2", "mlp_in.1"],
    "mamba": ["delta.2", "B.2", "C.1", "gate.3"],
    "bloom": ["scores.2", "pattern.2", "q.1", "v.3", "z.2"],
    "gpt2": ["attn_scale.2", "mlp_scale.1", "final_scale", "mlp_out.4"],
}


@pytest.mark.parametrize(("family", "site"), [(f, s) for f, sites in INNER.items() for s in sites])
def test_inner_gradients_say_what_a_small_edit_does(family: str, site: str) -> None:
    """In double precision, by central differences along a random direction at every entry."""
    model = doubled(family)
    run = model.run("abcdefgh", read=[site])
    along = torch.randn(run[site].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if site.startswith(("scores", "pattern")):
        along = along.tril()
    gradient = model.gradients("abcdefgh", difference, wrt=[site])[site]
    step = 1e-3  # norms compute in single precision whatever the model does
    plus, minus = (
        difference(model.run("abcdefgh", edits=[Edit(site, None, (sign * step * along)[0], "add")])) for sign in (1, -1)
    )
    slope = float((plus - minus)[0]) / (2 * step)
    assert slope == pytest.approx(float((gradient * along).sum()), rel=5e-3, abs=1e-5)
    assert abs(slope) > 1e-5


_DOUBLED: dict[str, ps.Model] = {}


def doubled(family: str) -> ps.Model:
    if family not in _DOUBLED:
        hf = tiny(family, dtype=torch.float64)
        if family == "mixtral":
            hf.set_experts_implementation("eager")  # grouped products of experts are not there in double precision
        _DOUBLED[family] = ps.load((hf, tiny_tokenizer()))
    return _DOUBLED[family]


def test_every_edit_has_its_own_gradient_in_the_order_given() -> None:
    v = torch.zeros(loaded("gpt2").d_model)
    one, two = Edit("resid.1", 0, v, "add"), Edit("resid.2", 1, v.clone(), "add")
    nothing = [stop_gradient("embed"), Edit("mlp_out.1", None, write="scale", amount=0.5)]
    got = loaded("gpt2").gradients("abcd", difference, edits=[nothing[0], one, nothing[1], two, one], wrt=["resid.1", "resid.2"])
    assert [g is None for g in got.edits] == [True, False, True, False, False]
    assert got.edits[3] is not None and error(got.edits[3], got["resid.2"][0, 1]) < 1e-6
    assert got.edits[1] is not None and error(got.edits[1], 2 * got["resid.1"][0, 0]) < 1e-6  # it was made twice


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3n", "gemma4", "bloom", "mixtral", "mamba2"])
def test_checkpointing_changes_nothing_but_what_is_kept(family: str) -> None:
    model, sites = loaded(family), ["resid.0", "resid.4", "attn_in.2"]
    edits = [Edit("resid.1", -1, torch.ones(model.d_model) * 0.1, "add"), Edit("resid.3", 2, torch.ones(model.d_model))]
    calls: list[int] = []
    attention = model.engine.parts.blocks[1].attention
    assert attention is not None
    model.run("ab", read=sites)  # what is measured once is measured
    # when it begins: the second time, a pass ends as soon as it has given back what was not kept
    handle = attention.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = model.gradients(["abcd", "efgh"], difference, wrt=sites, edits=edits, checkpoint=False)
    n = len(calls)
    again = model.gradients(["abcd", "efgh"], difference, wrt=sites, edits=edits, checkpoint=True)
    handle.remove()
    assert len(calls) - n == 2 * n  # each block ran a second time on the way back
    for site in sites:
        assert torch.equal(plain[site], again[site])
    assert all(torch.equal(a, b) for a, b in zip(plain.edits, again.edits, strict=True) if a is not None and b is not None)


def test_memory_that_runs_out_is_met_by_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, block, modes = loaded("llama"), loaded("llama").engine.blocks[2], []

    def hook(*_args: object) -> None:
        modes.append("forward" in vars(block))
        if "forward" not in vars(block):  # not yet checkpointed
            raise torch.OutOfMemoryError("as if")

    handle = block.register_forward_hook(hook)
    got = model.gradients("abcd", difference, wrt=["resid.2"])
    handle.remove()
    assert modes == [False, True]
    assert error(got["resid.2"], model.gradients("abcd", difference, wrt=["resid.2"])["resid.2"]) < 1e-6


def test_gradients_of_edits() -> None:
    model, v = doubled("llama"), torch.randn(64, generator=torch.Generator().manual_seed(2)).double() * 0.3
    edits = [
        Edit("resid.2", -1, v),
        Edit("resid.1", [0, 1], torch.stack([v, -v]), "add"),
        Edit("z.3.1", 0, write="scale", amount=2.0),
    ]
    got = model.gradients(["abcdefgh", "xyz"], difference, edits=edits)
    assert [None if g is None else g.shape for g in got.edits] == [(64,), (2, 64), None]
    x = torch.randn(64, generator=torch.Generator().manual_seed(3)).double()
    for k in (0, 1):
        moved = [
            sum(
                difference(
                    model.run(
                        ["abcdefgh", "xyz"],
                        edits=[
                            Edit(e.site, e.position, e.value + s * 1e-3 * x if j == k else e.value, e.write, amount=e.amount)
                            for j, e in enumerate(edits)
                        ],
                    )
                )
            )
            for s in (1, -1)
        ]
        gradient = got.edits[k]
        assert gradient is not None
        assert float(moved[0] - moved[1]) / 2e-3 == pytest.approx(float((gradient * x).sum()), rel=5e-3, abs=1e-4)


def test_gradients_stop_where_they_are_told_to() -> None:
    model = loaded("llama")
    stopped = model.gradients("abcd", difference, wrt=["resid.1", "resid.3"], edits=[stop_gradient("resid.2")])
    assert float(stopped["resid.1"].abs().max()) == 0 and float(stopped["resid.3"].abs().max()) > 0
    some = model.gradients("abcd", difference, wrt=["resid.2"], edits=[stop_gradient("resid.3", [0, 1, 2, 3])])
    assert float(some["resid.2"][0, :4].abs().max()) == 0 or float(some["resid.2"][0, 4].abs().max()) > 0
    assert torch.equal(stopped.run.logits, model.run("abcd").logits)


def test_gradients_at_features() -> None:
    """∂m/∂f = ∂m/∂x · decoder, and the run itself is the same bit for bit."""
    model, generator = loaded("llama"), torch.Generator().manual_seed(0)
    dictionary = Dictionary(*(torch.randn(s, generator=generator) for s in [(40, 64), (40,), (40, 64), (64,)]))
    subspace = Subspace.spanned_by(torch.randn(3, 64, generator=generator))
    hung = {"resid.2": dictionary, "resid.4": subspace}
    got = model.gradients("abcdef", difference, wrt=["resid.2", "resid.4"], coordinates=hung)
    plain = model.gradients("abcdef", difference, wrt=["resid.2", "resid.4"])
    assert torch.equal(got.run.logits, plain.run.logits)
    assert error(got["resid.2"], plain["resid.2"]) < 1e-5
    assert error(got.features["resid.2"], plain["resid.2"] @ dictionary.decoder.T) < CLOSE
    assert error(got.features["resid.4"], plain["resid.4"] @ subspace.basis.T) < CLOSE
    assert torch.equal(got.run.features["resid.2"], dictionary.encode(model.run("abcdef", read=["resid.2"])["resid.2"]))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n", "gpt_oss", "falcon"])
def test_tangents_are_what_gradients_say(family: str) -> None:
    """u · (J t) = (Jᵀ u) · t, at the logits and at a site; by forward mode or by going back twice."""
    model, generator = loaded(family), torch.Generator().manual_seed(1)
    run = model.run("abcdef", read=["resid.1", "resid.4"])
    along = torch.randn(run["resid.1"].shape, generator=generator)
    got = model.jvp("abcdef", "resid.1", along, read=["resid.4", "resid.1"])
    assert error(got.run.logits, run.logits) < 1e-5 and error(got.run["resid.4"], run["resid.4"]) < 1e-5
    assert torch.equal(got["resid.1"], along)
    u = torch.randn(run["resid.4"].shape, generator=generator)
    back = model.gradients("abcdef", lambda r: (r["resid.4"] * u).sum(), wrt=["resid.4", "resid.1"])
    assert float((got["resid.4"] * u).sum()) == pytest.approx(float((back["resid.1"] * along).sum()), rel=1e-3)
    slope = model.gradients("abcdef", difference, wrt=["resid.1"])
    assert float(difference(Run(got.logits, run.mask, {}, DEPTH))) == pytest.approx(
        float((slope["resid.1"] * along).sum()), rel=1e-3, abs=1e-5
    )


def test_the_model_is_left_as_it_was() -> None:
    hf = tiny("llama").requires_grad_(True)
    model = ps.load((hf, tiny_tokenizer()))
    before = {name: p.clone() for name, p in hf.named_parameters()}
    model.gradients("abcd", difference, wrt=["resid.1", "pattern.2"], checkpoint=True)
    with pytest.raises(ZeroDivisionError):
        model.gradients("abcd", lambda run: 1 / 0, wrt=["pattern.1"], checkpoint=True)  # type: ignore[arg-type, return-value]
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[name]) for name, p in hf.named_parameters())
    assert all(
        not m._forward_hooks and not m._forward_pre_hooks and not {"forward", "_patchscopes_tap"} & set(vars(m))
        for m in hf.modules()
    )
    assert hf.config._attn_implementation == tiny("llama").config._attn_implementation


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda run: run.logits[:, -1], r"gave \(1, 97\); expected one number for each prompt, \(1,\)"),
        (lambda run: 3.0, "gave float"),
        (lambda run: torch.zeros(1), "does not depend on the run"),
    ],
)
def test_a_metric_that_is_none(metric: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaded("gpt2").gradients("abc", metric, wrt=["resid.1"])


def test_what_is_refused() -> None:
    with pytest.raises(RefusedError, match="recurrent states"):
        loaded("mamba").gradients("abc", difference, wrt=["state.1"])
    with pytest.raises(VectorError, match=r"tangent at resid\.1 has the shape \(3,\)"):
        loaded("gpt2").jvp("abc", "resid.1", torch.zeros(3))
    model = ps.load((tiny("gpt2"), tiny_tokenizer()))
    model.hf.config.quantization_config = {"quant_method": "as if"}  # what a quantised model carries
    with pytest.raises(RefusedError, match="weights are quantised"):
        model.gradients("abc", difference, wrt=["resid.1"])


@pytest.mark.parametrize("family", ["llama", "falcon", "gptj", "gemma3n", "mixtral", "olmo2"])
def test_gradients_at_many_sites_together_are_those_at_each_alone(family: str) -> None:
    """What passes at a site may go elsewhere too: the MLP reads what the attention reads, a norm's scale is divided away."""
    model = loaded(family)
    names = ["resid.1", "attn_in.2", "attn_scale.2", "head_out.2", "mlp_in.2", "expert_out.2", "final_scale", "logits"]
    sites = [name for name in names if _has(model, name)]
    together = model.gradients(["abcdefgh", "xy"], difference, wrt=sites)
    for site in sites:
        alone = model.gradients(["abcdefgh", "xy"], difference, wrt=[site])[site]
        assert error(together[site], alone) < 1e-3, site


def _has(model: ps.Model, site: str) -> bool:
    try:
        model.run("a", read=[site])
    except InputError:
        return False
    return True


def test_each_edit_has_its_gradient_in_the_order_given() -> None:
    model, v = loaded("llama"), torch.randn(64, generator=torch.Generator().manual_seed(0))
    half = {"write": "scale", "amount": 0.5}
    edits = [Edit("resid.1", 0, **half), Edit("resid.1", 1, v), Edit("resid.2", 1, **half), Edit("resid.3", 1, v.clone(), "add")]
    got = model.gradients("abc", difference, edits=edits)
    assert [g is None for g in got.edits] == [True, False, True, False]
    assert got.edits[1] is not None and got.edits[3] is not None and not torch.equal(got.edits[1], got.edits[3])
