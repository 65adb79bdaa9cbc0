"""Lenses: formulas, training and resuming it, files of ours and public ones, and refusing what belongs to another model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import WIDTH, blocks_of, loaded, tiny, tiny_tokenizer

import patchscopes as ps
from patchscopes.core.errors import InputError, LayerError, PositionError, RefusedError, VectorError
from patchscopes.lenses import Recipe, TunedLens, compute_jacobian_lens, load_jacobian_lens, load_tuned_lens, train_tuned_lens
from patchscopes.lenses.descent import CHECKPOINT
from patchscopes.lenses.report import middle
from patchscopes.lenses.training import LENS, windows_of_step
from patchscopes.lenses.windows import own_windows, read_texts, windows
from patchscopes.model import Model
from patchscopes.organisms.atlas.corpus import Corpus
from patchscopes.organisms.atlas.facts import world

TEXTS = [f"{a} the {b} of {c}" for a in "abcdefg" for b in ("hill", "sea") for c in ("x y z", "some town", "1 2 3")]
QUICK = Recipe(steps=6, tokens_per_step=120, optimizer="adam", rate=5.0)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Model:
    return loaded("llama")


@pytest.fixture(scope="module")
def atlas() -> Model:
    return ps.load("atlas")


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    documents = Corpus(world()).documents(random.Random("tests of lenses"))
    return [next(documents) for _ in range(60)]


def rough(model: Model, seed: int = 0) -> TunedLens:
    """A tuned lens of random numbers."""
    n, d = model.n_layers, model.d_model
    return TunedLens(0.05 * draws(n, d, d, seed=seed), 0.1 * draws(n, d, seed=seed + 1))


# ------------------------------------------------------------------------------------------------------------------------ tuned lens


class TestTunedLens:
    def test_untrained_it_is_the_logit_lens(self, model: Model) -> None:
        run = model.run("the hill", read="resid.*")
        lens = TunedLens.untrained(model)
        for layer in range(model.n_layers + 1):
            assert torch.equal(lens.logits(model, run[f"resid.{layer}"], layer), model.unembed(run[f"resid.{layer}"]))
        assert torch.allclose(lens.logits(model, run[f"resid.{model.n_layers}"], model.n_layers), run.logits, atol=1e-4)

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
    def test_it_is_its_formula_and_a_patchscope(self, family: str) -> None:
        model = loaded(family)
        lens = rough(model)
        source = ps.Source(model, ["the hill", "sea x"], layer="all")
        readings = lens.scope()(source, controls=False, keep_logits=True)
        assert readings.logits is not None and set(readings.table["map"]) == {"tuned-lens"}
        for row, logits in zip(readings.table.iter_rows(named=True), readings.logits, strict=True):
            layer = row["source_layer"]
            h = model.run(row["prompt_text"], read=f"resid.{layer}")[f"resid.{layer}"][0, -1]
            by_hand = h if layer == model.n_layers else h + lens.weight[layer] @ h + lens.bias[layer]
            want = model.unembed(by_hand[None])[0]
            assert float((logits - want).abs().max()) < 1e-4 * float(want.abs().max())
            assert torch.allclose(lens.logits(model, h[None], layer)[0], want, atol=1e-4 * float(want.abs().max()))

    def test_the_report_is_its_definition(self, model: Model) -> None:
        lens, texts = rough(model), ["the hill of x", "a sea", "some town y"]
        report = lens.evaluate(model, texts)
        kl, ce, top, n, n_next = torch.zeros(5), torch.zeros(5), torch.zeros(5), 0, 0
        for text in texts:
            run = model.run(text, read="resid.*")
            p, ids = run.logits[0].double().softmax(-1), torch.tensor(model.tokens(text).ids)
            n, n_next = n + len(ids), n_next + len(ids) - 1
            for layer in range(5):
                q = lens.logits(model, run[f"resid.{layer}"][0], layer).double().softmax(-1)
                kl[layer] += float((p * (p / q).log2()).sum())
                ce[layer] -= float(q[:-1].gather(1, ids[1:, None]).log2().sum())
                top[layer] += int((p.argmax(-1) == q.argmax(-1)).sum())
        assert report.n == n
        assert [one.kl for one in report.layers] == pytest.approx((kl / n).tolist(), rel=1e-4)
        assert [one.ce for one in report.layers] == pytest.approx((ce / n_next).tolist(), rel=1e-4)
        assert [one.top1 for one in report.layers] == pytest.approx((top / n).tolist())
        plain = TunedLens.untrained(model).evaluate(model, texts)
        assert [one.logit_lens_kl for one in report.layers] == pytest.approx([one.kl for one in plain.layers], rel=1e-6)
        assert plain.table.height == 5 and plain[3].layer == 3 and plain.model_ce > 0

    def test_gradients_are_those_of_the_mean_divergence(self) -> None:
        """One step of plain descent, against autograd through an unembedding written by hand."""
        hf = tiny("llama").double()
        model = ps.load((hf, tiny_tokenizer()))
        recipe = Recipe(steps=1, tokens_per_step=40, rate=0.5, momentum=0.0, weight_decay=0.0, clip=1e9)
        lens = train_tuned_lens(model, TEXTS, None, recipe)
        from patchscopes.maps.states import split

        chosen = windows_of_step(windows(model, split(TEXTS, 0.1, 0)[0]), recipe, 0)
        weight = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
        total, n = torch.zeros((), dtype=torch.float64), 0
        for ids in chosen:
            states = hf(torch.tensor([ids]), output_hidden_states=True)
            h, log_p = states.hidden_states[2][0], states.logits[0].log_softmax(-1)
            log_q = hf.lm_head(hf.model.norm(h + h @ weight.T + bias)).log_softmax(-1)
            total, n = total + (log_p.exp() * (log_p - log_q)).sum(), n + len(ids)
        (total / n).backward()
        assert weight.grad is not None and bias.grad is not None
        scale = float(weight.grad.abs().max())
        assert float((lens.weight[2] + 0.5 * weight.grad).abs().max()) < 1e-4 * scale
        assert float((lens.bias[2] + 0.5 * bias.grad).abs().max()) < 1e-4 * float(bias.grad.abs().max())

    def test_a_few_steps_beat_the_logit_lens_on_atlas(self, atlas: Model, corpus: list[str]) -> None:
        before = {name: p.requires_grad for name, p in atlas.hf.named_parameters()}
        told = []
        lens = train_tuned_lens(atlas, corpus, None, Recipe(steps=4, tokens_per_step=250, held_out=0.3), progress=told.append)
        assert {name: p.requires_grad for name, p in atlas.hf.named_parameters()} == before
        assert all(p.grad is None for p in atlas.hf.parameters())
        report = lens.provenance["report"]["layers"]
        assert all(report[layer]["kl"] < report[layer]["logit_lens_kl"] for layer in middle(8)), report
        assert [one.step for one in told] == [1, 2, 3, 4] and told[-1].kl < told[0].kl and told[-1].eta == 0
        assert lens.check(atlas).layers
        floor = ps.lenses.refit_floor(atlas, lens, corpus[:4], steps=2)
        assert all(one.floor is not None and one.floor < one.kl for one in floor.layers)

    def test_the_lens_of_atlas_beats_the_logit_lens_at_every_layer(self, atlas: Model, corpus: list[str]) -> None:
        lens = load_tuned_lens("atlas", atlas)
        assert lens.provenance["weight_hash"] == atlas.weight_hash  # train it anew when atlas is
        report = lens.evaluate(atlas, corpus[:20])
        assert all(one.top1 > one.logit_lens_top1 and one.kl < 0.6 * one.logit_lens_kl for one in report.layers)

    def test_stopped_and_resumed_equals_not_stopped(self, model: Model, tmp_path: Path) -> None:
        for optimizer in ("sgd", "adam"):
            recipe = replace(QUICK, optimizer=optimizer)
            whole = train_tuned_lens(model, TEXTS, tmp_path / optimizer / "whole", recipe)
            folder = tmp_path / optimizer / "stopped"
            for stop in (2, 3):

                def impatient(progress: ps.lenses.TrainingProgress, stop: int = stop) -> None:
                    if progress.step == stop:
                        raise KeyboardInterrupt

                with pytest.raises(KeyboardInterrupt):
                    train_tuned_lens(model, TEXTS, folder, recipe, progress=impatient)
                assert (folder / CHECKPOINT).exists() and not (folder / LENS).exists()
            steps: list[int] = []
            found = train_tuned_lens(model, TEXTS, folder, recipe, progress=lambda p, steps=steps: steps.append(p.step))
            assert steps == [4, 5, 6] and not (folder / CHECKPOINT).exists()
            assert torch.equal(found.weight, whole.weight) and torch.equal(found.bias, whole.bias)
            assert found.provenance["tokens"] == whole.provenance["tokens"]
            again = train_tuned_lens(model, TEXTS, folder, recipe, progress=lambda p: pytest.fail("it was finished"))
            assert torch.allclose(again.weight, whole.weight, atol=1e-6)
            with pytest.raises(RefusedError, match="belongs to another lens"):
                train_tuned_lens(model, TEXTS, folder, replace(recipe, seed=1))
            with pytest.raises(RefusedError, match="belongs to another lens"):
                train_tuned_lens(model, [*TEXTS, "more of it"], folder, recipe)

    def test_checkpoints_are_made_on_the_way(self, model: Model, tmp_path: Path) -> None:
        there = []
        train_tuned_lens(
            model,
            TEXTS,
            tmp_path,
            QUICK,
            checkpoint_seconds=0.0,
            progress=lambda p: there.append((tmp_path / CHECKPOINT).exists()),
        )
        assert there == [True] * 6 and sorted(p.name for p in tmp_path.iterdir()) == ["training.json", LENS]

    def test_every_epoch_sees_every_window_once(self, model: Model) -> None:
        some = windows(model, TEXTS)
        recipe = Recipe(tokens_per_step=5 * len(some[0]))
        seen = [one for step in range(40) for one in windows_of_step(some, recipe, step)]
        assert sorted(seen[: len(some)]) == sorted(some) and seen[: len(some)] != some
        assert sorted(seen[len(some) : 2 * len(some)]) == sorted(some) and seen[: len(some)] != seen[len(some) : 2 * len(some)]

    def test_saved_lenses_are_the_same(self, model: Model, tmp_path: Path) -> None:
        lens = replace(rough(model), provenance={"by": "me"})
        lens.save(tmp_path / "lens.safetensors")
        found = load_tuned_lens(tmp_path / "lens.safetensors", model, check=False)
        assert torch.allclose(found.weight, lens.weight, atol=1e-6) and torch.equal(found.bias, lens.bias)
        assert found.provenance == {"by": "me"}
        assert ps.maps.digest_of(ps.maps.load_map(tmp_path / "lens.safetensors")) == ps.maps.digest_of(lens.map)


def public_folder(lens: TunedLens, folder: Path, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    """As AlignmentResearch/tuned-lens leaves it, written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {f"{i}.weight": w.to(dtype) for i, w in enumerate(lens.weight)} | {
        f"{i}.bias": b.to(dtype) for i, b in enumerate(lens.bias)
    }
    torch.save(params, folder / "params.pt")
    about = {"base_model_name_or_path": "x/y", "d_model": lens.weight.shape[-1], "num_hidden_layers": lens.n_layers, "bias": True}
    about |= {"base_model_revision": None, "unembed_hash": "0", "lens_type": "linear_tuned_lens", **config}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


