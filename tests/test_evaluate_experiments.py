"""The experiments on the bundled model and on random weights: figures, chance, stops, the command, the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import patchscopes as ps
from patchscopes import PatchscopesError
from patchscopes.evaluate import attribute, entity, next_token, planted, probe, scoring, statistics
from patchscopes.evaluate.data import Items
from patchscopes.evaluate.frame import Asked, Bars, Heat, Line, Lines, Result, Table, Unfinished, chosen_settings, settings_of
from patchscopes.evaluate.statistics import Estimate
from patchscopes.runs import Stop
from patchscopes.views.evaluation import page, save_figures

SMALL = attribute.Settings(probe=12, tokens=6, layers="3:6:2", target_layers="1:4", tasks=("country.capital", "city.country"))


@pytest.fixture(scope="module")
def random_weights() -> ps.Model:
    """atlas as it was before it was trained."""
    model = ps.load("atlas")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return ps.load((model.hf, model.tokenizer))


@pytest.fixture(scope="module")
def attributes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Asked, Result]:
    asked = Asked(n=8, runs=tmp_path_factory.mktemp("attribute"))
    return asked, attribute.evaluate(asked, SMALL)


def test_attributes_of_the_bundled_model_are_extracted(attributes: tuple[Asked, Result]) -> None:
    _, found = attributes
    scores: Any = found.scores
    assert scores["held_out_cell"].value > 0.7
    assert max(scores[name].value for name in ("random_vector", "other_entity", "question_alone")) < 0.3
    assert scores["cells"] == 6 and scores["per_draw"].value <= scores["any_of_all"].value
    assert scores["any_of_all"].value == pytest.approx(any_cell_by_hand(found.runs[1]))
    assert scores["cell"]["chosen_on"] + scores["cell"]["scored_on"] == scores["any_of_all"].n
    assert set(scores["by_relation"]) == set(SMALL.tasks or ())
    assert [run.name for run in found.runs] == ["attribute-known", "attribute", "attribute-controls", "attribute-probe"]
    assert any("tokens = 6 instead of 20" in text for text in found.deviations)
    json.dumps(found.to_json())


def any_cell_by_hand(grid: Any) -> float:
    """The mean over relations of the share of items at which some text of the table names the object."""
    answers = {(i.target, i.prompt, i.at): i.answers for i in planted.items().items if i.relation in (SMALL.tasks or ())}
    hit: dict[str, dict[tuple[str, str], bool]] = {}
    for target, prompt, at, text in grid.table(control="none").select("scope", "prompt_text", "at", "text").iter_rows():
        own = hit.setdefault(target, {})
        own[prompt, at] = own.get((prompt, at), False) or scoring.names(text, answers[target, prompt, at])
    return sum(sum(own.values()) / len(own) for own in hit.values()) / len(hit)


def test_other_entities_are_drawn_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []

    def strangers(*given: Any) -> list[int | None]:
        heard.append(given[3])
        return real(*given)

    real = statistics.strangers
    monkeypatch.setattr(statistics, "strangers", strangers)
    settings = dataclasses.replace(SMALL, known="all", probe=0, spread="below", layers="4", target_layers="2")
    attribute.evaluate(Asked(n=6, runs=tmp_path, seed=5), settings)
    assert heard == [5, 5]  # the grid, and that with the state at ℓ* alone


def test_relations_in_the_same_words_are_told_apart(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, tasks=("city.country", "landmark.country"), layers="4", target_layers="2", probe=0)
    found = attribute.evaluate(Asked(n=6, runs=tmp_path), settings)
    assert [row["items"] for row in found.scores["by_relation"].values()] == [6, 6]  # type: ignore[index]


def test_asking_again_computes_nothing(attributes: tuple[Asked, Result]) -> None:
    asked, found = attributes
    heard: list[str] = []
    again = attribute.evaluate(dataclasses.replace(asked, listeners=[lambda event: heard.append(event["kind"])]), SMALL)
    assert set(heard) == {"cached"} and again.to_json() == found.to_json()


def test_a_stopped_experiment_goes_on(attributes: tuple[Asked, Result], tmp_path: Path) -> None:
    asked, found = attributes
    stop = Stop()

    def listener(event: dict[str, Any]) -> None:
        if event["kind"] == "started":
            stop(15)

    with pytest.raises(Unfinished, match="same command goes on") as stopped:
        attribute.evaluate(dataclasses.replace(asked, runs=tmp_path, stop=stop, listeners=[listener]), SMALL)
    assert stopped.value.exit_code == 143 and stopped.value.run.counts["waiting"] > 0
    again = attribute.evaluate(dataclasses.replace(asked, runs=tmp_path), SMALL)
    assert again.runs[0].id == stopped.value.run.id
    assert again.to_json()["scores"] == found.to_json()["scores"]


def test_random_weights_are_at_chance(random_weights: ps.Model, tmp_path: Path) -> None:
    asked = Asked(n=12, runs=tmp_path, models={"atlas": random_weights})
    settings = dataclasses.replace(SMALL, known="all", probe=0)
    scores: Any = attribute.evaluate(asked, settings).scores
    assert scores["held_out_cell"].value < 0.1
    assert abs(scores["any_of_all"].value - scores["any_of_all_other_entity"].value) < 0.15
    found: Any = entity.evaluate(
        Asked(n=4, runs=tmp_path, models={"atlas": random_weights}), entity.Settings(tokens=8, layers="3:5")
    ).scores
    assert found["held_out_layer"].value < 0.2


def test_a_model_that_knows_nothing_is_told(random_weights: ps.Model, tmp_path: Path) -> None:
    asked = Asked(n=4, runs=tmp_path, models={"atlas": random_weights})
    with pytest.raises(PatchscopesError, match="that the model knows"):
        attribute.evaluate(asked, SMALL)


def test_too_few_items(tmp_path: Path) -> None:
    with pytest.raises(PatchscopesError, match="4 items or more"):
        attribute.evaluate(Asked(n=3, runs=tmp_path), SMALL)
    few = attribute.Settings(at_least=9)
    with pytest.raises(PatchscopesError, match=r"no relation has 9 items or more of the facts of atlas; found") as e:
        attribute.plan(Asked(n=4, runs=tmp_path), few)  # no model was asked
    assert "knows" not in str(e.value)
    for wrong in (attribute.Settings(probe=-1), attribute.Settings(tokens=0), attribute.Settings(at_least=0)):
        for do in (attribute.plan, attribute.evaluate):
            with pytest.raises(PatchscopesError, match=r"is (-1|0); expected [01] or more"):
                do(Asked(runs=tmp_path), wrong)
    with pytest.raises(PatchscopesError, match=r"have no relation country\.moon"):
        attribute.evaluate(Asked(runs=tmp_path), attribute.Settings(tasks=("country.moon",)))


def test_descriptions_of_the_bundled_model_are_true(tmp_path: Path) -> None:
    found = entity.evaluate(Asked(n=4, runs=tmp_path), entity.Settings(tokens=16, layers="1:4"))
    scores: Any = found.scores
    assert scores["held_out_layer"].value > 0.5
    assert max(scores[name].value for name in ("random", "nothing", "another_entitys_description")) < 0.25
    assert scores["rouge_l"].value > 0.4 and len(scores["by_kind"]) == 9
    assert {row[3] for row in found.tables[1].rows} <= {"yes", "no"}


def test_next_tokens(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"The capital of {x} is a city." for x in ("France", "Japan", "Peru", "Kenya")))
    found = next_token.evaluate(Asked(runs=tmp_path / "runs", data=tmp_path / "texts.txt"))
    scopes: Any = found.scores["scopes"]
    assert set(scopes) == {"logit lens", "token identity", "bare ?", "tuned lens"} and set(scopes["bare ?"]) == set(
        map(str, range(9))
    )
    assert scopes["logit lens"]["8"]["precision_at_1"].value == 1.0  # the model itself
    assert scopes["token identity"]["8"]["precision_at_1"].value == 1.0  # written at layer L, it is what is decoded
    assert found.scores["texts"] == 4


def test_the_tuned_lens_of_the_model_stands_beside_the_logit_lens(tmp_path: Path) -> None:
    found: Any = next_token.evaluate(Asked(n=60, runs=tmp_path), next_token.Settings(scopes=("logit lens",)))
    tuned, lens = found.scores["scopes"]["tuned lens"], found.scores["scopes"]["logit lens"]
    assert set(lens) == {*tuned, "8"} == set(map(str, range(9)))  # at layer L the two are one reading, made once
    for layer in range(8):
        more = tuned[str(layer)]["above_logit_lens"].value
        assert more == pytest.approx(tuned[str(layer)]["precision_at_1"].value - lens[str(layer)]["precision_at_1"].value)
        assert lens[str(layer)]["above_logit_lens"].value == 0
    assert tuned["4"]["above_logit_lens"].low > 0
    assert any("tuned lens is nowhere less precise" in claim for claim in found.claims)


def test_a_tuned_lens_of_ones_own(tmp_path: Path) -> None:
    from patchscopes.lenses import TunedLens

    TunedLens.untrained(ps.load("atlas")).save(tmp_path / "mine.safetensors")
    settings = next_token.Settings(scopes=("logit lens",), lens=str(tmp_path / "mine.safetensors"))
    found: Any = next_token.evaluate(Asked(n=6, runs=tmp_path / "runs"), settings).scores["scopes"]
    assert found["tuned lens"]["3"] == found["logit lens"]["3"]  # W = 0 and b = 0
    torch.manual_seed(0)
    TunedLens(0.3 * torch.randn(8, 192, 192), torch.randn(8, 192)).save(tmp_path / "bad.safetensors")
    with pytest.raises(PatchscopesError, match="logit lens"):  # compared by what it says
        next_token.evaluate(Asked(n=6, runs=tmp_path / "runs"), next_token.Settings(lens=str(tmp_path / "bad.safetensors")))


def test_the_probe_solves_its_problem_and_keeps_clusters_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    both = torch.stack([x, torch.randn(40, 5, generator=generator)])
    for some in (both, both[:, :4]):  # more rows than features, and fewer
        weights, biases = probe.fit(some, y[: some.shape[1]], 4)
        for one, weight, bias in zip(some, weights, biases, strict=True):
            p = torch.softmax(one.double() @ weight.T + bias, 1) - torch.nn.functional.one_hot(y[: len(one)], 4)
            assert (p.T @ one.double() + weight).abs().max() < 1e-4 and p.sum(0).abs().max() < 1e-4  # the gradient is zero
    clusters = [k // 2 for k in range(40)]
    fold = probe.folds_of(clusters)
    assert all(fold[2 * k] == fold[2 * k + 1] for k in range(20)) and set(fold) == {0, 1, 2}
    hits = probe.held_out_hits(both, y.tolist(), clusters)
    assert hits is not None and hits[:, 0].mean() > 0.7 and hits[:, 1].mean() < 0.5  # what is there, and noise
    shuffled = probe.held_out_hits(both, y[torch.randperm(40, generator=generator)].tolist(), clusters)
    assert shuffled is not None and shuffled.mean() < 0.5
    assert probe.held_out_hits(both, [1] * 40, clusters) is None


# ------------------------------------------------------------------------------------------------------------------ frame and page


def test_settings_from_text() -> None:
    found = chosen_settings(attribute.Settings, {"tokens": "5", "known": "all", "tasks": "a, b", "at-least": "7", "leaks": "no"})
    assert (found.tokens, found.known, found.tasks, found.at_least, found.leaks) == (5, "all", ("a", "b"), 7, False)
    assert chosen_settings(attribute.Settings, {"tasks": "none"}) == attribute.Settings()
    for given, message in (
        ({"token": "5"}, "Did you mean"),
        ({"tokens": "x"}, "a whole number"),
        ({"known": "not"}, "labels, model"),
    ):
        with pytest.raises(PatchscopesError, match=message):
            chosen_settings(attribute.Settings, given)


def test_what_differs_from_the_paper_is_told_default_or_not() -> None:
    def told(settings: object) -> tuple[str, ...]:
        return settings_of(settings, Asked())[1]

    assert told(entity.Settings()) == (
        "source = 'mention' instead of 'name'",
        "layers = '1:-1' instead of '1:11'",
        "stop = (',', '\\n') instead of ()",
    )
    papers = chosen_settings(entity.Settings, {"source": "name", "layers": "1:11", "stop": ""})
    assert told(papers) == () and told(dataclasses.replace(papers, tokens=20)) == ("tokens = 20 instead of 50",)
    assert "at_least = 4 instead of 15" in told(attribute.Settings()) and told(attribute.Settings(at_least=15, probe=0)) == (
        "probe = 0 instead of 'all'",
    )
    tsvs = Items("attribute TSVs", ())
    assert any("split rows" in text for text in attribute._deviations(tsvs, attribute.Settings()))
    assert attribute._deviations(tsvs, attribute.Settings(probe=0, tokens=10)) == ()
    # which lens is compared is no choice of the paper
    assert told(next_token.Settings(scopes=("logit lens", "token identity"), lens="atlas")) == ()


EVIL = '</pre><script>alert(1)</script>"onload="x\u202e'


def evil_result() -> Result:
    estimate, lone = Estimate(0.5, 0.25, 0.75, 4, 2), Estimate(0.5, float("nan"), float("nan"), 2, 1)
    figures = (
        Lines("lines", f"$a^b$ {EVIL}", "ℓ", EVIL, (Line(EVIL, (0.0, 1.0), (0.5, float("nan"))),)),
        Bars("bars", EVIL, EVIL, (EVIL, "b"), ((EVIL, (estimate, lone)),)),
        Heat("heat", EVIL, "ℓ", EVIL, ("1", "<b>"), ("c",), ((0.5,), (float("nan"),)), "share", (0, 0)),
    )
    table = Table("t", EVIL, ("text", EVIL), ((EVIL, 0.5), ("b", estimate), ("c", lone)), (EVIL,))
    return Result("x", EVIL, EVIL, (EVIL,), {EVIL: estimate}, {EVIL: EVIL}, (table,), figures, {"k": EVIL}, (EVIL,), (EVIL,))


def test_the_page_shows_text_as_text() -> None:
    text = page(evil_result())
    assert "<script" not in text and 'onload="x' not in text.replace("&quot;", "'")
    assert "\u202e" not in text and "50.0% (25.0% to 75.0%)" in text and "50.0% (interval unknown)" in text
    assert len(re.findall("<svg", text)) == 3 and len(re.findall("<figure", text)) == 3
    assert "<image" not in text  # the page's policy shows none
    assert not re.search(r"""(?:src|href)=["'](?!#)""", text.replace("xmlns:xlink", ""))  # nothing is fetched
    assert len(re.findall(r' id="([^"]+)"', text)) == len(set(re.findall(r' id="([^"]+)"', text)))


