"""Vision–language models bound to a prompt with an image: their language decoder as a source and a target, against full passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest
import torch
import transformers
from families import _LLAMA_LIKE, _SHARED_KV, DEPTH, WIDTH, randomised, tiny_tokenizer
from oracle import CLOSE, error
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import patchscopes as ps
from patchscopes.core.errors import InputError, RefusedError
from patchscopes.model import Span

IMAGE, BEGIN, END = 90, 88, 89  # token ids
IDS = [1, 10, 11, BEGIN, *[IMAGE] * 4, END, 20, 21, 22, 23]
PLACE = Span(4, 7)
STEPS = 3

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {**_VISION, "image_size": 8, "patch_size": 4}
_GRID = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "out_hidden_size": WIDTH},
    **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
_MARKS = {"image_token_id": IMAGE, "vision_start_token_id": BEGIN, "vision_end_token_id": END, "video_token_id": 91}
_MROPE = {**_LLAMA_LIKE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_T = transformers
# vision towers of two blocks, and of as many as the decoder has; images as pictures, and as patches on a grid (M-RoPE)
CONFIGS = {
    "llava": _T.LlavaConfig(
        text_config=_T.LlamaConfig(**_LLAMA_LIKE),
        vision_config=_T.CLIPVisionConfig(**{**_CLIP, "num_hidden_layers": DEPTH}, projection_dim=32),
        image_token_index=IMAGE,
    ),
    "mistral3": _T.Mistral3Config(
        text_config=_T.MistralConfig(**_LLAMA_LIKE, sliding_window=None),
        vision_config=_T.PixtralVisionConfig(**_VISION, image_size=16, patch_size=4, head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    ),
    "internvl": _T.InternVLConfig(
        text_config=_T.Qwen2Config(**_LLAMA_LIKE),
        vision_config=_T.InternVLVisionConfig(**_VISION, image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "smolvlm": _T.SmolVLMConfig(
        text_config=_T.LlamaConfig(**_LLAMA_LIKE),
        vision_config={**_VISION, "image_size": 16, "patch_size": 4},
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    # the tokens of an image see each other
    "gemma3": _T.Gemma3Config(
        text_config=_T.Gemma3TextConfig(**_LLAMA_LIKE, sliding_window=6, layer_types=_SHARED_KV["layer_types"]),
        vision_config=_T.SiglipVisionConfig(**_CLIP),
        **{"mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END},
    ),
    "qwen2_vl": _T.Qwen2VLConfig(
        text_config=_MROPE,
        vision_config={k: v for k, v in _GRID.items() if k not in ("out_hidden_size", "intermediate_size")}
        | {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
        **_MARKS,
    ),
    "qwen2_5_vl": _T.Qwen2_5_VLConfig(
        text_config=_MROPE, vision_config={**_GRID, "window_size": 16, "fullatt_block_indexes": [1]}, **_MARKS
    ),
    # adds what the vision tower saw to the residual stream of the first blocks, too
    "qwen3_vl": _T.Qwen3VLConfig(
        text_config=_MROPE, vision_config={**_GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}, **_MARKS
    ),
    "qwen3_5": _T.Qwen3_5Config(
        text_config={
            **{**_MROPE, **_DELTA, "layer_types": ["linear_attention", "full_attention"] * 2 + ["full_attention"]},
            "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0},
        },
        vision_config={**_GRID, "num_position_embeddings": 16},
        **_MARKS,
    ),
}
BLOCKS = {**dict.fromkeys(CONFIGS, "model.language_model.layers"), "smolvlm": "model.text_model.layers"}
# "hooks" where states of image tokens are not all that blocks get of an image
ROUTES = {**dict.fromkeys(CONFIGS, "stairs"), "qwen3_vl": "hooks"}


def inputs(family: str) -> dict[str, Tensor]:
    """What a processor would return."""
    generator, ids = torch.Generator().manual_seed(5), torch.tensor([IDS])
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        made |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
        return made
    size = 8 if family in ("llava", "gemma3") else 16
    made["pixel_values"] = torch.randn(*((1,) if family == "smolvlm" else ()), 1, 3, size, size, generator=generator)
    if family == "gemma3":
        made["token_type_ids"] = (ids == IMAGE).long()
    if family == "mistral3":
        made["image_sizes"] = torch.tensor([[size, size]])
    return made


def tiny(family: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(AutoModelForImageTextToText.from_config(CONFIGS[family]))


@cache
def loaded(family: str) -> ps.Model:
    return ps.load((tiny(family), tiny_tokenizer()))


@cache
def bound(family: str) -> ps.Model:
    return loaded(family).given(inputs(family))


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def reference(family: str) -> nn.Module:
    """The same model again, for full passes: some note in themselves what they saw last."""
    return tiny(family)


def full_pass(
    family: str, text: Sequence[int] = (), layer: int = -1, position: int = 0, value: Tensor | None = None, *, prompt: bool = True
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits and layers of one full pass over the prompt with its image and `text` behind it (or `text` alone), with one hook."""
    hf, seen = reference(family), {}
    given = inputs(family) if prompt else {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
    ids = torch.cat([given["input_ids"], torch.tensor([list(text)], dtype=torch.long)], 1)
    per_token = {name: torch.zeros_like(ids) for name in ("token_type_ids", "mm_token_type_ids") if name in given}
    for name, zeros in per_token.items():
        zeros[:, : len(IDS)] = given[name]
    given = {**given, **per_token, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    blocks = hf.get_submodule(BLOCKS[family])

    def put(b: int, x: Tensor) -> Tensor:
        x = x.clone()
        if value is not None and b == layer:
            x[0, position] = value
        seen[b] = x[0]
        return x

    handles = [
        block.register_forward_pre_hook(lambda _m, args, b=b: (put(b, args[0]), *args[1:])) for b, block in enumerate(blocks)
    ]
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _m, _a, out: (put(DEPTH, out[0]), *out[1:]) if isinstance(out, tuple) else put(DEPTH, out)
        )
    )
    try:
        with torch.no_grad():
            return hf(**given, use_cache=False).logits[0], seen
    finally:
        for handle in handles:
            handle.remove()