class TestPublicTunedLenses:
    def test_they_are_read(self, model: Model, tmp_path: Path) -> None:
        lens = rough(model)
        found = load_tuned_lens(public_folder(lens, tmp_path), model, check=False)
        assert torch.equal(found.weight, lens.weight) and torch.equal(found.bias, lens.bias)
        half = load_tuned_lens(public_folder(lens, tmp_path, torch.float16))
        assert half.weight.dtype == torch.float32 and torch.allclose(half.weight, lens.weight, atol=1e-3)
        assert half.provenance["config"]["base_model_name_or_path"] == "x/y"

    def test_what_is_wrong_with_them_is_told(self, model: Model, tmp_path: Path) -> None:
        lens = rough(model)
        with pytest.raises(InputError, match=r"config\.json and params\.pt"):
            load_tuned_lens(tmp_path)
        with pytest.raises(InputError, match="type 'mlp'"):
            load_tuned_lens(public_folder(lens, tmp_path / "a", lens_type="mlp"))
        with pytest.raises(InputError, match=r"no '5\.weight' \(64, 64\)"):
            load_tuned_lens(public_folder(lens, tmp_path / "b", num_hidden_layers=6))
        (tmp_path / "a" / "params.pt").write_bytes(b"torn")
        with pytest.raises(InputError, match="could not be read as a tuned lens"):
            load_tuned_lens(tmp_path / "a")
        ps.maps.save_map(tmp_path / "map.safetensors", ps.maps.Scale(2.0))
        with pytest.raises(InputError, match="no tuned lens"):
            load_tuned_lens(tmp_path / "map.safetensors")

    def test_code_in_them_does_not_run(self, tmp_path: Path) -> None:
        class Bad:
            def __reduce__(self) -> tuple:
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"0.weight": Bad()}, public_folder(rough(loaded("llama")), tmp_path) / "params.pt")
        with pytest.raises(InputError, match="could not be read"):
            load_tuned_lens(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_lenses_of_other_models_are_refused(self, atlas: Model, model: Model, tmp_path: Path) -> None:
        with pytest.raises(VectorError, match="64 wide; atlas is 192 wide"):
            load_tuned_lens(public_folder(rough(model), tmp_path / "narrow"), atlas)
        n, d = atlas.n_layers, atlas.d_model
        with pytest.raises(LayerError, match="3 layers below the last; atlas has 8"):
            load_tuned_lens(public_folder(TunedLens(torch.zeros(3, d, d), torch.zeros(3, d)), tmp_path / "flat"), atlas)
        other = public_folder(TunedLens(0.1 * draws(n, d, d), torch.zeros(n, d)), tmp_path / "other")
        with pytest.raises(RefusedError, match=r"does not fit atlas.*layer 2: .* against .*check=False"):
            load_tuned_lens(other, atlas)
        assert load_tuned_lens(other, atlas, check=False).n_layers == n
        load_tuned_lens(public_folder(TunedLens.untrained(atlas), tmp_path / "plain"), atlas)  # the logit lens itself is none's


# ----------------------------------------------------------------------------------------------------------------------- Jacobian lens


class TestJacobianLens:
    def test_it_is_the_mean_of_sums_of_derivatives(self) -> None:
        """By finite differences: move one position of the state along each direction, and see how the sum of later last states moves."""
        hf = tiny("llama").double()
        model = ps.load((hf, tiny_tokenizer()))
        texts, skip, layer, step = ["the hill of x", "abc def"], 2, 3, 1e-2  # norms are taken in float32
        lens = compute_jacobian_lens(model, texts, [layer], skip=skip, dims_at_once=24)
        want = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for text in texts:
            n = len(model.tokens(text))
            valid = range(skip, n - 1)
            base = model.run(text, read=f"resid.{layer}")[f"resid.{layer}"][0]
            for t in valid:
                edits = [
                    ps.Edit(
                        f"resid.{layer}", t, base[t] + sign * step * torch.eye(WIDTH, dtype=torch.float64)[k], prompt=2 * k + i
                    )
                    for k in range(WIDTH)
                    for i, sign in enumerate((1, -1))
                ]
                out = model.run([text] * (2 * WIDTH), read=f"resid.{model.n_layers}", edits=edits)[f"resid.{model.n_layers}"]
                sums = out[:, skip : n - 1].sum(1)
                want += ((sums[::2] - sums[1::2]) / (2 * step)).T / len(valid) / len(texts)
        assert float((lens.jacobian[layer] - want).abs().max()) < 1e-3 * float(want.abs().max())
        assert set(lens.provenance["agreement"]) == {"3"}

    def test_it_is_a_patchscope_and_the_identity_is_the_logit_lens(self, model: Model) -> None:
        j = {layer: torch.eye(WIDTH) + 0.1 * draws(WIDTH, WIDTH, seed=layer) for layer in (1, 3)}
        lens = ps.lenses.JacobianLens(j, model.n_layers)
        readings = lens.scope()(ps.Source(model, "the hill", layer=[1, 3, 5]), controls=False, keep_logits=True)
        run = model.run("the hill", read="resid.*")
        assert readings.logits is not None
        for row, layer in enumerate((1, 3, 5)):
            h = run[f"resid.{layer}"][0, -1]
            want = model.unembed((j[layer] @ h if layer < 5 else h)[None])[0]
            assert torch.allclose(readings.logits[row], want, atol=1e-4 * float(want.abs().max()))
        plain = ps.lenses.JacobianLens({2: torch.eye(WIDTH)}, model.n_layers).evaluate(model, TEXTS[:3])
        assert plain.layers[0].kl == plain.layers[0].logit_lens_kl

    def test_public_files_are_read(self, model: Model, tmp_path: Path) -> None:
        """Blocks of the file are our layers less one."""
        j = {block: draws(WIDTH, WIDTH, seed=block).half() for block in range(4)}
        path = tmp_path / "x_jacobian_lens.pt"
        torch.save({"J": j, "n_prompts": 10, "source_layers": list(range(4)), "d_model": WIDTH}, path)
        lens = load_jacobian_lens(path, model, check=False)
        assert sorted(lens.jacobian) == [1, 2, 3, 4] and torch.equal(lens.jacobian[3], j[2].float()) and lens.n_layers == 5
        lens.save(tmp_path / "ours.safetensors")
        again = load_jacobian_lens(tmp_path / "ours.safetensors", model, check=False)
        assert torch.equal(again.jacobian[3], lens.jacobian[3]) and again.provenance["n_prompts"] == 10
        with pytest.raises(RefusedError, match="does not fit"):
            load_jacobian_lens(path, model)
        for found, words in (
            ({"J": {0: draws(3, 3)}, "n_prompts": 1, "source_layers": [0], "d_model": 4}, r"expected one \(4, 4\)"),
            ({"K": 1}, "could not be read"),
            ([1], "could not be read"),
        ):
            torch.save(found, path)
            with pytest.raises(InputError, match=words):
                load_jacobian_lens(path)
        with pytest.raises(InputError, match="there is no file"):
            load_jacobian_lens(tmp_path / "none.pt")

    def test_those_of_other_models_are_told_apart(self, atlas: Model, model: Model, corpus: list[str]) -> None:
        long = [text for text in corpus if len(atlas.tokens(text)) > 30][:2]
        lens = compute_jacobian_lens(atlas, long, [2, 4, 6], dims_at_once=96)
        assert all(value > 0.4 for value in lens.check(atlas).values())
        other = replace(lens, jacobian={layer: j.roll(1, 0).roll(1, 1) for layer, j in lens.jacobian.items()})
        with pytest.raises(RefusedError, match="cosine with the model's own derivatives"):
            other.check(atlas)
        with pytest.raises(VectorError, match=r"192 wide; .* 64 wide"):
            lens.require(model)
        with pytest.raises(LayerError, match="has 8"):
            replace(lens, n_layers=12).require(atlas)

    def test_what_cannot_be_computed_is_told(self, model: Model) -> None:
        with pytest.raises(InputError, match="more than 17 tokens"):
            compute_jacobian_lens(model, ["short"])
        with pytest.raises(LayerError, match="some of 0 to 4"):
            compute_jacobian_lens(model, TEXTS, [5])


# ----------------------------------------------------------------------------------------------------------------------------- others


def test_the_linear_shortcut_is_the_fitted_map_behind_the_head(model: Model) -> None:
    fitted = ps.maps.fit(model, TEXTS, "last")
    readings = ps.scopes.linear_shortcut(fitted)(ps.Source(model, "the hill", layer=[0, 3]), controls=False, keep_logits=True)
    h = model.run("the hill", read="resid.3")["resid.3"][0, -1]
    want = model.unembed(fitted[3, 5](h)[None])[0]
    assert readings.logits is not None and torch.allclose(readings.logits[1], want, atol=1e-4 * float(want.abs().max()))
    with pytest.raises(InputError, match="several layers"):
        ps.scopes.linear_shortcut(ps.maps.fit(model, TEXTS, [(0, 2), (0, 3)]))
    with pytest.raises(InputError, match="several layers, 2, 3"):
        ps.scopes.linear_shortcut([fitted.map, ps.maps.fit(model, TEXTS, [(0, 2), (0, 3)]).map])


def test_windows_keep_what_the_tokenizer_puts_in_front(model: Model) -> None:
    some = windows(model, ["abcdefgh", "x", " "], 4)
    ids = model.tokens("abcdefgh").ids
    assert some == [(1, *ids[1:4]), (1, *ids[4:7]), (1, *ids[7:]), (1, model.tokens("x").ids[1])]
    with pytest.raises(InputError, match="none of at least two"):
        windows(model, ["", "\n"])
    own = own_windows(model)
    assert own == own_windows(model) and all(len(one) > 10 for one in own)
    assert math.isfinite(TunedLens.untrained(model).check(model).layers[0].kl)


def test_texts_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2,two\n")
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert read_texts(tmp_path / name) == ["one", "two"]
    with pytest.raises(InputError, match="no column 'words'; it has n, text"):
        read_texts(tmp_path / "a.csv", "words")
    with pytest.raises(InputError, match="there is no file"):
        read_texts(tmp_path / "b.txt")
    with pytest.raises(InputError, match="at least 1"):
        Recipe(steps=0)


def test_the_commands_train_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus: list[str]) -> None:
    from patchscopes.cli.app import run

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus[:20]))
    options = [
        "--texts",
        str(tmp_path / "texts.jsonl"),
        "--out",
        str(tmp_path / "lens"),
        "--steps",
        "2",
        "--tokens-per-step",
        "120",
    ]
    assert run(["lens", "train", *options, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 8
    assert run(["lens", "check", str(tmp_path / "lens"), "--texts", str(tmp_path / "texts.jsonl")]) == 0
    assert "logit lens" in capsys.readouterr().out
    public_folder(TunedLens(0.1 * draws(8, 192, 192), torch.zeros(8, 192)), tmp_path / "other")
    assert run(["lens", "check", str(tmp_path / "other")]) == 6
    assert "does not fit atlas" in capsys.readouterr().err
    assert run(["lens", "train", *options[:4], "--optimizer", "muon"]) == 2


def test_a_relation_map_is_the_mean_first_order_expansion() -> None:
    """Against autograd through a plain forward pass of a float64 model."""
    hf = tiny("llama", dtype=torch.float64)
    model = ps.load((hf, tiny_tokenizer()))
    prompts, subjects, layer = ["a cat is", "the dog is", "oh my"], ["cat", "dog", 1], 2
    blocks = blocks_of(hf, "llama")

    def o_of(ids: list[int], place: int, s: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, s) of a run with s written, or with its own."""
        seen: dict[str, torch.Tensor] = {}

        def write(_m: object, _a: object, out: object) -> object:
            h = out[0] if isinstance(out, tuple) else out
            assert isinstance(h, torch.Tensor)
            seen["s"] = h[0, place]
            if s is None:
                return None
            h = h.clone()
            h[0, place] = s
            return (h, *out[1:]) if isinstance(out, tuple) else h

        def keep(_m: object, _a: object, out: object) -> None:
            h = out[0] if isinstance(out, tuple) else out
            assert isinstance(h, torch.Tensor)
            seen["o"] = h[0, -1]

        handles = [blocks[layer - 1].register_forward_hook(write), blocks[-1].register_forward_hook(keep)]
        try:
            hf(torch.tensor([ids]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen["o"], seen["s"]

    weights, biases = [], []
    for text, subject in zip(prompts, subjects, strict=True):
        tokens = model.tokens(text)
        ids, place = list(tokens.ids), tokens.position(subject)
        with torch.no_grad():
            o, s = o_of(ids, place, None)
        j = torch.autograd.functional.jacobian(lambda s, ids=ids, place=place: o_of(ids, place, s)[0], s)
        assert isinstance(j, torch.Tensor)
        weights.append(j)
        biases.append(o - j @ s)
    found = ps.lenses.relation_map(model, prompts, subjects, layer, beta=2.5, name="is", dims_at_once=24)
    f = found.for_layers(layer, model.n_layers)
    assert isinstance(f, ps.maps.Affine) and f.bias is not None and found.name == "is"
    want, shift = torch.stack(weights).mean(0), torch.stack(biases).mean(0)
    assert float(want.abs().max()) > 0.1
    assert torch.allclose(f.weight.double(), 2.5 * want, atol=1e-5) and torch.allclose(f.bias.double(), shift, atol=1e-5)

    one = ps.lenses.relation_map(model, prompts[:1], subjects[:1], layer)  # one example, β = 1: its own object state
    source = ps.Source(model, prompts[0], position="cat", layer=layer)
    readings = ps.scopes.attribute_lens(one)(source, controls=False, keep_logits=True)
    assert readings.logits is not None
    assert torch.allclose(readings.logits[0], model.run(prompts[0]).logits[0, -1].to(readings.logits), atol=1e-4)
    with pytest.raises(InputError, match="one for each other"):
        ps.lenses.relation_map(model, prompts, subjects[:2], layer)
    with pytest.raises(LayerError, match="where the object is read"):
        ps.lenses.relation_map(model, prompts, subjects, -1)
    with pytest.raises(PositionError, match="does not occur"):
        ps.lenses.relation_map(model, prompts, ["cow", "dog", 1], layer)
