"""Edits as data, and coordinate systems. What they do inside models: test_sites.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIDTH, loaded
from oracle import CLOSE, error

import patchscopes as ps
from patchscopes.core.coordinates import Dictionary, Subspace, Whole
from patchscopes.core.edits import Edit, freeze, knock_out, load_edits, project_out, save_edits, stop_gradient, swap, written
from patchscopes.core.errors import InputError, PatchscopesError, RefusedError, SiteError, UnknownName, VectorError
from patchscopes.core.positions import Span


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_dictionary() -> Dictionary:
    return Dictionary(numbers(7, 5), numbers(7, seed=1), numbers(7, 5, seed=2), numbers(5, seed=3))


SOME = [
    Edit("resid.2", -1, numbers(5)),
    Edit("z.3.1", "Wales", numbers(5), "add", prompt=1, amount=0.5),
    Edit("resid.0", [0, "x", Span(2, 4)], numbers(5).to(torch.bfloat16), "interpolate", steps="always"),
    Edit("resid.1", None, numbers(3), coordinates=Subspace.spanned_by(numbers(3, 5)), steps=(0, 2)),
    Edit("mlp_out.1", 0, numbers(7), "add", coordinates=a_dictionary(), features=(2, 5)),
    project_out("resid.*", numbers(2, 5), [1, 2]),
    swap("resid.4", numbers(2, 5), numbers(5), -1),
    *knock_out("1:3", "x", [0, 1], heads=(0, 2)),
    *knock_out(2, None, 0, after=True, steps="always"),
    stop_gradient("attn_out.1"),
]


# ------------------------------------------------------------------------------------------------------------------------- as data


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    path = str(tmp_path / "edits.safetensors")
    save_edits(path, SOME)
    back = load_edits(path)
    assert back == SOME
    assert [repr(e) for e in back] == [repr(e) for e in SOME]
    save_edits(path, [])
    assert load_edits(path) == []


def test_equal_edits_are_equal_and_any_difference_shows() -> None:
    assert len({e.digest for e in SOME}) == len(set(SOME)) == len(SOME)
    assert Edit("resid.2", -1, numbers(5)) == SOME[0] and hash(Edit("resid.2", -1, numbers(5))) == hash(SOME[0])
    assert Edit("resid.2", -1, numbers(5) + 1e-6) != SOME[0]
    assert Edit("resid.2", -1, numbers(5).double()) != SOME[0]
    assert Edit("resid.2", -1, numbers(5), coordinates=Whole()) != SOME[0]
    assert SOME[0] != "resid.2"


def test_they_print() -> None:
    assert repr(SOME[1]) == "Edit('z.3.1', position='Wales', value=float32[5], write='add', prompt=1, amount=0.5)"
    assert "coordinates=subspace" in repr(SOME[3]) and "steps=(0, 2)" in repr(SOME[3])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no edits"):
        load_edits(str(tmp_path / "x.safetensors"))


def test_coordinates_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    class Mine(Whole):
        pass

    with pytest.raises(RefusedError, match="class Mine cannot be saved"):
        save_edits(str(tmp_path / "x"), [Edit("resid.1", 0, numbers(5), coordinates=Mine())])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Edit("resid.1", 0), VectorError, "needs a value"),
        (lambda: Edit("resid.1", 0, numbers(5), "scale"), VectorError, "takes no value"),
        (lambda: Edit("resid.1", 0, write="knock_out"), SiteError, "at scores or pattern"),
        (lambda: Edit("z.1", 0, numbers(5), keys=[1]), SiteError, "only scores and pattern have keys"),
        (lambda: Edit("resid.1", 0, numbers(5), steps=(-1,)), InputError, "steps is"),
        (lambda: Subspace(numbers(2, 5)), VectorError, "not orthonormal"),
        (lambda: Subspace.spanned_by(torch.stack([numbers(5), 2 * numbers(5)])), VectorError, "not independent"),
        (lambda: Subspace.spanned_by(torch.zeros(5)), VectorError, "not independent"),
        (lambda: Subspace.spanned_by(numbers(6, 5)), VectorError, "not independent"),
    ],
)
def test_what_cannot_be_is_said_at_once(make, kind: type[PatchscopesError], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("resid.2", 1, numbers(3), features=(0, 1)), f"for 3 features; expected 2 or {WIDTH}"),
        (Edit("resid.2", 1, numbers(2), features=(0, WIDTH)), f"names feature {WIDTH}"),
        (Edit("resid.2", 1, write="scale", features=(-1,)), "names feature -1"),
        (Edit("resid.2", 1, numbers(3), coordinates=Subspace.spanned_by(numbers(2, WIDTH))), "for 3 features; expected 2"),
        (Edit("resid.2", 1, numbers(2), coordinates=Subspace.spanned_by(numbers(2, WIDTH + 1))), f"values {WIDTH + 1} wide"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_anything_runs(edit: Edit, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        loaded("gpt2").run("abcd", edits=[edit])


@pytest.mark.parametrize(("name", "value", "kind"), [("write", "replce", UnknownName), ("steps", "sometimes", InputError)])
def test_words_that_are_not_known(name: str, value: str, kind: type[PatchscopesError]) -> None:
    edit = Edit("resid.1", 0, numbers(5))
    object.__setattr__(edit, name, value)  # past the annotations, which tests execute and users do not
    with pytest.raises(kind, match=r"Did you mean 'replace'|steps is 'sometimes'; expected 'prompt'"):
        edit.__post_init__()


# --------------------------------------------------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("system", [Whole(), Subspace.spanned_by(numbers(2, 5)), a_dictionary()])
def test_what_an_edit_leaves_alone_changes_nothing_bit_for_bit(system) -> None:
    x = numbers(3, 5)
    same = written(system.encode(x), x, "replace", coordinates=system)
    assert torch.equal(same, x)
    assert torch.equal(written(None, x, "scale", 1.0, system), x)


def test_a_subspace_holds_what_its_directions_span() -> None:
    directions, x = numbers(2, 5), numbers(4, 5, seed=5)
    space = Subspace.spanned_by(directions)
    projector = directions.T @ torch.linalg.inv(directions @ directions.T) @ directions
    assert error(space.decode(space.encode(x)), x @ projector) < 1e-5
    assert float((directions @ space.basis.T)[0, 0]) > 0  # the first direction keeps its sign
    gone = written(None, x, "scale", 0.0, space)
    assert error(gone, x - x @ projector) < 1e-5
    other = numbers(5, seed=6)
    assert error(written(space.encode(other), x, "replace", coordinates=space), x - x @ projector + other @ projector) < 1e-5


def test_a_rotation_changes_nothing_but_the_axes() -> None:
    rotation, x, v = Subspace.spanned_by(numbers(5, 5)), numbers(4, 5, seed=5), numbers(5, seed=6)
    assert error(written(rotation.encode(v), x, "replace", coordinates=rotation), v.expand_as(x)) < 1e-5
    assert error(written(rotation.encode(v), x, "add", 0.3, rotation), x + 0.3 * v) < 1e-5


def test_one_feature_of_a_dictionary_moves_by_its_own_direction() -> None:
    dictionary, x = a_dictionary(), numbers(4, 5, seed=5)
    new = written(torch.tensor([2.5]), x, "replace", coordinates=dictionary, features=(3,))
    f = torch.relu(x @ dictionary.encoder.T + dictionary.encoder_bias)
    assert error(new, x + (2.5 - f[:, 3:4]) * dictionary.decoder[3]) < 1e-5


# ------------------------------------------------------------------------------------------------------------------- before a run


BAD = [
    (Edit("resid.2", -1, torch.full((WIDTH,), float("nan"))), VectorError, "not finite"),
    (Edit("resid.2", -1, numbers(WIDTH).double()), VectorError, r"float64 on cpu, but .* computes in float32"),
    (Edit("resid.2", -1, numbers(WIDTH).to("meta")), VectorError, "float32 on meta"),
    (Edit("resid.2", -1, numbers(WIDTH - 1)), VectorError, r"shape \(63,\); expected \(64,\)"),
    (Edit("resid.2", [0, 1], numbers(3, WIDTH)), VectorError, r"shape \(3, 64\)"),
    (Edit("z.2.9", -1, numbers(16)), SiteError, r"z\.2 has 4 heads"),
    (Edit("router.2", -1, numbers(4)), SiteError, "no mixture of experts"),
    (Edit("delta.2", -1, numbers(4)), SiteError, "no state-space mixer"),
    (Edit("resid.9", -1, numbers(WIDTH)), SiteError, "out of range"),
    (Edit("resid.2", 99, numbers(WIDTH)), PatchscopesError, "position 99 is out of range"),
    (Edit("resid.2", 0, numbers(WIDTH), prompt=3), PatchscopesError, "names prompt 3"),
    (Edit("pattern.2", 0, numbers(3, 3)), VectorError, r"expected \(4, 1, 4\)"),
]


@pytest.mark.parametrize(("edit", "kind", "message"), BAD, ids=lambda x: x.site if isinstance(x, Edit) else "")
def test_edits_that_cannot_be_are_refused_before_anything_runs(edit: Edit, kind: type[PatchscopesError], message: str) -> None:
    model = loaded("llama")
    model.run("abc", read=["z.2", "pattern.2"])  # what is measured once is measured
    passes: list[int] = []
    handle = model.hf.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(kind, match=message):
            model.run("abc", edits=[edit])
    finally:
        handle.remove()
    assert not passes


def test_edits_that_contradict_one_another_are_refused() -> None:
    model, v = loaded("llama"), numbers(WIDTH)
    clash = [
        [Edit("resid.2", -1, v), Edit("resid.2", 3, v)],
        [Edit("resid.2", None, v, "add"), Edit("resid.2", 1, v)],
        [Edit("z.2.1", 0, numbers(16), "add"), Edit("z.2", 0, numbers(16))],
    ]
    for edits in clash:
        with pytest.raises(InputError, match="contradict one another"):
            model.run("abc", edits=edits)
    fine = [
        [Edit("resid.2", -1, v), Edit("resid.2", -1, v, "add")],
        [Edit("z.2.1", 0, numbers(16)), Edit("z.2.0", 0, numbers(16))],
        [Edit("resid.2", 0, v, prompt=0), Edit("resid.2", 0, v, prompt=1)],
    ]
    for edits in fine:
        model.run(["abc", "bcd"], edits=edits)


def test_a_query_must_keep_a_key() -> None:
    with pytest.raises(InputError, match="without any key"):
        loaded("llama").run("abc", edits=knock_out("*", 0, 0))


def test_freezing_repeats_a_run() -> None:
    """Everything that attention and norms do is set to what it was; then the rest is linear but for the MLPs' activations."""
    model = loaded("llama")
    first = model.run(["abcd", "xy"], read=["pattern.*", "attn_scale.*", "attn_out.*", "mlp_out.*", "resid.0"])
    edits = freeze(first, ["resid.0", *(f"{site}.{b}" for site in ("attn_out", "mlp_out") for b in range(model.n_layers))])
    again = model.run(["efgh", "zw"], edits=edits)
    assert error(again.logits[first.mask], first.logits[first.mask]) <= CLOSE
    frozen = freeze(first, [f"{site}.{b}" for site in ("pattern", "attn_scale") for b in range(model.n_layers)])
    same = model.run(["abcd", "xy"], edits=frozen)
    assert error(same.logits[first.mask], first.logits[first.mask]) <= CLOSE
    other = model.run(["efgh", "zw"], edits=frozen, read=["pattern.2", "attn_scale.3"])
    for row in range(2):
        real = first.mask[row].nonzero()[:, 0]
        assert torch.equal(other["pattern.2"][row][:, real][..., real], first["pattern.2"][row][:, real][..., real])
        assert torch.equal(other["attn_scale.3"][row, real], first["attn_scale.3"][row, real])


