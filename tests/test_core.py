"""Layers, sites, errors and edits: what names mean, and what is said when they mean nothing."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscopes.core import errors
from patchscopes.core.edits import written
from patchscopes.core.errors import LayerError, PatchscopesError, SiteError, nearest
from patchscopes.core.layers import resolve_layers
from patchscopes.core.sites import Site, resolve_sites

L = 9  # layers 0…9, blocks 0…8


class TestLayers:
    @pytest.mark.parametrize(
        ("given", "want"),
        [
            (3, [3]),
            (0, [0]),
            (L, [L]),
            (-1, [L]),
            (-L - 1, [0]),
            ([5, 3, -1, 3], [5, 3, 9, 3]),  # the order given, twice if asked twice
            ((2,), [2]),
            (range(2, 8, 3), [2, 5]),
            ("all", list(range(10))),
            (" all ", list(range(10))),
            ("3", [3]),
            ("-1", [9]),
            ("3,5,9", [3, 5, 9]),
            ("9, 5", [9, 5]),
            ("3:9", [3, 4, 5, 6, 7, 8]),
            ("3:9:2", [3, 5, 7]),
            (":", list(range(10))),
            ("::4", [0, 4, 8]),
            ("7:", [7, 8, 9]),
            (":2", [0, 1]),
            ("-2:", [8, 9]),
            (":-8", [0, 1]),
            ("6:3:-1", [6, 5, 4]),
            ("8:10", [8, 9]),  # 10 is the end of the last layer, as in Python
            ("1,7:9,-1", [1, 7, 8, 9]),
        ],
    )
    def test_what_they_name(self, given: object, want: list[int]) -> None:
        found = resolve_layers(given, L)  # type: ignore[arg-type]
        assert found == want
        assert all(type(layer) is int for layer in found)

    @pytest.mark.parametrize("given", [10, -11, 400, [3, 10], range(8, 12), "10", "-11", "3,10", "3:99", "-11:3", "99:"])
    def test_out_of_range_says_the_range(self, given: object) -> None:
        with pytest.raises(LayerError, match=r"(10|11|400|99).*0 to 9.*-1 is the last"):
            resolve_layers(given, L)  # type: ignore[arg-type]

    @pytest.mark.parametrize("given", ["", " ", "three", "3-5", "1:2:3:4", "3,,5", "3,", "1.5", "0x3", "all,3"])
    def test_garbage_is_quoted_and_the_forms_are_listed(self, given: str) -> None:
        with pytest.raises(LayerError) as caught:
            resolve_layers(given, L)
        for words in (repr(given), "(3)", "(3,5,9)", "3:9:2", "'all'", "0 to 9"):
            assert words in str(caught.value)

    def test_numbers_of_other_libraries(self) -> None:
        plain = inspect.unwrap(resolve_layers)  # as users call it: without its annotations executed
        assert plain(np.arange(1, 8, 3), L) == plain(torch.tensor([1, 4, -3]), L) == [1, 4, 7]
        assert plain(np.int64(-1), L) == [9]

    @pytest.mark.parametrize("given", [[1.5], ["3"], [None]])
    def test_a_list_of_something_else(self, given: list) -> None:
        with pytest.raises(LayerError, match=rf"{re.escape(repr(given[0]))} is not a layer; expected a whole number from 0 to 9"):
            inspect.unwrap(resolve_layers)(given, L)

    def test_a_step_of_zero(self) -> None:
        with pytest.raises(LayerError, match=r"'1:5:0' has a step of 0; expected a step such as 2"):
            resolve_layers("2,1:5:0", L)

    @pytest.mark.parametrize("given", [[], range(4, 4), "5:3", "0:0"])
    def test_none_named(self, given: object) -> None:
        with pytest.raises(LayerError, match=r"no layer is named by .*0 to 9"):
            resolve_layers(given, L)  # type: ignore[arg-type]

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(st.integers(1, 40), st.data())
    def test_text_means_what_python_slices_mean(self, n: int, data: st.DataObject) -> None:
        bound = st.none() | st.integers(-n - 1, n + 1)
        first, stop = data.draw(bound), data.draw(bound)
        step = data.draw(st.none() | st.integers(-4, 4).filter(bool))
        text = ":".join("" if bound is None else str(bound) for bound in (first, stop, step))
        want = list(range(n + 1))[slice(first, stop, step)]
        if want:
            assert resolve_layers(text, n) == want
        else:
            with pytest.raises(LayerError, match="no layer is named"):
                resolve_layers(text, n)


class TestSites:
    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("resid.0", ["resid.0"]),
            ("resid.9", ["resid.9"]),
            ("resid.-1", ["resid.9"]),
            ("resid.-10", ["resid.0"]),
            ("attn_out.8", ["attn_out.8"]),
            ("attn_out.-1", ["attn_out.8"]),  # a block, so one fewer than there are layers
            ("mlp_out.-9", ["mlp_out.0"]),
            (" mlp_out.3 ", ["mlp_out.3"]),
            ("resid.*", [f"resid.{layer}" for layer in range(10)]),
            ("attn_out.*", [f"attn_out.{b}" for b in range(9)]),
            ("mlp_out.*", [f"mlp_out.{b}" for b in range(9)]),
            # TransformerLens' names: resid_post.b is what comes out of block b, our layer b + 1
            ("blocks.0.hook_resid_pre", ["resid.0"]),
            ("blocks.3.hook_resid_pre", ["resid.3"]),
            ("blocks.3.hook_resid_post", ["resid.4"]),
            ("blocks.8.hook_resid_post", ["resid.9"]),
            ("blocks.2.hook_attn_out", ["attn_out.2"]),
            ("blocks.2.hook_mlp_out", ["mlp_out.2"]),
            ("resid_pre.3", ["resid.3"]),
            ("resid_post.3", ["resid.4"]),
            ("resid_post.8", ["resid.9"]),
            ("blocks.2.attn.hook_z", ["z.2"]),
            ("blocks.2.attn.hook_pattern", ["pattern.2"]),
            ("blocks.2.mlp.hook_post", ["neurons.2"]),
            ("hook_embed", ["embed"]),
            ("ln_final.hook_normalized", ["final_norm"]),
            # ranges of blocks, heads, and sites of the whole model
            ("mlp_out.3:5", ["mlp_out.3", "mlp_out.4"]),
            ("resid.7:", ["resid.7", "resid.8", "resid.9"]),
            ("z.3.1", ["z.3.1"]),
            ("z.3.*", ["z.3"]),
            ("pattern.1:3.0", ["pattern.1.0", "pattern.2.0"]),
            ("expert_out.-1.2", ["expert_out.8.2"]),
            ("logits", ["logits"]),
        ],
    )
    def test_what_they_name(self, text: str, want: list[str]) -> None:
        assert [str(site) for site in resolve_sites(text, L)] == want

    @pytest.mark.parametrize(
        "text", ["resid.10", "resid.-11", "attn_out.9", "attn_out.-10", "blocks.9.hook_resid_post", "resid_post.9"]
    )
    def test_out_of_range_says_the_range(self, text: str) -> None:
        with pytest.raises(SiteError, match=r"out of range; this model has (resid\.0 to resid\.9|attn_out\.0 to attn_out\.8)"):
            resolve_sites(text, L)

    @pytest.mark.parametrize("text", ["resid", "resid.", "resid.x", "mlp_out.a:b"])
    def test_no_index(self, text: str) -> None:
        with pytest.raises(
            SiteError, match=rf"{re.escape(repr(text))} has no index; expected \w+\.0 to \w+\.[89], \w+\.2:6, or \w+\.\* for all"
        ):
            resolve_sites(text, L)

    @pytest.mark.parametrize("text", ["resid.1.2", "mlp_out.1.0", "z.1.x", "z.1.-1"])
    def test_heads_only_where_there_are_heads(self, text: str) -> None:
        with pytest.raises(SiteError, match=rf"{re.escape(repr(text))} has (no heads|'.+' where a head)"):
            resolve_sites(text, L)

    def test_a_site_of_the_whole_model_has_no_index(self) -> None:
        with pytest.raises(SiteError, match="logits belongs to the whole model"):
            resolve_sites("logits.3", L)

    def test_a_site_prints_as_it_is_named(self) -> None:
        assert [str(Site("z", 3, 1)), str(Site("z", 3)), str(Site("embed"))] == ["z.3.1", "z.3", "embed"]
        assert Site("z", 3, 1).whole == Site("z", 3)

    @pytest.mark.parametrize(
        ("text", "suggestion"),
        [("residual.3", "resid"), ("atn_out.1", "attn_out"), ("mpl_out.1", "mlp_out"), ("mlp.1", "mlp_out")],
    )
    def test_unknown_suggests(self, text: str, suggestion: str) -> None:
        with pytest.raises(SiteError, match=rf"unknown site '{re.escape(text)}'.*Did you mean.*'{suggestion}'"):
            resolve_sites(text, L)

    @pytest.mark.parametrize("text", ["", "zzz.1", "blocks.2.hook_zzz", "blocks.2.attn.hook_zzz"])
    def test_unknown_lists_what_is_known(self, text: str) -> None:
        with pytest.raises(SiteError, match=r"expected name\.index with a name of resid, embed, .*attn_out.*, logits"):
            resolve_sites(text, L)

    def test_sites_sort_by_name_and_number(self) -> None:
        assert sorted([Site("resid", 10), Site("resid", 9), Site("mlp_out", 11)]) == [
            Site("mlp_out", 11),
            Site("resid", 9),
            Site("resid", 10),
        ]


CODES = {
    "PatchscopesError": 1,
    "InputError": 2,
    "PromptError": 2,
    "PositionError": 2,
    "LayerError": 2,
    "SiteError": 2,
    "UnknownName": 2,
    "VectorError": 2,
    "NotAvailableError": 4,
    "ResourceError": 5,
    "RefusedError": 6,
}


class TestErrors:
    def test_exit_codes(self) -> None:
        found = {name: e.exit_code for name, e in vars(errors).items() if isinstance(e, type) and issubclass(e, PatchscopesError)}
        assert found == CODES

    def test_input_errors_are_value_errors_and_the_others_are_not(self) -> None:
        for name, code in CODES.items():
            kind = getattr(errors, name)
            assert issubclass(kind, errors.InputError) == issubclass(kind, ValueError) == (code == 2)

    def test_the_tree_in_the_docstring_is_the_tree(self) -> None:
        drawn = re.findall(r"^\s*(?:[│├└─ ]*)(\w+(?:Error|Name))(?:\s+(\d))?", errors.__doc__ or "", re.M)
        assert {name for name, _ in drawn} == set(CODES)
        assert {name: int(code) for name, code in drawn if code} == {name: CODES[name] for name, code in drawn if code}

    def test_nearest_suggests_what_is_similar(self) -> None:
        assert nearest("surprise", ["surprisal", "logprob", "p_value"]) == "Did you mean 'surprisal'?"
        assert (
            nearest("bits_over", ["bits_over_text", "bits_over_random", "x"])
            == "Did you mean 'bits_over_text' or 'bits_over_random'?"
        )

    def test_nearest_lists_all_if_none_is_similar(self) -> None:
        assert nearest("zzz", {"b": 1, "a": 2}) == "Known: a, b."


class TestEdits:
    OLD = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # norms 5 and 2

    def test_replace(self) -> None:
        value = torch.tensor([1.0, -1.0])
        assert written(value, self.OLD, "replace").tolist() == [[1, -1], [1, -1]]

    def test_add(self) -> None:
        assert written(torch.tensor([1.0, -1.0]), self.OLD, "add").tolist() == [[4, 3], [1, 1]]

    def test_add_matched_adds_the_direction_at_the_norm_of_what_stands_there(self) -> None:
        found = written(torch.tensor([0.0, 10.0]), self.OLD, "add_matched")
        assert found.flatten().tolist() == pytest.approx([3, 9, 0, 4])
        rows = written(torch.tensor([[6.0, 8.0], [-7.0, 0.0]]), self.OLD, "add_matched")
        assert rows.flatten().tolist() == pytest.approx([6, 8, -2, 2])

    def test_replace_matched_writes_the_direction_at_the_norm_of_what_stands_there(self) -> None:
        rows = written(torch.tensor([[6.0, 8.0], [-7.0, 0.0]]), self.OLD, "replace_matched")
        assert rows.flatten().tolist() == pytest.approx([3, 4, -2, 0])
        assert written(torch.tensor([0.0, 10.0]), self.OLD, "replace_matched", 0.5).flatten().tolist() == pytest.approx(
            [0, 2.5, 0, 1]
        )

    def test_the_others(self) -> None:
        v = torch.tensor([1.0, 0.0])
        assert written(None, self.OLD, "scale", 0.5).tolist() == [[1.5, 2], [0, 1]]
        assert written(v, self.OLD, "add", 2.0).tolist() == [[5, 4], [2, 2]]
        assert written(v, self.OLD, "interpolate", 0.5).tolist() == [[2, 2], [0.5, 1]]
        assert written(v, self.OLD, "mask").tolist() == [[3, 0], [0, 0]]
        assert written(None, self.OLD.requires_grad_(), "stop_gradient").requires_grad is False
        self.OLD.requires_grad_(False)

    def test_some_features_only(self) -> None:
        assert written(torch.tensor([9.0]), self.OLD, "replace", features=(1,)).tolist() == [[3, 9], [0, 9]]
        assert written(torch.tensor([7.0, 9.0]), self.OLD, "replace", features=(1,)).tolist() == [[3, 9], [0, 9]]

    @pytest.mark.parametrize("write", ["replace", "add", "add_matched", "replace_matched", "interpolate", "mask"])
    def test_the_number_format_is_that_of_the_site_and_nothing_is_written_in_place(self, write: str) -> None:
        old, value = self.OLD.to(torch.bfloat16), torch.tensor([0.5, 0.25], dtype=torch.float64)
        found = written(value, old, write)  # type: ignore[arg-type]
        assert found.dtype == torch.bfloat16 and found.shape == old.shape
        assert old.tolist() == self.OLD.tolist() and value.tolist() == [0.5, 0.25]
