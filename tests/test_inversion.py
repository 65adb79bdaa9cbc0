"""Input inversion: nearest token vectors, the trained inverter, the repeat scope, and answers from what they give back."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import VOCAB, WIDTH, loaded
from safetensors.torch import save_file

import patchscopes as ps
from patchscopes.core.errors import InputError, LayerError, PositionError, RefusedError, VectorError
from patchscopes.evaluate.inversion import Reconstruction, answers, invert, scores
from patchscopes.lenses import Inverter, InverterRecipe, TokenVectors, load_inverter, token_vectors, train_inverter
from patchscopes.lenses.descent import CHECKPOINT
from patchscopes.lenses.inverter import INVERTER
from patchscopes.model import Model
from patchscopes.model.tokens import as_tokens

LETTERS = "abcdefgh"
QUICK = InverterRecipe(offsets=2, steps=6, tokens_per_step=60, negatives=10)
NAMES = ("Japan", "Roger Federer", "Siemens", "Liechtenstein", "Eiffel Tower")


@pytest.fixture(scope="module")
def model() -> Model:
    return loaded("llama")


@pytest.fixture(scope="module")
def atlas() -> Model:
    return ps.load("atlas")


def noise(n: int, length: int, seed: int = 0) -> list[str]:
    """Texts of letters that have nothing to do with one another."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=length)) for _ in range(n)]