def vector(seed: int, like: Tensor) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * float(like.std())


def test_images_are_named_and_the_expected_route_taken(family: str) -> None:
    model = bound(family)
    tokens = model.tokens(inputs(family)["input_ids"])
    assert tokens.ids == tuple(IDS) and tokens.images == (PLACE,)
    assert tokens.position(tokens.images[0]) == PLACE.last
    able = model.capabilities
    assert (able.route, able.readout_route) == (ROUTES[family], ROUTES[family])
    if ROUTES[family] == "hooks":
        assert able.abilities["stairs"].reason.startswith("with images:")
    assert loaded(family).capabilities.route == "stairs"  # without images


def test_reads_edits_and_unembedding(family: str) -> None:
    model, want = bound(family), full_pass(family)
    tokens = model.tokens(IDS)
    run = model.run(tokens, read=["resid.*"])
    assert error(run.logits[0], want[0]) <= CLOSE
    assert max(error(run[f"resid.{k}"][0], want[1][k]) for k in range(DEPTH + 1)) <= CLOSE
    assert error(model.unembed(run[f"resid.{DEPTH}"])[0], want[0]) <= CLOSE
    for layer, position in product((0, 2, DEPTH), (2, 5, tokens.images[0].last, 11)):
        place, value = tokens.position(position), vector(layer, run["resid.2"])
        patched = full_pass(family, (), layer, place, value)[0]
        edited = model.run(tokens, edits=[ps.Edit(f"resid.{layer}", position=position, value=value)])
        assert error(edited.logits[0], patched) <= CLOSE, (layer, place)
        assert error(patched, want[0]) > 10 * CLOSE