def test_names_are_public() -> None:
    assert ps.edits.knock_out is knock_out and ps.coordinates.Subspace is Subspace


def test_values_of_every_shape_mean_what_they_say() -> None:
    """Broadcast as in torch, alone and beside other edits."""
    model, v = loaded("llama"), numbers(WIDTH)
    other = Edit("resid.2", 3, v)

    def logits(value: torch.Tensor, position: object = None, site: str = "resid.2", **rest: Any) -> torch.Tensor:
        return model.run("abcd", edits=[Edit(site, position, value, **rest), *([other] if position is not None else [])]).logits  # type: ignore[arg-type]

    assert torch.equal(logits(v[None]), logits(v))
    assert torch.equal(logits(v[None], [0, 1]), logits(v, [0, 1]))
    assert torch.equal(logits(torch.tensor(0.5), 1), logits(torch.full((WIDTH,), 0.5), 1))
    assert torch.equal(logits(torch.ones(1), 1), logits(torch.ones(WIDTH), 1))
    assert torch.equal(logits(v[None], range(2)), logits(v, [0, 1]))
    z = numbers(16)
    assert torch.equal(logits(z[None], 1, "z.2"), logits(z, 1, "z.2"))
    assert torch.equal(logits(z.expand(2, 1, 16), [0, 1], "z.2"), logits(z, [0, 1], "z.2"))
    row = torch.tensor([0.25, 0.75])
    for value in (row[None], row.expand(4, 1, 2)):
        assert torch.equal(logits(value, [1, 2], "pattern.2", keys=[0, 1]), logits(row, [1, 2], "pattern.2", keys=[0, 1]))
    picked = logits(torch.tensor([v[0], v[5]]), 1, features=(0, 5))
    assert torch.equal(picked, logits(v, 1, features=(0, 5)))