def test_figures_are_files_that_are_equal_when_drawn_again(tmp_path: Path) -> None:
    first = save_figures(evil_result().figures, tmp_path / "a")
    again = save_figures(evil_result().figures, tmp_path / "b")
    assert [path.name for path in first] == [f"{name}.{kind}" for name in ("lines", "bars", "heat") for kind in ("png", "svg")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, again, strict=True))


def cli(*args: str) -> int:
    from patchscopes.cli import app

    return app.run(["evaluate", *args])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "2", "--runs", str(tmp_path), "--set", "tokens=8", "--set", "layers=2"]
    assert cli("entity", *options, "--json", "--out", str(tmp_path / "out")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["experiment"] == "entity" and printed["settings"]["tokens"] == 8
    assert 0 <= printed["scores"]["held_out_layer"]["value"] <= 1
    assert {"page.html", "scores.json", "by-layer.png", "by-layer.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert cli("entity", *options) == 0
    told = capsys.readouterr()
    assert "true at the held-out layer" in told.out and told.out.strip().endswith("page.html") and "nothing to do" in told.err


def test_every_experiment_stands_in_the_docs() -> None:
    from patchscopes.cli.evaluate import EXPERIMENTS

    text = (Path(__file__).parent.parent / "docs" / "evaluate.md").read_text(encoding="utf-8")
    asks, formats = text.partition("## Data")[::2]
    assert set(re.findall(r"^\| `([\w-]+)` \|", asks, re.MULTILINE)) == set(EXPERIMENTS)
    assert set(re.findall(r"`([a-z-]+)`(?=[,| ]*\n|, `| \|)", formats)) >= set(EXPERIMENTS)


def test_the_plan_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("attribute", "--n", "4", "--dry-run", "--hardware", "a100", "--json", "--runs", str(tmp_path / "runs")) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [one["name"] for one in plans] == ["attribute-known", "attribute", "attribute-controls", "attribute-probe"]
    assert plans[1]["cells"] == 35 * 4 * 49 and plans[1]["seconds"] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["atribute"], 2, "Did you mean 'attribute'"),
        (["attribute", "--set", "tokens"], 2, "KEY=VALUE"),
        (["attribute", "--data", "nowhere"], 4, "no file or folder"),
        (["attribute", "--hardware", "a100"], 2, "--dry-run"),
        (["entity", "--data", "nowhere"], 2, "no PopQA file"),
    ],
)
def test_wrong_commands(args: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*args, "--runs", str(tmp_path)) == code
    assert message in capsys.readouterr().err