def test_the_image_matters(family: str) -> None:
    other = inputs(family)
    other["pixel_values"] = other["pixel_values"].flip(-1)
    a, b = (model.run(model.tokens(IDS)).logits for model in (bound(family), loaded(family).given(other)))
    assert error(a, b) > 10 * CLOSE
    assert bound(family).provenance()["given"] != loaded(family).given(other).provenance()["given"]


@pytest.mark.parametrize("position", [2, 5, 7, 9, 12], ids=["before", "inside", "image's last", "after", "last"])
def test_a_target_with_an_image(family: str, position: int) -> None:
    """Patched before the image, in it and behind it; three tokens said."""
    model = bound(family)
    states = [vector(k, full_pass(family)[1][2]) for k in range(2)]
    scope = ps.Patchscope(model.tokens(IDS), position=position, layer=[0, 1, 3, DEPTH], max_new_tokens=STEPS)
    source = ps.Source.of_vectors(model, torch.stack(states), layer=2)
    readings = scope(source, controls=False, keep_logits=True)
    assert readings.table.height == 8
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        text: list[int] = []
        for step in range(STEPS):
            logits = full_pass(family, text, row["target_layer"], position, states[row["prompt"]])[0][-1]
            if step == 0:
                assert error(readings.logits[k], logits) <= CLOSE, row
            if int(logits.argmax()) in model.end_ids:
                break
            text.append(int(logits.argmax()))
        assert row["text"] == model.decode(text), row


def test_image_tokens_as_a_source(family: str) -> None:
    """What stands at an image's tokens, patched into a prompt of words: by the model that has the image, and by that without."""
    model, prompt = bound(family), "one, two x"
    tokens = model.tokens(IDS)
    ids = list(model.tokens(prompt).ids)
    for target_model in (model, loaded(family)):
        scope = ps.Patchscope(prompt, position="x", layer="same", model=target_model, max_new_tokens=1)
        readings = scope(ps.Source(model, tokens, position=tokens.images[0], layer="all"), controls=False, keep_logits=True)
        for k, layer in enumerate(readings.table["source_layer"]):
            state = full_pass(family)[1][layer][PLACE.last]
            assert error(readings.logits[k], full_pass(family, ids, layer, len(ids) - 1, state, prompt=False)[0][-1]) <= CLOSE, (
                layer
            )


def test_the_model_is_left_as_it_was(family: str) -> None:
    model = loaded(family)
    bound(family)
    noted = [vars(module).get("rope_deltas") for module in model.hf.modules()]
    model.given(inputs(family)).run(model.tokens(IDS))
    assert all(now is before for now, before in zip((vars(m).get("rope_deltas") for m in model.hf.modules()), noted, strict=True))
    ids = list(model.tokens("no image").ids)
    assert error(model.run("no image").logits[0], full_pass(family, ids, prompt=False)[0]) <= CLOSE


def test_positions_are_the_models_own() -> None:
    """Qwen counts an image of two by two tokens as two positions; LLaVA counts four."""
    assert bound("qwen2_5_vl").engine.given.next_position == len(IDS) - 2
    assert bound("llava").engine.given.next_position == len(IDS)


def test_what_cannot_be_bound_is_said() -> None:
    model = bound("qwen2_vl")
    with pytest.raises(InputError, match="not the prompt that the images were given for"):
        model.run(model.tokens([1, 30, *IDS[2:]]))
    with pytest.raises(InputError, match="expected one prompt with image tokens"):
        loaded("llava").given({**inputs("llava"), "input_ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(InputError, match="names no token that stands for an image"):
        ps.load("atlas").given(inputs("llava"))


def test_a_model_whose_prompt_sees_itself_is_refused() -> None:
    """PaliGemma lets all tokens of a prompt see each other: no state of it could be read before the end."""
    config = _T.PaliGemmaConfig(
        text_config=_T.GemmaConfig(**_LLAMA_LIKE),
        vision_config=_T.SiglipVisionConfig(**_CLIP, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
    )
    with pytest.raises(RefusedError, match="early positions see later ones"):
        ps.load((AutoModelForImageTextToText.from_config(config).eval(), tiny_tokenizer()))