def test_edits_that_would_do_nothing_or_something_else_are_refused() -> None:
    model, v = loaded("llama"), numbers(WIDTH)
    with pytest.raises(InputError, match="generated tokens only"):
        model.run("abc", edits=[Edit("resid.2", None, v, steps=(0,))])
    with pytest.raises(InputError, match="expected 'prompt'"):
        Edit("resid.2", None, v, steps=())
    with pytest.raises(InputError, match="names no features"):
        Edit("resid.2", None, v, features=())
    with pytest.raises(VectorError, match="64, counted from 0"):
        model.run("abc", edits=[Edit("resid.2", 0, v[:2], features=(0, 64))])
    with pytest.raises(VectorError, match="3 features; expected 2"):
        model.run("abc", edits=[Edit("resid.2", 0, v[:3], features=(0, 1))])
    with pytest.raises(VectorError, match="3 features; expected 2"):
        space = ps.coordinates.Subspace.spanned_by(numbers(2, WIDTH))
        model.run("abc", edits=[Edit("resid.2", 0, v[:3], coordinates=space)])
    with pytest.raises(VectorError, match="for each stream or one for each position"):
        loaded("gemma3n").run("abcdef", edits=[Edit("resid.2", [0, 1, 2, 3], numbers(4, WIDTH))])