def rounds(n: int, length: int, seed: int = 0) -> list[str]:
    """Texts in which each letter tells those before it: abcdefghabc…"""
    rng = random.Random(seed)
    return [(LETTERS * 20)[(k := rng.randrange(8)) : k + rng.randint(length // 2, length)] for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------- nearest neighbour


class TestNearest:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt_neox"])
    @pytest.mark.parametrize("of", ["states", "embeddings"])
    def test_at_layer_0_every_token_is_itself(self, family: str, of: str) -> None:
        model = loaded(family)
        vectors = token_vectors(model, [0], of, contexts=("the hill", "x"))  # type: ignore[arg-type]
        text = "some tall hill by the sea: 1, 2!"
        tokens = model.tokens(text)
        run = model.run(text, read="resid.0")
        told = vectors.nearest(run["resid.0"][0], 0)
        plain = [k for k, added in enumerate(tokens.special) if not added]
        assert [told.ids[k] for k in plain] == [tokens.ids[k] for k in plain]
        assert all(told.similarity[k] > 0.999 and told.margin[k] > 0.01 for k in plain)
        assert [told.strings[k] for k in plain] == [tokens.strings[k] for k in plain]

    def test_learned_positions_ask_for_texts_of_one_length(self) -> None:
        model = loaded("gpt2")
        text = "a hill"
        at = len(model.tokens(text)) - 1
        vectors = token_vectors(model, [0], contexts=("z" * at,))
        assert vectors.nearest(model.run(text, read="resid.0")["resid.0"][0, -1:], 0).ids == model.tokens(text).ids[-1:]

    @pytest.mark.parametrize("lens", [False, True])
    @pytest.mark.parametrize("of", ["states", "embeddings"])
    def test_it_is_its_formula(self, model: Model, of: str, lens: bool) -> None:
        g = torch.Generator().manual_seed(0)
        shape = (model.n_layers, WIDTH, WIDTH)
        tuned = ps.lenses.TunedLens(0.2 * torch.randn(shape, generator=g), torch.randn(shape[:2], generator=g))
        f = tuned.map if lens else ps.maps.Identity()
        contexts, ids, layer = ("the hill", "sea"), list(range(10, 40)), 3
        vectors = token_vectors(model, [layer], of, lens=f, contexts=contexts, ids=ids)  # type: ignore[arg-type]
        h = model.run("a text that is long", read=f"resid.{layer}")[f"resid.{layer}"][0]

        def image(x: torch.Tensor, at: int) -> torch.Tensor:
            return x.double() + tuned.weight[at].double() @ x.double() + tuned.bias[at].double() if lens else x.double()

        def state(i: int, at: int) -> torch.Tensor:  # one prompt at a time
            each = [model.run(as_tokens((*model.tokens(c).ids, i)), read=f"resid.{at}")[f"resid.{at}"][0, -1] for c in contexts]
            return image(torch.stack(each).mean(0), at)

        own = layer if of == "states" else 0
        table = torch.stack([state(i, own) for i in ids])
        there = torch.stack([state(i, layer) for i in ids])
        m, m_own = there.mean(0), table.mean(0)
        found = vectors.nearest(h, layer)
        for k, x in enumerate(h):
            cosine = [float(torch.cosine_similarity(image(x, layer) - m, r - m_own, dim=0)) for r in table]
            best = sorted(range(len(ids)), key=lambda c: -cosine[c])
            assert found.ids[k] == ids[best[0]]
            assert found.similarity[k] == pytest.approx(cosine[best[0]], abs=1e-4)
            assert found.margin[k] == pytest.approx(cosine[best[0]] - cosine[best[1]], abs=1e-4)

    def test_a_batch_is_its_rows(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = token_vectors(model, [2], contexts=("a",))
        h = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
        whole = vectors.nearest(h, 2)
        monkeypatch.setattr("patchscopes.lenses.nearest.SCORES_AT_ONCE", 2 * VOCAB)
        assert vectors.nearest(h, 2).ids == whole.ids
        assert tuple(vectors.nearest(row[None], 2).ids[0] for row in h) == whole.ids
        assert vectors.nearest(h[:0], 2).ids == ()

    def test_what_is_wrong_is_told(self, model: Model) -> None:
        with pytest.raises(InputError, match="1 candidate tokens"):
            token_vectors(model, [0], ids=[5, 5])
        with pytest.raises(LayerError, match=r"no token vectors for layer 1; there are for 0, 2"):
            token_vectors(model, [0, 2], ids=[5, 6]).nearest(torch.zeros(1, WIDTH), 1)


# ---------------------------------------------------------------------------------------------------------------------- the inverter


class TestInverter:
    def test_it_is_its_formula(self, model: Model) -> None:
        inverter = train_inverter(model, noise(20, 12), [1, 3], recipe=QUICK)
        h = model.run("some text", read="resid.3")["resid.3"][0]
        table = model.hf.get_input_embeddings().weight.detach().double()  # type: ignore[operator]
        table = table - table.mean(0)
        table = table / table.norm(dim=1, keepdim=True)
        for row, told in zip(h, inverter.ids(h, 3).tolist(), strict=True):
            x = (row.double() - inverter.mean[1].double()) / inverter.scale[1].double()
            for k in range(2):
                logits = table @ (inverter.weight[1, k].double() @ x + inverter.bias[1, k].double())
                assert told[k] == int(logits.argmax())
        with pytest.raises(LayerError, match="not trained at layer 2; it has 1, 3"):
            inverter.ids(h, 2)
        with pytest.raises(VectorError, match="65 wide"):
            inverter.ids(torch.zeros(1, WIDTH + 1), 1)

    def test_it_tells_what_was_planted_and_nothing_of_noise(self, model: Model) -> None:
        """At layer 0 a state is its token alone: it tells the token before where the text makes it follow, and cannot in noise."""
        recipe = InverterRecipe(offsets=2, steps=80, tokens_per_step=200, negatives=20, rate=0.01, held_out=0.3)
        for texts, tells in ((rounds(60, 24), True), (noise(60, 24), False)):
            inverter = train_inverter(model, texts, [0], recipe=recipe)
            own, before = inverter.table.iter_rows(named=True)
            assert (own["offset"], before["offset"]) == (0, 1) and own["n"] > before["n"] > 150
            assert own["accuracy"] > 0.99 and own["shuffled"] < 0.25 and own["unigram"] < 0.25
            if tells:
                assert before["accuracy"] > 0.99
            else:
                assert before["accuracy"] < 0.25  # eight letters: .125 by chance

    def test_gradients_are_those_of_the_sampled_cross_entropy(self, model: Model) -> None:
        """The first step of Adam moves each number by the rate against the sign of its gradient, which is worked out here by hand."""
        texts = noise(8, 10)
        once = 7 * len(model.tokens(texts[0]))  # the seven that are not held out
        recipe = InverterRecipe(offsets=2, steps=1, tokens_per_step=once, negatives=5, rate=1e-3)
        inverter = train_inverter(model, texts, [2], recipe=recipe)
        from patchscopes.maps.states import split

        prompts = [model.tokens(text) for text in split(texts, 0.1, 0)[0]]
        candidates = sorted({i for t in prompts for i, added in zip(t.ids, t.special, strict=True) if not added})
        table = inverter.tokens[candidates]
        weight = torch.zeros(WIDTH, WIDTH, requires_grad=True)
        losses = []
        for tokens in prompts:
            h = model.run(tokens, read="resid.2")["resid.2"][0]
            for t in range(1, len(tokens)):
                if not tokens.special[t - 1]:
                    x = (h[t] - inverter.mean[0]) / inverter.scale[0]
                    losses.append(-(table @ (weight @ x)).log_softmax(-1)[candidates.index(tokens.ids[t - 1])])
        torch.stack(losses).mean().backward()
        assert weight.grad is not None
        clear = weight.grad.abs() > 1e-4 * weight.grad.abs().max()
        assert torch.equal(inverter.weight[0, 1].sign()[clear], -weight.grad.sign()[clear])

    def test_stopped_and_resumed_equals_not_stopped(self, model: Model, tmp_path: Path) -> None:
        texts = noise(20, 12)
        whole = train_inverter(model, texts, [1, 2], tmp_path / "whole", QUICK)
        folder = tmp_path / "stopped"

        def impatient(progress: ps.lenses.TrainingProgress) -> None:
            if progress.step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_inverter(model, texts, [1, 2], folder, QUICK, progress=impatient)
        assert (folder / CHECKPOINT).exists() and not (folder / INVERTER).exists()
        steps: list[int] = []
        found = train_inverter(model, texts, [1, 2], folder, QUICK, progress=lambda p: steps.append(p.step))
        assert steps == [4, 5, 6] and not (folder / CHECKPOINT).exists()
        assert torch.equal(found.weight, whole.weight) and torch.equal(found.bias, whole.bias)
        assert found.provenance["report"] == whole.provenance["report"]
        assert torch.equal(
            train_inverter(model, texts, [1, 2], recipe=QUICK).weight, whole.weight
        )  # equal seeds, equal inverters
        again = train_inverter(model, texts, [1, 2], folder, QUICK, progress=lambda p: pytest.fail("it was finished"))
        assert torch.equal(again.weight, whole.weight)
        with pytest.raises(RefusedError, match="belongs to another inverter"):
            train_inverter(model, texts, [1, 2], folder, replace(QUICK, seed=1))
        with pytest.raises(RefusedError, match="belongs to another inverter"):
            train_inverter(model, texts, [1], folder, QUICK)

    def test_saved_ones_are_the_same_and_those_of_other_models_are_refused(self, model: Model, tmp_path: Path) -> None:
        inverter = train_inverter(model, noise(20, 12), [1, 2], tmp_path / "folder", QUICK)
        inverter.save(tmp_path / "it.safetensors")
        h = model.run("some text", read="resid.2")["resid.2"][0]
        for path in (tmp_path / "it.safetensors", tmp_path / "folder"):
            found = load_inverter(path, model)
            assert torch.equal(found.ids(h, 2), inverter.ids(h, 2)) and found.layers == (1, 2)
            assert json.loads(json.dumps(inverter.provenance)) == found.provenance
        with pytest.raises(RefusedError, match="trained on other weights"):
            load_inverter(tmp_path / "it.safetensors", loaded("gemma2"))
        with pytest.raises(VectorError, match="64 wide; atlas is 192 wide"):
            load_inverter(tmp_path / "it.safetensors", ps.load("atlas"))
        with pytest.raises(InputError, match="there is no inverter"):
            load_inverter(tmp_path / "nothing", model)
        (tmp_path / "torn.safetensors").write_bytes(b"torn")
        with pytest.raises(InputError, match="could not be read as an inverter"):
            load_inverter(tmp_path / "torn.safetensors", model)
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="holds weight of format None"):
            load_inverter(tmp_path / "other.safetensors", model)
        with pytest.raises(InputError, match="offsets=0"):
            InverterRecipe(offsets=0)


# -------------------------------------------------------------------------------------------------------------------- reconstruction


class TestReconstruction:
    def test_own_tokens_and_one_vector_come_back(self, model: Model) -> None:
        """At layer 0: all of the text from all states by either; from one state the token itself, and those that the text makes precede."""
        recipe = InverterRecipe(offsets=3, steps=80, tokens_per_step=200, negatives=20, rate=0.01, held_out=0.3)
        text = "cdefghabcdefgh"
        trained = train_inverter(model, rounds(60, 24), [0], recipe=recipe)
        nearest = token_vectors(model, [0], contexts=("a",))
        (found,) = invert(model, [text], "habcd", 0, trained)
        assert (found.text, found.piece, found.one) == ("cdefghabcd", "habcd", "bcd")  # K = 3 of five tokens
        assert found.token_accuracy == 1 and found.layer == 0 and found.ids == found.own
        (found,) = invert(model, [text], "habcd", 0, nearest)
        assert (found.text, found.piece, found.one) == ("cdefghabcd", "habcd", "d")
        (found,) = invert(model, [text], "de#1", 0, trained)
        assert (found.text, found.piece, found.one) == ("cde", "de", "de")  # as many as the piece has

    def test_a_batch_is_its_prompts(self, model: Model) -> None:
        vectors = token_vectors(model, [2], contexts=("a",))
        prompts, at = ["some tall hill", "sea", "a text that is longer than the others"], ["hill", "sea", -2]
        whole = invert(model, prompts, at, 2, vectors)
        assert whole == [invert(model, [p], [a], 2, vectors)[0] for p, a in zip(prompts, at, strict=True)]
        assert [len(one.own) for one in whole] == [14, 3, 36]
        with pytest.raises(InputError, match="3 prompts were given with 2 positions"):
            invert(model, prompts, at[:2], 2, vectors)

    def test_atlas_repeats_names(self, atlas: Model) -> None:
        prompts = [f"We talked about {name}" for name in NAMES]
        found = invert(atlas, prompts, list(NAMES), 3, ps.scopes.repeat())
        assert [one.piece for one in found] == list(NAMES)
        short = [k for k, name in enumerate(NAMES) if len(atlas.tokens(f"x {name}")) == len(atlas.tokens("x Japan"))]
        assert 0 in short and all(found[k].one == NAMES[k] for k in short)
        other = ps.scopes.repeat(("Peru", "Toyota"), arrow=": ", separator=", ")
        assert other.prompt == "Peru: Peru, Toyota: Toyota, {x}:" and other.stop == (",", "\n")
        with pytest.raises(InputError, match="18 texts for 2 states"):
            invert(atlas, prompts[:2], list(NAMES[:2]), 3, ps.scopes.repeat(layer="all"))

    def test_what_the_names_alone_answer(self, atlas: Model) -> None:
        targets = ["The capital of {x} is", "The capital of {x} is", "The currency of {x} is", "The capital of {x} is"]
        said = answers(atlas, targets, ["France", "Japan ", "Japan", ""], stop=(".",))
        assert [one.strip() for one in said] == ["Paris", "Tokyo", "yen", ""]
        by_hand = [
            atlas.generate(p, max_new_tokens=10, stop=(".",))[0].text
            for p in ("The capital of France is", "The currency of Japan is")
        ]
        assert [said[0], said[2]] == by_hand
        assert answers(atlas, targets[:1], ["France " * 2000]) == [""]  # more than the model reads
        with pytest.raises(PositionError, match=r"has no \{x\}"):
            answers(atlas, ["The capital is"], ["France"])

    def test_scores_by_hand(self) -> None:
        found = [
            Reconstruction(1, "we saw Japan", "Japan", "Japan", (1, 2, 3), (1, 2, 3)),
            Reconstruction(1, "we saw Chinatown", "Chinatown", "of China", (1, 9), (1, 2, 3, 4)),
        ]
        got = scores(
            found, ["Japan", "China"], [("Tokyo",), ("Beijing", "Peking")], [" Tokyo", "Peking"], ["Tokyo", "Rome"], "ab"
        )
        assert got.tokens.value == (1 + 1 / 4) / 2 and got.name.value == 0.5 and got.name_one.value == 1
        assert got.answer.value == 1 and got.answer_one.value == 0.5 and got.answer.clusters == 2


def test_types_are_exported() -> None:
    assert {Inverter, TokenVectors} == {ps.lenses.Inverter, ps.lenses.TokenVectors}
