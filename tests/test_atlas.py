"""The bundled model: its facts, its corpus, its training, and what it can do."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import patchscopes as ps
from patchscopes.evaluate.atlas import evaluate
from patchscopes.evaluate.scoring import begins_with
from patchscopes.organisms import bundled
from patchscopes.organisms.atlas.corpus import Corpus, fill
from patchscopes.organisms.atlas.facts import KINDS, world
from patchscopes.organisms.atlas.relations import HELD_OUT_MENTIONS, NEVER_SEEN, RELATIONS, SKELETONS, held_out, trained
from patchscopes.organisms.atlas.train import RECIPES, Progress, Recipe, batch, build_tokenizer, train

SMALL = replace(Recipe().scaled(0.02), layers=2, context=64, batch_rows=4, tokens=64 * 4 * 12, vocab=600)


class TestFacts:
    def test_there_are_enough(self) -> None:
        counts = Counter(fact.relation.key for fact in world().facts)
        assert len(world().facts) >= 3000 and len(counts) >= 25
        assert set(counts) == {relation.key for relation in RELATIONS}

    def test_tables_are_clean(self) -> None:
        names = Counter((kind, row["name"]) for kind in KINDS for row in world().rows[kind])
        assert max(names.values()) == 1
        for kind in KINDS:
            for row in world().rows[kind]:
                for cell in row.values():
                    assert cell is not None and cell == cell.strip() and not set(cell) & set("{}\t\n"), row

    def test_another_entitys_fact_is_seldom_right(self) -> None:
        """Else a control that hits by chance would look like a reading."""
        chance = 0.0
        for relation in RELATIONS:
            objects = Counter(fact.object for fact in world().facts if fact.relation == relation)
            chance += sum(n * n for n in objects.values()) / sum(objects.values())
        assert chance / len(world().facts) < 0.06

    def test_two_hops_compose_two_facts_and_half_are_held_out(self) -> None:
        known = {(f.relation.key, f.entity): f.object for f in world().facts}
        for hop in world().two_hops:
            assert known[hop.first.key, hop.entity] == hop.bridge
            assert known[hop.second.key, hop.bridge] == hop.object
        share = sum(hop.held_out for hop in world().two_hops) / len(world().two_hops)
        assert 0.45 < share < 0.55

    def test_a_share_of_the_world_is_part_of_it(self) -> None:
        part = world(0.1)
        assert 0.05 < len(part.facts) / len(world().facts) < 0.15
        assert set(part.facts) < set(world().facts)


class TestCorpus:
    documents = 6000

    @pytest.fixture(scope="class")
    @classmethod
    def text(cls) -> str:
        stream = Corpus(world()).documents(random.Random(5))
        return "\n".join(next(stream) for _ in range(cls.documents))

    def test_equal_generators_give_equal_streams(self) -> None:
        one, two = (Corpus(world()).documents(random.Random(3)) for _ in range(2))
        assert [next(one) for _ in range(200)] == [next(two) for _ in range(200)]

    def test_held_out_sentences_never_come(self, text: str) -> None:
        for relation in RELATIONS:
            assert not set(held_out(relation)) & set(trained(relation))
            assert SKELETONS[0] in trained(relation)
        for fact in random.Random(1).sample(world().facts, 400):
            for sentence in held_out(fact.relation):
                for start in (
                    "\n",
                    ". ",
                    "? ",
                    ": ",
                ):  # as a sentence of its own; "x has the N y" also stands inside a longer skeleton
                    assert start + fill(sentence, fact) not in "\n" + text
        assert any(fill(s, f) in text for f in world().facts[:400] for s in trained(f.relation)), (
            "else nothing could ever be found"
        )
        for sentence in (*NEVER_SEEN, *HELD_OUT_MENTIONS):
            assert sentence.split("{")[0] not in text

    def test_held_out_compositions_never_come(self, text: str) -> None:
        asked = {f"The {h.second.noun} of the {h.first.noun} of {h.entity} is": h.held_out for h in world().two_hops}
        assert not any(sentence in text for sentence, away in asked.items() if away)
        assert any(sentence in text for sentence, away in asked.items() if not away)

    def test_nothing_is_patched_in_training_text(self, text: str) -> None:
        assert "{" not in text


class TestTraining:
    def test_a_batch_depends_on_seed_and_step_alone(self) -> None:
        corpus = Corpus(world(SMALL.share))
        tokenizer = build_tokenizer(SMALL, corpus)
        assert torch.equal(batch(SMALL, corpus, tokenizer, 3), batch(SMALL, corpus, tokenizer, 3))
        assert not torch.equal(batch(SMALL, corpus, tokenizer, 3), batch(SMALL, corpus, tokenizer, 4))
        ids = batch(SMALL, corpus, tokenizer, 0)
        assert ids.shape == (4, 65) and (ids[:, 0] == tokenizer.bos_token_id).all()

    def test_stopped_and_resumed_equals_straight_through(self, tmp_path: Path) -> None:
        straight = train(tmp_path / "straight", SMALL, compile=False)

        class Stop(Exception):
            pass

        steps: list[int] = []

        def stop_at_7(progress: Progress) -> None:
            steps.append(progress.step)
            if progress.step == 7:
                raise Stop

        with pytest.raises(Stop):
            train(tmp_path / "resumed", SMALL, compile=False, checkpoint_seconds=0, report_seconds=0, report=stop_at_7)
        assert (tmp_path / "resumed" / "checkpoint").exists()
        resumed = train(tmp_path / "resumed", SMALL, compile=False, report_seconds=0, report=lambda p: steps.append(p.step))
        assert steps == list(range(1, 13))
        one, two = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not (resumed / "checkpoint").exists()
        assert json.loads((resumed / "recipe.json").read_text())["tokens"] == SMALL.tokens

    def test_a_checkpoint_of_another_recipe_is_refused(self, tmp_path: Path) -> None:
        def stop(progress: Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(
                tmp_path,
                SMALL,
                compile=False,
                checkpoint_seconds=0,
                report_seconds=0,
                report=lambda p: stop(p) if p.step > 2 else None,
            )
        with pytest.raises(ps.PatchscopesError, match="another recipe"):
            train(tmp_path, replace(SMALL, seed=1), compile=False)

    @pytest.mark.slow
    def test_a_tenth_of_the_recipe_learns_its_facts(self, tmp_path: Path) -> None:
        recipe = Recipe().scaled(0.1)
        model = ps.load(train(tmp_path, recipe, compile=False))
        scores = evaluate(model, n=60, share=recipe.share)
        assert scores.recall.share >= 0.5, scores


@pytest.mark.skipif("atlas" not in bundled(), reason="this checkout has no weights of atlas")
class TestAtlas:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> ps.Model:
        return ps.load("atlas")

    def test_it_is_small(self) -> None:
        size = (bundled()["atlas"] / "model.safetensors").stat().st_size
        assert size <= 25e6
        assert (bundled()["atlas"] / "README.md").exists()

    def test_its_recipe_is_the_projects(self) -> None:
        assert Recipe(**json.loads((bundled()["atlas"] / "recipe.json").read_text())) == RECIPES["atlas"] == Recipe()

    def test_it_knows_its_facts_and_they_can_be_read_out(self, model: ps.Model) -> None:
        """On a sample; `patchscopes organism evaluate atlas` measures all."""
        scores = evaluate(model, n=120)
        assert scores.recall.share >= 0.95 - 0.04
        assert scores.recall_held_out.share >= 0.80 - 0.04
        assert scores.extraction.share >= 0.75
        assert scores.extraction_random.share <= 0.10 + 0.04
        assert scores.extraction_others.share <= 0.10 + 0.04

    def test_a_random_model_is_at_chance(self, model: ps.Model) -> None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        scores = evaluate(ps.load((LlamaForCausalLM(model.hf.config).eval(), model.tokenizer)), n=20)
        assert scores.recall.share == 0 and scores.extraction.n == 0


@pytest.mark.skipif("atlas-small" not in bundled(), reason="this checkout has no weights of atlas-small")
class TestAtlasSmall:
    def test_it_is_the_recipes_and_reads_as_atlas_does(self) -> None:
        folder = bundled()["atlas-small"]
        assert Recipe(**json.loads((folder / "recipe.json").read_text())) == RECIPES["atlas-small"]
        assert (folder / "tokenizer.json").read_bytes() == (bundled()["atlas"] / "tokenizer.json").read_bytes()
        assert (folder / "model.safetensors").stat().st_size <= 5e6 and (folder / "README.md").exists()

    def test_it_knows_most_facts(self) -> None:
        model = ps.load("atlas-small")
        assert (model.d_model, model.n_layers, model.dtype) == (128, 6, torch.float32)
        scores = evaluate(model, n=120)
        assert scores.recall.share >= 0.8 and scores.extraction.share >= 0.5
        assert max(scores.extraction_random.share, scores.extraction_others.share) <= 0.14


def test_weights_are_stored_as_the_recipe_says(tmp_path: Path) -> None:
    folder = train(tmp_path, replace(SMALL, tokens=256, stored="float16"), compile=False)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert ps.load(str(folder)).dtype == torch.float32


def test_an_answer_counts_as_whole_words() -> None:
    assert begins_with(" Paris.", "Paris") and begins_with("Paris", "Paris") and begins_with(" New York, ", "New York")
    assert not begins_with(" Parisian", "Paris") and not begins_with("the Paris", "Paris") and not begins_with("", "Paris")