def test_streams_in_front_of_the_batch_can_be_frozen_and_written_by_position() -> None:
    model, texts = loaded("gemma3n"), ["abcdef", "xyz"]
    run = model.run(texts, read=["resid.2"], edits=[Edit("resid.2", 1, numbers(WIDTH))])
    again = model.run(texts, edits=ps.edits.freeze(run, ["resid.2"]))
    assert error(again.logits[run.mask], run.logits[run.mask]) <= CLOSE
    three = numbers(3, WIDTH)
    one_by_one = [Edit("resid.2", p, three[p]) for p in range(3)]
    together = model.run("xyz", edits=[Edit("resid.2", [0, 1, 2], three)])
    assert error(together.logits, model.run("xyz", edits=one_by_one).logits) <= CLOSE


def test_edits_may_share_a_value_and_have_ranges(tmp_path: Any) -> None:
    v = numbers(WIDTH)
    edits = [Edit("resid.1", range(3), v, "add", amount=2.0), Edit("resid.2", 0, v)]
    ps.edits.save_edits(str(tmp_path / "edits.safetensors"), edits)
    back = ps.edits.load_edits(str(tmp_path / "edits.safetensors"))
    assert back == edits and back[0] == Edit("resid.1", [0, 1, 2], v, "add", amount=2.0)
    assert len({*back, *edits}) == 2


def test_all_layers_and_their_names_elsewhere_can_be_frozen() -> None:
    model = loaded("llama")
    run = model.run(["abcd", "xy"], read=["pattern.*", "z.1"])
    names = ["pattern.*", "blocks.1.attn.hook_pattern", "z.1.2"]
    assert len(ps.edits.freeze(run, names)) == 2 * (model.n_layers + 2)
    assert torch.allclose(model.run(["abcd", "xy"], edits=ps.edits.freeze(run, names[::2])).logits, run.logits, atol=1e-5)
