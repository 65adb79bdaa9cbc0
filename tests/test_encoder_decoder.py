"""Encoder–decoders bound to a text: their decoder as a source and a target, against full passes with one hook and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import pytest
import torch
import transformers
from families import VOCAB, randomised, tiny_tokenizer
from oracle import CLOSE, error
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

import patchscopes as ps
from patchscopes.core.errors import InputError, RefusedError, SiteError

DEPTH, WIDTH, START = 5, 64, 1
SOURCE, OTHER, PROMPT, STEPS = "Q4 up!", "(other) text", "hello x, y", 4

_ALL = {
    **{
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "decoder_start_token_id": START,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
}
_T5 = {
    **_ALL,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": DEPTH,
    "num_heads": 4,
}  # fewer blocks in the encoder
_BART = {
    **{**_ALL, "encoder_layers": 3, "decoder_layers": DEPTH, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "forced_eos_token_id": None},
}
CONFIGS = {
    "t5": transformers.T5Config(**_T5, feed_forward_proj="gated-gelu"),
    "umt5": transformers.UMT5Config(**_T5),  # a position bias of its own in every block
    "longt5": transformers.LongT5Config(**_T5, local_radius=4),
    "switch_transformers": transformers.SwitchTransformersConfig(**_T5, num_experts=4),
    "bart": transformers.BartConfig(**_BART),
    "mbart": transformers.MBartConfig(**_BART),
    "marian": transformers.MarianConfig(**_BART),
    "pegasus": transformers.PegasusConfig(**_BART),
    "m2m_100": transformers.M2M100Config(**_BART),
    "plbart": transformers.PLBartConfig(**_BART),
    "led": transformers.LEDConfig(
        **_BART, max_encoder_position_embeddings=128, max_decoder_position_embeddings=128, attention_window=4
    ),
}
if transformers.__version__.startswith("5.15."):  # there tokens of UMT5's decoder see later ones, so it is refused
    del CONFIGS["umt5"]
BLOCKS = {
    **dict.fromkeys(CONFIGS, "model.decoder.layers"),
    **dict.fromkeys(("t5", "umt5", "longt5", "switch_transformers"), "decoder.block"),
    "led": "led.decoder.layers",
}
# (self-attention, MLP) where a block adds its three outputs to the stream; BART, Marian, PLBART and LED normalise after each
WRITERS = {
    **dict.fromkeys(("t5", "umt5", "longt5"), ("layer.0.SelfAttention", "layer.2.DenseReluDense")),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100"), ("self_attn", "fc2")),
}


def tiny(family: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(AutoModelForSeq2SeqLM.from_config(CONFIGS[family]))


@cache
def loaded(family: str) -> ps.Model:
    return ps.load((tiny(family), tiny_tokenizer()))


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def full_logits(
    family: str, text: str, ids: Sequence[int], layer: int = -1, position: int = 0, value: Tensor | None = None
) -> Tensor:
    """One full pass of encoder and decoder, one hook, no cache."""
    hf = loaded(family).hf
    blocks = hf.get_submodule(BLOCKS[family])

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        if value is not None:
            x[0, position] = value
        return x

    if layer < len(blocks):
        handle = blocks[layer].register_forward_pre_hook(lambda _m, args: (put(args[0]), *args[1:]))
    else:
        handle = blocks[-1].register_forward_hook(
            lambda _m, _a, out: (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)
        )
    try:
        with torch.no_grad():
            encoded = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
            return hf(input_ids=encoded, decoder_input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        handle.remove()


def seen(family: str, text: str, ids: Sequence[int], path: str) -> Tensor:
    """What a module of the decoder puts out in a full pass."""
    found: list[Tensor] = []
    module = loaded(family).hf.get_submodule(path)
    handle = module.register_forward_hook(lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out).clone()))
    full_logits(family, text, ids)
    handle.remove()
    return found[-1]


def vectors(count: int, like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(WIDTH, generator=generator) * float(like.std()) for _ in range(count)]


def test_the_decoder_is_found_and_the_fast_route_taken(family: str) -> None:
    model = loaded(family)
    assert (model.n_layers, model.engine.anatomy.blocks_path) == (DEPTH, BLOCKS[family])
    assert model.capabilities.route == model.capabilities.readout_route == "stairs"


def test_reads_edits_and_unembedding(family: str) -> None:
    model = loaded(family).given(text=SOURCE)
    ids = model.tokens(PROMPT).ids
    assert ids == (START, *tiny_tokenizer()(PROMPT, add_special_tokens=False)["input_ids"])
    want = full_logits(family, SOURCE, ids)
    run = model.run(PROMPT, read=["resid.*"])
    assert error(run.logits[0], want) <= CLOSE
    assert error(run["resid.3"], seen(family, SOURCE, ids, f"{BLOCKS[family]}.2")) <= CLOSE
    assert error(model.unembed(run[f"resid.{DEPTH}"])[0], want) <= CLOSE
    for layer, value in enumerate(vectors(DEPTH + 1, run["resid.2"])):
        patched = full_logits(family, SOURCE, ids, layer, 4, value)
        edited = model.run(PROMPT, edits=[ps.Edit(f"resid.{layer}", position=4, value=value)])
        assert error(edited.logits[0], patched) <= CLOSE, layer
        assert error(patched, want) > 10 * CLOSE


def test_the_text_that_was_given_matters_and_binds_one_model_only(family: str) -> None:
    model = loaded(family)
    one, other = model.given(text=SOURCE), model.given(text=OTHER)
    ids = model.tokens(PROMPT).ids
    for bound, text in ((one, SOURCE), (other, OTHER), (one, SOURCE)):
        assert error(bound.run(PROMPT).logits[0], full_logits(family, text, ids)) <= CLOSE
    assert error(one.run(PROMPT).logits, other.run(PROMPT).logits) > 10 * CLOSE
    assert one.provenance()["given"] == {"text": SOURCE}
    with pytest.raises(RefusedError, match=r"its decoder needs a text to look at.*model\.given\(text=…\)"):
        model.run(PROMPT)


def test_source_and_target(family: str) -> None:
    """States of the decoder behind one text, patched into it behind another, at all layers, and what it says then."""
    source, scope = loaded(family).given(text=OTHER), loaded(family).given(text=SOURCE)
    states = source.run("abc", read=["resid.*"])
    readings = ps.Patchscope(PROMPT, position=-1, layer="same", model=scope, max_new_tokens=STEPS)(
        ps.Source(source, "abc", position=2, layer="all"), keep_logits=True, controls=False
    )
    table = readings.table
    assert table["source_layer"].to_list() == list(range(table.height))
    ids = list(scope.tokens(PROMPT).ids)
    for row, layer in enumerate(table["source_layer"]):
        value, text = states.at(f"resid.{layer}", position=2), []
        for step in range(STEPS):
            logits = full_logits(family, SOURCE, [*ids, *text], layer, len(ids) - 1, value)[-1]
            if step == 0:
                assert error(readings.logits[row], logits) <= CLOSE, layer
            if int(logits.argmax()) in scope.end_ids:
                break
            text.append(int(logits.argmax()))
        assert table["text"][row] == scope.decode(text), layer
    assert min(error(readings.logits[a], readings.logits[b]) for a, b in combinations(range(table.height), 2)) > 10 * CLOSE


def test_attention_and_mlp_outputs(family: str) -> None:
    model = loaded(family).given(text=SOURCE)
    if family not in WRITERS:
        assert model.capabilities.ok("writers") == (family == "switch_transformers")
        return
    ids = model.tokens(PROMPT).ids
    assert [len(writers) for writers in model.engine.anatomy.writers] == [3] * DEPTH
    run = model.run(PROMPT, read=["attn_out.2", "mlp_out.2"])
    for site, path in zip(("attn_out.2", "mlp_out.2"), WRITERS[family], strict=True):
        assert error(run[site], seen(family, SOURCE, ids, f"{BLOCKS[family]}.2.{path}")) <= CLOSE, site


def test_an_empty_decoder_prompt_is_the_token_that_starts_it() -> None:
    model = loaded("t5").given(text=SOURCE)
    assert model.tokens("").ids == (START,)
    assert error(model.run("").logits[0], full_logits("t5", SOURCE, [START])) <= CLOSE


def test_what_is_no_encoder_cannot_be_given_a_text() -> None:
    with pytest.raises(InputError, match="has no encoder"):
        ps.load("atlas").given(text="Paris")
    with pytest.raises(InputError, match="expected either text"):
        loaded("t5").given()


def test_a_folder_is_loaded_as_what_it_is(tmp_path) -> None:
    tiny("t5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = ps.load(tmp_path).given(text=SOURCE)
    assert error(model.run(PROMPT).logits[0], full_logits("t5", SOURCE, model.tokens(PROMPT).ids)) <= CLOSE


def test_sites_that_a_post_norm_model_has_not() -> None:
    with pytest.raises(SiteError, match="is not on this model"):
        loaded("bart").given(text=SOURCE).run(PROMPT, read=["mlp_out.1"])
