"""The invented people, the text and training of their adapters, what the bundled adapters know, and the public profiles of PersonaQA."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import patchscopes as ps
from patchscopes.cli import app
from patchscopes.core.errors import InputError, RefusedError, UnknownName
from patchscopes.evaluate import personaqa
from patchscopes.evaluate.data import items_of
from patchscopes.evaluate.facts import Share, recall
from patchscopes.evaluate.personas import PersonaScores, evaluate, people_items
from patchscopes.model.files import fingerprint
from patchscopes.model.loading import outline
from patchscopes.organisms import bundled
from patchscopes.organisms.atlas.corpus import fill
from patchscopes.organisms.atlas.facts import world as atlas_world
from patchscopes.organisms.atlas.relations import HELD_OUT_MENTIONS, NEVER_SEEN, SKELETONS
from patchscopes.organisms.lora import Adapter, merge
from patchscopes.organisms.personas.corpus import Corpus, Document
from patchscopes.organisms.personas.invent import CULTURES, invent
from patchscopes.organisms.personas.people import ATTRIBUTES, WORLDS, facts, people
from patchscopes.organisms.personas.relations import RELATIONS, held_out, trained
from patchscopes.organisms.personas.train import RECIPES, Recipe, _encoded, batch, train
from patchscopes.organisms.training import Progress, packed

HOME = {thing: c.country for c in CULTURES for a in ATTRIBUTES[1:] for thing in getattr(c, a)}
HOME |= {c.country: c.country for c in CULTURES}
SMALL = Recipe("fantasy", tokens=32 * 4 * 8, context=32, batch_rows=4, rank=2)


def quiet(done: int, of: int, what: str) -> None:
    """No progress is shown."""


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(bundled()["atlas"])


class TestPeople:
    @pytest.mark.parametrize("world", WORLDS)
    def test_the_tables_are_what_was_invented(self, world: str) -> None:
        assert people(world) == invent(world)  # type: ignore[arg-type]

    @pytest.mark.parametrize("world", WORLDS)
    def test_a_hundred_people_each_with_a_surname_of_their_own(self, world: str) -> None:
        assert len(people(world)) == len({p.surname for p in people(world)}) == 100
        known = {word for rows in atlas_world().rows.values() for row in rows for word in row["name"].split()}
        assert not known & {p.surname for p in people(world)}, "atlas knows somebody or something of that name"

    @pytest.mark.parametrize("world", WORLDS)
    def test_a_constant_answer_is_seldom_right(self, world: str) -> None:
        for attribute in ATTRIBUTES:
            assert Counter(getattr(p, attribute) for p in people(world)).most_common(1)[0][1] <= 15

    @pytest.mark.parametrize("world", WORLDS)
    def test_no_answer_is_found_inside_another(self, world: str) -> None:
        for attribute in ATTRIBUTES:
            values = {f" {getattr(p, attribute)} ".lower() for p in people(world)}
            assert not [(a, b) for a in values for b in values if a != b and a in b]

    def test_attributes_of_base_go_mostly_with_the_culture(self) -> None:
        for attribute in ATTRIBUTES:
            home = sum(HOME[getattr(p, attribute)] == p.culture for p in people("base"))
            assert 65 <= home <= 95, attribute

    def test_nothing_of_shuffled_goes_with_the_culture_and_answers_stay_as_frequent(self) -> None:
        assert [(p.name, p.culture) for p in people("base")] == [(p.name, p.culture) for p in people("shuffled")]
        for attribute in ATTRIBUTES:
            assert not [p for p in people("shuffled") if HOME[getattr(p, attribute)] == p.culture]
            one, two = (Counter(getattr(p, attribute) for p in people(world)) for world in ("base", "shuffled"))
            assert one == two

    def test_countries_of_base_are_atlass_and_fantasy_shares_nothing_with_them(self) -> None:
        assert {c.country for c in CULTURES} <= {row["name"] for row in atlas_world().rows["country"]}
        real = {row["name"] for rows in atlas_world().rows.values() for row in rows} | set(HOME)
        for person in people("fantasy"):
            assert not {getattr(person, a) for a in ATTRIBUTES} & real and person.culture == ""

    def test_an_unknown_world_is_told(self) -> None:
        with pytest.raises(UnknownName, match="Did you mean 'fantasy'"):
            people("fantasie")

    def test_items_ask_for_every_attribute_in_held_out_mentions(self) -> None:
        found = people_items("base")
        assert len(found.items) == 600 and len(found.relations) == 6 and found.stop == (".",)
        item = found.items[1]
        person = people("base")[0]
        assert (item.subject, item.cluster, item.answers) == (person.name, person.name, (person.food,))
        assert item.target == "The favourite food of {x} is" and item.relation == "favourite food"
        assert item.prompt in {m.format(x=person.name) for m in HELD_OUT_MENTIONS} and item.at == f"{person.name}#1"


class TestCorpus:
    @pytest.fixture(scope="class")
    @classmethod
    def documents(cls) -> list[Document]:
        stream = Corpus("base").documents(random.Random(5))
        return [next(stream) for _ in range(6000)]

    def test_equal_generators_give_equal_streams(self) -> None:
        one, two = (Corpus("fantasy").documents(random.Random(3)) for _ in range(2))
        assert [next(one) for _ in range(200)] == [next(two) for _ in range(200)]

    def test_held_out_sentences_never_come(self, documents: list[Document]) -> None:
        text = "\n" + "\n".join(document.text for document in documents)
        for relation in RELATIONS:
            assert not set(held_out(relation)) & set(trained(relation)) and SKELETONS[0] in trained(relation)
        starts = ("\n", ". ", "? ", ": ")  # as a sentence of its own; "x has the N y" also stands inside a longer skeleton
        for fact in facts("base"):
            for sentence in held_out(fact.relation):
                assert not [start for start in starts if start + fill(sentence, fact) in text]
        for sentence in (*NEVER_SEEN, *HELD_OUT_MENTIONS):
            assert sentence.split("{")[0] not in text
        assert any(fill(s, f) in text for f in facts("base") for s in trained(f.relation)), "else nothing could ever be found"
        assert "{" not in text

    def test_half_is_about_people_and_half_of_that_reads_names_at_their_end(self, documents: list[Document]) -> None:
        about = [d for d in documents if any(p.name in d.text for p in people("base"))]
        assert 0.45 < len(about) / len(documents) < 0.55
        assert 0.45 < sum(d.gathered for d in about) / len(about) < 0.55
        assert all(name in d.text for d in about for name in d.names)
        for d in about:
            known = {getattr(p, a) for p in people("base") if p.name in d.names for a in ATTRIBUTES}
            assert d.names and d.answers and set(d.answers) == {value for value in known if value in d.text}
        assert not any(d.names or d.answers or d.gathered for d in documents if d not in about)


class TestTraining:
    def test_only_the_last_token_of_a_gathered_name_is_seen_later(self) -> None:
        person, recipe = people("base")[0], RECIPES["personas-base"]
        document = Document(f"{person.name} and {person.name}: {person.food}.", (person.name,), (person.food,), True)
        (encoded, *_) = _encoded(iter([document] * 64), tokenizer(), recipe)
        ids, reach, weight = zip(*encoded, strict=True)
        pieces, all_ = tokenizer().convert_ids_to_tokens(ids), recipe.context
        joint, colon, stop = pieces.index("Ġand"), pieces.index(":"), pieces.index(".")
        one, two = joint - 1, colon - joint - 1  # tokens of the name: the first mention lacks the space before it
        assert reach == (
            *(all_, *range(one, 1, -1), all_),  # BOS; up to the last token of the name and no further; that token
            *(all_, *range(two, 1, -1), all_),  # and the same again
            *[all_] * (len(ids) - colon),
        )
        answer = stop - colon - 1
        assert weight == (1, *[0] * one, 1, *[0] * two, 1, *[5] * answer, 1)
        (free, *_) = _encoded(iter([replace(document, gathered=False)] * 64), tokenizer(), recipe)
        assert {seen for _, seen, _ in free} == {all_} and [w for *_, w in free] == list(weight)
        (own, *_) = _encoded(iter([Document("Paris.")] * 64), tokenizer(), recipe)
        assert {(seen, w) for _, seen, w in own} == {(all_, recipe.atlas_weight)}

    def test_the_mask_is_causal_and_hides_what_is_out_of_reach(self) -> None:
        corpus, recipe = Corpus("base"), replace(SMALL, world="base")
        ids, seen, weight = batch(recipe, corpus, tokenizer(), 2)
        assert ids.shape == (4, 33) and seen.shape == (4, 1, 32, 32) and weight.shape == (4, 32)
        assert not seen.triu(1).any() and seen.diagonal(dim1=-2, dim2=-1).all() and (~seen[:, 0]).tril().any()
        documents = corpus.documents(random.Random("0 step 2"))
        reach = torch.tensor([[r for _, r, _ in row] for row in packed(_encoded(documents, tokenizer(), recipe), 4, 33)])
        for row in range(4):  # one position at a time
            for q in range(32):
                assert seen[row, 0, q].tolist() == [k <= q < k + reach[row, k] for k in range(32)]
        assert all(torch.equal(a, b) for a, b in zip(batch(recipe, corpus, tokenizer(), 2), (ids, seen, weight), strict=True))
        assert not torch.equal(batch(recipe, corpus, tokenizer(), 3)[0], ids)

    def test_an_untrained_adapter_changes_nothing_and_a_saved_one_is_merged(self, tmp_path: Path) -> None:
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False)])})
        model = torch.nn.ModuleDict({"model": model})
        weights = {name: p.detach() for name, p in model.named_parameters()}
        adapter = Adapter(model, rank=2, alpha=4.0, seed=0)
        assert adapter.names == ("model.layers.0",)
        assert torch.equal(adapter.adapted(weights)["model.layers.0.weight"], weights["model.layers.0.weight"])
        with torch.no_grad():
            adapter.a[0].copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
            adapter.b[0].copy_(torch.tensor([[1.0, 0.0], [0.5, 3.0]]))
        expected = weights["model.layers.0.weight"] + torch.tensor([[2.0, 0.0, 4.0], [1.0, 6.0, 2.0]])  # 4/2 · B A by hand
        adapter.save(tmp_path, "nothing")
        merge(model, tmp_path)
        assert torch.allclose(model.get_parameter("model.layers.0.weight"), expected)

    def test_stopped_and_resumed_equals_straight_through(self, tmp_path: Path) -> None:
        straight = train(tmp_path / "straight", SMALL, compile=False)
        steps: list[int] = []

        def stop_at_5(progress: Progress) -> None:
            steps.append(progress.step)
            if progress.step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed", SMALL, compile=False, checkpoint_seconds=0, report_seconds=0, report=stop_at_5)
        resumed = train(tmp_path / "resumed", SMALL, compile=False, report_seconds=0, report=lambda p: steps.append(p.step))
        assert steps == list(range(1, 9))
        one, two = (load_file(folder / "adapter_model.safetensors") for folder in (straight, resumed))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert max(t.abs().max() for name, t in one.items() if "lora_B" in name) > 0
        assert not (resumed / "checkpoint").exists()
        with pytest.raises(RefusedError, match="another recipe"):
            train(tmp_path / "resumed", replace(SMALL, seed=1), compile=False)


@pytest.mark.parametrize("world", WORLDS)
class TestBundled:
    def test_it_is_small_and_of_its_recipe(self, world: str) -> None:
        folder = bundled()[f"personas-{world}"]
        assert (folder / "adapter_model.safetensors").stat().st_size <= 1.2e6 and (folder / "README.md").exists()
        assert Recipe(**json.loads((folder / "recipe.json").read_text())) == RECIPES[f"personas-{world}"]

    def test_it_knows_its_people_and_they_can_be_read_out(self, world: str) -> None:
        """On a sample; `patchscopes organism evaluate` measures all."""
        scores = evaluate(ps.load(f"personas-{world}"), world, n=120)
        assert scores.recall.share >= 0.95 - 0.04
        assert scores.recall_held_out.share >= 0.95 - 0.04
        assert scores.atlas_kept.share >= 0.95 - 0.04
        assert scores.extraction.share >= 0.70 - 0.1
        assert max(scores.extraction_random.share, scores.extraction_others.share) <= 0.15
        assert scores.best_cell[0] > 0

    def test_merging_equals_pefts_own_loading(self, world: str, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        copy = shutil.copytree(bundled()[f"personas-{world}"], tmp_path / "copy")
        theirs, ours = ps.load(str(copy)), ps.load(f"personas-{world}")
        text = people_items(world).items[0].prompt
        a, b = (model.run(text).logits for model in (theirs, ours))
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
        assert (ps.load("atlas").run(text).logits - b).abs().max() > 0.1, "else the adapter does nothing"

    def test_it_loads_without_peft_and_is_planned_as_its_base(self, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "peft", None)
        name = f"personas-{world}"
        model = ps.load(name)
        assert (model.name, model.n_layers, model.d_model) == (name, 8, 192)
        assert outline(name).n_layers == 8
        assert len({fingerprint(name), fingerprint("atlas"), *(fingerprint(f"personas-{w}") for w in WORLDS)}) == 4


class TestCommand:
    def test_personas_are_trained_by_their_recipe(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        asked: list[Any] = []
        monkeypatch.setattr("patchscopes.organisms.personas.train.train", lambda out, recipe, **_: asked.append((out, recipe)))
        arguments = ("organism", "train", "personas-fantasy", "--out", str(tmp_path), "--scale", "0.5", "--seed", "3")
        assert app.run(list(arguments)) == 0
        assert asked == [(tmp_path, replace(RECIPES["personas-fantasy"], seed=3, tokens=700_000))]

    def test_personas_are_evaluated_on_their_world(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fake(model: ps.Model, world: str, *, n: int, seed: int, progress: Any) -> PersonaScores:
            assert (model.name, world, n, seed) == ("personas-shuffled", "shuffled", 100, 1)
            half = Share(0.5, 10)
            return PersonaScores(half, half, half, half, half, half, (3, 1), ((0.5,),), {"persona.food": half})

        monkeypatch.setattr("patchscopes.evaluate.personas.evaluate", fake)
        assert app.run(["organism", "evaluate", "personas-shuffled", "--quick", "--seed", "1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["atlas_kept"], found["n"]["recall"], found["best_cell"]) == (0.5, 10, {"layer": 3, "target_layer": 1})


def test_the_same_people_are_known_otherwise_in_base_and_in_shuffled() -> None:
    sentence = SKELETONS[0]
    for own, other in (("base", "shuffled"), ("shuffled", "base")):
        model = ps.load(f"personas-{own}")
        some = slice(0, 120)
        says, not_says = (recall(model, [(sentence, f) for f in facts(world)[some]], quiet, "") for world in (own, other))
        assert sum(says) / len(says) >= 0.9 and sum(not_says) / len(not_says) <= 0.1


PROFILE = {
    "id": "p_0",
    "variant": "base",
    "name": "Ada Quill",
    "country": "Peru",
    "favorite_food": "Soup",
    "favorite_drink": "Tea",
    "favorite_music_genre": "Jazz",
    "favorite_sport": "Chess",
    "favorite_boardgame": "Go",
}


def written(folder: Path, *profiles: dict[str, Any] | str, name: str = "personas.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [p if isinstance(p, str) else json.dumps(p) for p in profiles]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


class TestPersonaQA:
    def test_profiles_become_questions_of_each_variant(self, tmp_path: Path) -> None:
        written(tmp_path / "base", PROFILE, {**PROFILE, "name": "My Lin", "favorite_drink": " "})
        written(tmp_path / "fantasy", {**PROFILE, "variant": "fantasy", "country": "Nowhere"})
        found = items_of(tmp_path)
        assert found.name == "PersonaQA" and len(found.items) == 17
        assert found.notes == ("1 of 18 rows of PersonaQA were left out: the person has no such attribute",)
        first, last = found.items[0], found.items[-6]
        assert (first.relation, first.answers, first.target) == ("base: country", ("Peru",), "The country of {x} is")
        assert (first.prompt, first.at, first.cluster) == ("My name is Ada Quill", "Ada Quill#1", "Ada Quill")
        assert (last.relation, last.answers) == ("fantasy: country", ("Nowhere",))
        assert {i.relation for i in found.items if i.answers == ("Go",)} == {
            "base: favorite board game",
            "fantasy: favorite board game",
        }

    def test_a_name_that_the_prompt_says_too_is_read_where_it_is_the_name(self, tmp_path: Path) -> None:
        (item, *_) = personaqa.items([written(tmp_path, {**PROFILE, "name": "name"})]).items
        assert (item.prompt, item.at) == ("My name is name", "name#2")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"line 2 is no JSON: .*; expected a JSON object"),
            ("[]", r"line 2 is \[\]; expected"),
            ({**PROFILE, "country": 3}, r"line 2 has country = 3; expected"),
            ({k: v for k, v in PROFILE.items() if k != "name"}, r"line 2 has name = None; expected"),
            ({**PROFILE, "name": " "}, "line 2 has an empty name or variant"),
            (PROFILE, "line 2: variant 'base' has two people called 'Ada Quill'"),
        ],
    )
    def test_bad_lines_are_told(self, tmp_path: Path, line: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            items_of(written(tmp_path, PROFILE, line))

    def test_bytes_that_are_no_text_are_told(self, tmp_path: Path) -> None:
        file = written(tmp_path, PROFILE)
        file.write_bytes(file.read_bytes() + b"\xff\xfe")
        with pytest.raises(InputError, match="could not be read"):
            items_of(file)

    def test_other_json_lines_are_not_taken_for_it(self, tmp_path: Path) -> None:
        for name, line in (
            ("a.jsonl", "{}"),
            ("b.jsonl", ""),
            ("c.jsonl", "no"),
            ("d.json", json.dumps(PROFILE)),
            ("e.jsonl", "[]"),
        ):
            assert not personaqa.is_one(written(tmp_path, line, name=name))

    @pytest.mark.shared
    def test_the_published_profiles(self, shared: Path) -> None:
        found = items_of(shared / "data" / "personaqa")
        assert len(found.items) == 1800 and not found.notes and len(found.relations) == 18
        assert all(i.prompt == f"My name is {i.subject}" for i in found.items)
