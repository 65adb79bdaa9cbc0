"""The residual stream is the sum of what was written into it."""

from __future__ import annotations

import pytest
from families import CONFIGS, FAMILIES, loaded
from oracle import error

from patchscopes.core.errors import RefusedError
from patchscopes.model import Model


@pytest.mark.parametrize(
    "family", [*FAMILIES, "granite", "cohere", "falcon", "olmo2", "qwen3_next", "jamba", "gpt_oss", "nemotron_h"]
)
def test_the_parts_sum_to_the_stream(family: str) -> None:
    model: Model = loaded(family)
    got = model.decompose(["abcdefgh", "two pets"])
    assert error(got.components.sum(0), got.total) < 1e-6
    assert float(got["rest"].abs().max()) < 1e-5 * float(got.total.abs().max()), "blocks are what their parts write"
    assert not [label for label in got.labels if label.startswith("block")]
    run = model.run(["abcdefgh", "two pets"], read=["resid.-1", "resid.0", "attn_out.1"])
    assert error(got.total, run["resid.-1"]) == 0 and error(got["embed"], run["resid.0"]) == 0
    heads = [label for label in got.labels if label.startswith("head_out.1.")]
    if heads:
        whole = got["attn_bias.1"] + sum(got[label] for label in heads)
        assert error(whole, run["attn_out.1"]) < 1e-5
        assert len(heads) == model.engine.parts.blocks[1].heads


def test_up_to_a_layer_and_without_heads() -> None:
    model = loaded("gpt2")
    got = model.decompose("abc", 2, heads=False)
    assert got.labels == ("embed", "attn_out.0", "mlp_out.0", "attn_out.1", "mlp_out.1", "rest")
    assert model.decompose("abc", 0).labels == ("embed", "rest")


def test_blocks_that_scale_the_stream_scale_what_is_in_it() -> None:
    """Gemma-4 multiplies the stream by a learned number; its blocks have three writers, so they are components as a whole."""
    model = loaded("gemma4")
    got = model.decompose("abcdefgh")
    assert got.labels == ("embed", *(f"block.{b}" for b in range(5)), "rest")
    assert error(got.components.sum(0), got.total) < 1e-6


def test_several_streams_are_no_sum() -> None:
    with pytest.raises(RefusedError, match="4 streams"):
        loaded("gemma3n").decompose("abc")
    assert "gemma3n" in CONFIGS
