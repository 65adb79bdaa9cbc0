"""Maps: formulas, files, scopes that use them; fitting against closed forms; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import WIDTH, loaded
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchscopes as ps
from patchscopes import maps
from patchscopes.core.errors import InputError, LayerError, UnknownName, VectorError
from patchscopes.maps.align import aligned
from patchscopes.maps.fit import RIDGES, _across, _best_ridge, _halves, _require
from patchscopes.maps.states import split, states
from patchscopes.model import Model

TEXTS = [f"{a} the {b} of {c}" for a in "abcdefg" for b in ("hill", "sea") for c in ("x y z", "some town", "1 2 3")]


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------------------------- formulas


class TestFormulas:
    def test_zero_and_mean_say_nothing_of_h(self) -> None:
        h = draws(3, 4)
        assert maps.Zero()(h).tolist() == torch.zeros(3, 4).tolist() and maps.Zero(7)(h).shape == (3, 7)
        mean = maps.Mean.of(h)
        assert torch.allclose(mean(draws(2, 9)), h.mean(0).expand(2, 4))

    def test_noise_hangs_on_seed_and_width_alone(self) -> None:
        h = draws(5, 400)
        noise = maps.Noise(0.5, seed=3)
        added = noise(h) - h
        assert torch.allclose(added, added[:1].expand_as(added), atol=1e-6)
        assert torch.equal(noise(h)[2], noise(h[2]))  # a batch equals its rows
        assert float(added[0].std()) == pytest.approx(0.5, rel=0.15)
        assert not torch.equal(maps.Noise(0.5, seed=4)(h), noise(h)) and torch.equal(maps.Noise(0.0)(h), h)
        assert maps.Noise.like(h, times=3.0).sigma == pytest.approx(3 * float(h.std()), rel=1e-5)

    def test_norm_match_keeps_the_direction(self) -> None:
        h = draws(4, 6)
        f = maps.NormMatch(torch.tensor(2.5))
        assert torch.allclose(f(h).norm(dim=-1), torch.full((4,), 2.5))
        assert torch.allclose(torch.cosine_similarity(f(h), h), torch.ones(4))
        of_layers = maps.NormMatch(torch.tensor([1.0, 2.0, 3.0]), before=maps.Scale(-4.0))
        assert torch.allclose(of_layers.for_layers(0, 2)(h), -3 * h / h.norm(dim=-1, keepdim=True))
        with pytest.raises(LayerError, match="layers 0 to 2, but not of 3"):
            of_layers.for_layers(0, 3)
        with pytest.raises(InputError, match="a length for each layer"):
            of_layers(h)
        with pytest.raises(VectorError, match="no direction"):
            f(torch.zeros(2, 6))

    def test_norm_match_measures_what_stands_at_each_layer(self) -> None:
        model = loaded("llama")
        run = model.run(["the hill of x", "the sea"], read="resid.*")
        f = maps.NormMatch.of(run)
        norms = [
            run["resid.3"][i, j].norm() for i in range(2) for j in range(run.mask.shape[1]) if run.mask[i, : j + 1].sum() > 1
        ]
        assert len(f.length) == model.n_layers + 1
        assert float(f.length[3]) == pytest.approx(float(torch.stack(norms).median()), rel=1e-6)

    def test_low_rank_is_its_formula(self) -> None:
        up, down, bias, h = draws(5, 2), draws(2, 5, seed=1), draws(5, seed=2), draws(3, 5, seed=3)
        assert torch.allclose(maps.LowRank(up, down, bias, 1.0)(h), h + h @ (up @ down).T + bias, atol=1e-6)
        assert torch.allclose(maps.LowRank(up[:4], down)(h), h @ (up[:4] @ down).T, atol=1e-6)

    def test_per_direction_scales_what_lies_along_and_keeps_the_rest(self) -> None:
        u = torch.linalg.qr(draws(6, 2))[0].T.contiguous()
        h, gains, bias = draws(3, 6, seed=1), torch.tensor([2.0, -1.0]), draws(6, seed=2)
        want = h + (h @ u[0])[:, None] * u[0] - 2 * (h @ u[1])[:, None] * u[1] + bias
        assert torch.allclose(maps.PerDirection(gains, u, bias)(h), want, atol=1e-5)
        assert torch.allclose(maps.PerDirection(bias)(h), bias * h)

    def test_affine_maps_of_half_precision_states_keep_small_weights(self) -> None:
        h = draws(4, 64).bfloat16()
        small = 1e-3 * draws(64, 64, seed=1)
        want = (h.double() + h.double() @ small.double().T).bfloat16()
        found = maps.Affine(torch.eye(64) + small)(h)
        assert found.dtype == torch.bfloat16 and torch.equal(found, want)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: maps.Zero(0), "at least 1"),
            (lambda: maps.Noise(-1.0), "at least 0"),
            (lambda: maps.NormMatch(torch.tensor([-1.0])), "none below 0"),
            (lambda: maps.LowRank(draws(3, 2), draws(4, 3)), "expected (d_target, rank)"),
            (lambda: maps.LowRank(draws(3, 2), draws(2, 4), skip=1.0), "keeps 1 of h"),
            (lambda: maps.LowRank(draws(3, 2), draws(2, 4))(draws(3)), "4 wide, but got 3"),
            (lambda: maps.PerDirection(torch.ones(2), torch.ones(2, 4)), "not orthonormal"),
            (lambda: maps.PerDirection(torch.ones(2))(draws(3)), "2 wide, but got 3"),
            (lambda: maps.Mean(torch.tensor([torch.nan])), "not finite"),
            (lambda: maps.Mean.of(torch.zeros(0, 3)), "no vectors"),
        ],
    )
    def test_what_cannot_be_is_told(self, make, words: str) -> None:
        with pytest.raises(VectorError) as caught:
            make()
        assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------------------ files

ONE_OF_EACH = [
    maps.Identity(),
    maps.Scale(0.5),
    maps.Zero(),
    maps.Zero(9),
    maps.Noise(0.25, 7),
    maps.Mean(draws(4)),
    maps.NormMatch(draws(5).abs(), before=maps.Affine(draws(4, 4))),
    maps.Affine(draws(3, 4), draws(3, seed=1), name="mine"),
    maps.LowRank(draws(4, 2), draws(2, 4), draws(4), 1.0),
    maps.PerDirection(draws(4), None, draws(4, seed=1)),
    maps.PerDirection(draws(2), torch.eye(4)[:2]),
    maps.ByLayer(
        {(0, 2): maps.Affine(draws(3, 4)), (1, 2): maps.Scale(2.0), (10, 2): maps.LowRank(draws(4, 2), draws(2, 4))}, "all"
    ),
]


@pytest.mark.parametrize("f", ONE_OF_EACH, ids=lambda f: f"{type(f).__name__} {f.name}")
def test_saved_maps_are_the_same(f, tmp_path: Path) -> None:
    maps.save_map(tmp_path / "f.safetensors", f, {"by": "me"})
    found = maps.load_map(tmp_path / "f.safetensors")
    assert type(found) is type(f) and found.name == f.name and maps.digest_of(found) == maps.digest_of(f)
    assert maps.provenance_of(tmp_path / "f.safetensors") == {"by": "me"}
    assert isinstance(found, maps.Map) and isinstance(found, maps.LayeredMap) == isinstance(f, (maps.ByLayer, maps.NormMatch))


def test_digests_tell_maps_apart() -> None:
    digests = [maps.digest_of(f) for f in ONE_OF_EACH]
    assert len(set(digests)) == len(digests)
    one = maps.ByLayer({(0, 1): maps.Affine(draws(2, 2))})
    assert maps.digest_of(one) != maps.digest_of(maps.ByLayer({(0, 1): maps.Affine(draws(2, 2, seed=5))}))
    assert maps.digest_of(one) != maps.digest_of(maps.ByLayer({(0, 2): maps.Affine(draws(2, 2))}))


def test_files_that_hold_no_map_are_told(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    for tensors, about, words in (
        ({"up": draws(3, 2)}, {"kind": "low_rank", "name": "x"}, "expected up, down, [bias]"),
        ({"weight": draws(3)}, {"kind": "affine"}, "expected weight (d_target, d_source)"),
        ({"weight": draws(3, 2), "bias": draws(2)}, {"kind": "affine"}, "expected weight (d_target, d_source)"),
        ({"mean": draws(3)}, {"kind": "teleport"}, "kind 'teleport'"),
        ({"mean": draws(3)}, {"kind": "scale"}, "its metadata lacks something"),
        ({"mean": draws(3)}, {"kind": "by_layer", "maps": [{}]}, "its metadata lacks something"),
        ({"mean": draws(3)}, [1], "header is [1]; expected a JSON object"),
    ):
        save_file(tensors, path, {"map": json.dumps(about)})
        with pytest.raises(InputError) as caught:
            maps.load_map(path)
        assert words in str(caught.value)

    class Mine:
        name = "mine"

        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            return h

    with pytest.raises(InputError, match="is a Mine, which cannot be written down"):
        maps.save_map(path, Mine())


# -------------------------------------------------------------------------------------------------------------------------- in scopes


def test_a_scope_takes_the_map_of_its_layers() -> None:
    model = loaded("llama")
    f = maps.ByLayer(
        {(1, 2): maps.Scale(2.0), (1, 4): maps.Affine(draws(WIDTH, WIDTH)), (3, 2): maps.Zero(), (3, 4): maps.Identity()}, "mine"
    )
    source = ps.Source(model, ["the hill of x", "the sea"], layer=[1, 3])
    together = ps.Patchscope("a {x} b", layer=[2, 4], map=f, max_new_tokens=2)(source, keep_logits=True)
    assert set(together.table["map"]) == {"mine"} and together.logits is not None
    for (layer, to), one in f.maps.items():
        alone = ps.Patchscope("a {x} b", layer=to, map=one, max_new_tokens=2)(
            ps.Source(model, ["the hill of x", "the sea"], layer=layer), keep_logits=True
        )
        mine = [
            i
            for i, row in enumerate(together.table.iter_rows(named=True))
            if (row["source_layer"], row["target_layer"], row["control"]) == (layer, to, "none")
        ]
        own = [i for i, row in enumerate(alone.table.iter_rows(named=True)) if row["control"] == "none"]
        assert alone.logits is not None and torch.allclose(together.logits[mine], alone.logits[own], atol=1e-5)
        columns = ["text", "bits_over_others", "bits_over_nothing", "p_value", "verdict"]
        both = together.table[mine].select(columns), alone.table[own].select(columns)
        assert both[0].select("text", "verdict").equals(both[1].select("text", "verdict"))
        assert both[0]["bits_over_others"].to_list() == pytest.approx(both[1]["bits_over_others"].to_list(), abs=1e-3)


def test_layers_and_widths_that_a_map_lacks_are_told_before_anything_runs() -> None:
    model = loaded("llama")
    source = ps.Source(model, "the hill", layer=[1, 2])
    f = maps.ByLayer({(1, 4): maps.Identity()}, "fitted")
    with pytest.raises(LayerError, match=r"'fitted' has none from layer 2 to 4; it has 1→4"):
        ps.Patchscope("a {x}", layer=4, map=f)(source)
    with pytest.raises(VectorError, match="makes vectors 7 wide"):
        ps.Patchscope("a {x}", layer=4, map=maps.ByLayer({(1, 4): maps.Identity(), (2, 4): maps.Zero(7)}))(source)
    with pytest.raises(VectorError, match="takes vectors 3 wide, but got 64"):
        ps.Patchscope("a {x}", layer=4, map=maps.Affine(draws(WIDTH, 3)))(source)


# ------------------------------------------------------------------------------------------------------------------------ least squares


def correlated(n: int, d: int, seed: int) -> torch.Tensor:
    """Rows far from 0 whose directions differ a hundredfold, as those of residual streams do."""
    return draws(n, d, seed=seed) @ (draws(d, d, seed=seed + 1) * torch.logspace(0, -2, d)) + 50


def in_chunks(x: torch.Tensor, y: torch.Tensor, sizes: tuple[int, ...]) -> maps.Moments:
    moments, start = maps.Moments(), 0
    for size in sizes:
        moments.add(x[start : start + size], y[start : start + size])
        start += size
    assert start == len(x)
    return moments


X, Y = correlated(90, 8, 0), correlated(90, 5, 7) + correlated(90, 8, 0) @ draws(8, 5, seed=9)


def ridge_by_numpy(x: torch.Tensor, y: torch.Tensor, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """As an augmented design handed to lstsq, all at once."""
    a, b = x.double().numpy(), y.double().numpy()
    centred, off = a - a.mean(0), b - b.mean(0)
    lam = ridge * (centred**2).sum() / a.shape[1]
    design = np.vstack([centred, np.sqrt(lam) * np.eye(a.shape[1])])
    w = np.linalg.lstsq(design, np.vstack([off, np.zeros((a.shape[1], b.shape[1]))]), rcond=None)[0].T
    return w, b.mean(0) - w @ a.mean(0)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("sizes", [(90,), (1, 2, 87), (30, 30, 30), (0, 89, 1)])
def test_streaming_equals_all_at_once(sizes: tuple[int, ...], ridge: float) -> None:
    moments = in_chunks(X, Y, sizes)
    w, b = ridge_by_numpy(X, Y, ridge)
    found = moments.affine(ridge)
    assert np.abs(moments.weight(ridge).numpy() - w).max() < 1e-8 * np.abs(w).max()
    assert found.bias is not None and np.abs(found.bias.numpy() - b).max() < 1e-6 * np.abs(b).max()
    left = Y.double().numpy() - X.double().numpy() @ w.T - b
    assert moments.error(torch.from_numpy(w), torch.from_numpy(b)) == pytest.approx(float((left**2).sum()), rel=1e-6)
    assert moments.spread == pytest.approx(float(((Y.double() - Y.double().mean(0)) ** 2).sum()), rel=1e-10)


def test_the_floor_is_the_least_error_of_any_affine_map() -> None:
    moments = in_chunks(X, Y, (40, 50))
    w, b = ridge_by_numpy(X, Y, 0.0)
    least = float(((Y.double().numpy() - X.double().numpy() @ w.T - b) ** 2).sum())
    assert moments.floor() == pytest.approx(least, rel=1e-6)
    for seed in range(5):
        other = torch.from_numpy(w) + 0.01 * draws(5, 8, seed=seed).double()
        assert moments.error(other, moments.target.mean - other @ moments.source.mean) >= least


def test_directions_that_never_varied_get_no_weight() -> None:
    x = torch.cat([X, X[:, :2] @ draws(2, 3, seed=4), torch.full((90, 1), 3.0)], 1)  # rank 8 of 12
    moments = in_chunks(x, Y, (50, 40))
    found, condition = moments.affine(), moments.conditioning()
    least = maps.Moments()
    least.add(X, Y)
    assert (condition.rank, condition.width) == (8, 12) and "8 of 12 dimensions" in condition.note
    assert moments.floor() == pytest.approx(least.floor(), rel=1e-4)
    assert float(found.weight[:, -1].abs().max()) < 1e-4
    few = in_chunks(X[:6], Y[:6], (6,)).conditioning()
    assert "6 tokens for 8 dimensions" in few.note


def test_low_rank_is_reduced_rank_regression() -> None:
    moments = in_chunks(X, Y, (90,))
    w, _ = ridge_by_numpy(X, Y, 0.0)
    x = X.double().numpy() - X.double().numpy().mean(0)
    y = Y.double().numpy() - Y.double().numpy().mean(0)
    _, _, v = np.linalg.svd(x @ w.T, full_matrices=False)
    for rank in (1, 3, 5):
        want = v[:rank].T @ v[:rank] @ w
        f = moments.low_rank(rank)
        assert np.abs((f.up.double() @ f.down.double()).numpy() - want).max() < 1e-5
        found = Y.double() - f(X.double())
        assert float((found**2).sum()) == pytest.approx(float(((y - x @ want.T) ** 2).sum()), rel=1e-4)
    with pytest.raises(InputError, match="expected 1 to 5"):
        moments.low_rank(6)


def test_gains_by_direction_are_regressions_of_each_coordinate() -> None:
    x, y = correlated(60, 6, 3), correlated(60, 6, 5) + 2 * correlated(60, 6, 3)
    f = in_chunks(x, y, (30, 30)).per_direction()
    for k in range(6):
        slope, shift = np.polyfit(x[:, k].double().numpy(), y[:, k].double().numpy(), 1)
        assert float(f.gains[k]) == pytest.approx(slope, rel=1e-4)
        assert f.bias is not None and float(f.bias[k]) == pytest.approx(shift, rel=1e-3)
    with pytest.raises(VectorError, match="one width"):
        in_chunks(X, Y, (90,)).per_direction()


def test_vectors_that_do_not_fit_are_told() -> None:
    moments = maps.Moments()
    with pytest.raises(InputError, match="at least two"):
        moments.affine()
    moments.add(X, Y)
    for x, y, words in ((X[:, :3], Y, "3 wide"), (X[:5], Y, "5 sources"), (X * torch.nan, Y, "not finite")):
        with pytest.raises(VectorError, match=words):
            moments.add(x, y)


# ------------------------------------------------------------------------------------------------------------------------------ fitting


def word_tokenizer(words: set[str]) -> PreTrainedTokenizerFast:
    """Whole words with their space in front, where the other tokenizer of these tests has single characters."""
    pieces = sorted({p for w in words for p in (w, " " + w)})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, **{p: i + 2 for i, p in enumerate(pieces)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="module")
def wider() -> Model:
    tokenizer = word_tokenizer({w for text in TEXTS for w in text.split()})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=80, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=20
    )
    return ps.load((LlamaForCausalLM(config).eval(), tokenizer))


def test_tokens_that_end_at_the_same_character_are_compared(wider: Model) -> None:
    small = loaded("llama")
    text = "a the hill of x y z"
    pairs = aligned(small.tokens(text), wider.tokens(text))
    characters, words = small.tokens(text), wider.tokens(text)
    assert [words.strings[j] for _, j in pairs] == [" the", " hill", " of", " x", " y", " z"]  # the first word is left out
    assert all(characters.upto(i) == words.upto(j) for i, j in pairs)


def test_one_pass_serves_all_pairs_and_equals_a_fit_from_everything_in_memory() -> None:
    model = loaded("llama")
    fitted = maps.fit(model, TEXTS, [(1, 3), (1, -1), (4, 0)], ridge=0.01, held_out=0.25, seed=3)
    for_fit, away = split(TEXTS, 0.25, 3)
    assert not set(for_fit) & set(away) and sorted(for_fit + away) == sorted(TEXTS)

    def stacked(texts: list[str], layer: int) -> torch.Tensor:
        rows = []
        for text in texts:
            rows.append(model.run(text, read=f"resid.{layer}")[f"resid.{layer}"][0, 1:])  # without BOS
        return torch.cat(rows)

    for (s, t), report in zip([(1, 3), (1, 5), (4, 0)], fitted.reports, strict=True):
        x, y, x2, y2 = (stacked(texts, layer) for texts, layer in ((for_fit, s), (for_fit, t), (away, s), (away, t)))
        w, b = ridge_by_numpy(x, y, 0.01)
        f = fitted[s, t]
        assert isinstance(f, maps.Affine) and np.abs(f.weight.double().numpy() - w).max() < 1e-3 * np.abs(w).max()
        left = y2.double().numpy() - x2.double().numpy() @ w.T - b
        spread = float(((y2.double() - y2.double().mean(0)) ** 2).sum())
        assert report.error == pytest.approx(float((left**2).sum()) / spread, rel=1e-3)
        assert report.cosine == pytest.approx(float(torch.cosine_similarity(f(x2), y2).mean()), abs=1e-4)
        assert report.identity == pytest.approx(float(((y2 - x2).double() ** 2).sum()) / spread, rel=1e-3)
        assert report.mean == pytest.approx(float(((y2 - y.mean(0)).double() ** 2).sum()) / spread, rel=1e-3)
        assert (report.n_fitted, report.n) == (len(x), len(x2)) and report.floor <= report.error + 1e-9


def test_states_ahead_are_those_of_later_tokens_of_the_same_text(wider: Model) -> None:
    model = loaded("llama")
    fitted = maps.fit(model, TEXTS, [(2, 5)], ridge=0.01, held_out=0.25, seed=3, ahead=2)
    for_fit, away = split(TEXTS, 0.25, 3)

    def stacked(texts: list[str], layer: int, some: slice) -> torch.Tensor:
        return torch.cat([model.run(text, read=f"resid.{layer}")[f"resid.{layer}"][0, 1:][some] for text in texts])

    x, y = stacked(for_fit, 2, slice(None, -2)), stacked(for_fit, 5, slice(2, None))
    w, b = ridge_by_numpy(x, y, 0.01)
    f = fitted[2, 5]
    assert isinstance(f, maps.Affine) and np.abs(f.weight.double().numpy() - w).max() < 1e-3 * np.abs(w).max()
    assert f.bias is not None and np.abs(f.bias.double().numpy() - b).max() < 1e-3 * np.abs(b).max()
    x, y = stacked(away, 2, slice(None, -2)), stacked(away, 5, slice(2, None))
    error = float((y - f(x)).double().square().sum() / (y.double() - y.double().mean(0)).square().sum())
    assert fitted.reports[0].error == pytest.approx(error, rel=1e-3) and fitted.reports[0].n == len(x)
    assert maps.evaluate(f, model, away, [(2, 5)], ahead=2)[0].error == pytest.approx(error, rel=1e-3)
    assert fitted.provenance["ahead"] == 2

    (text,) = states(model, wider, [(1, 1)], "resid", ahead=2).texts(["a the hill of x y z"], None, 0)
    heard = [(text.source.upto(i).split()[-1], text.target.strings[j].strip()) for i, j in text.positions]
    assert heard == [("the", "of"), ("hill", "x"), ("of", "y"), ("x", "z")]  # two tokens of the target ahead
    with pytest.raises(InputError, match="with 9 more behind them"):
        maps.fit(wider, ["hill of sea", "sea of hill"], [(1, 2)], ahead=9)


def test_a_planted_linear_relation_is_recovered_across_widths_and_tokenizers(wider: Model) -> None:
    """The wider model's embeddings are set to an affine function of what the small one has at the end of each word (which, at layer 0 of
    a model of single characters, is that of the word's last letter)."""
    small = loaded("llama")
    planted, shift = 0.1 * draws(80, WIDTH, seed=1), draws(80, seed=2)
    letters = small.hf.get_input_embeddings().weight  # type: ignore[operator]
    with torch.no_grad():
        for i in range(len(wider.tokenizer)):
            word = wider.decode([i])
            last = small.tokens(word).ids[-1] if word.strip() else 0
            wider.hf.get_input_embeddings().weight[i] = planted @ letters[last] + shift  # type: ignore[operator]
    fitted = maps.fit(small, TEXTS, [(0, 0)], target=wider, ridge=0.0, held_out=0.3)
    (report,) = fitted.reports
    assert report.error < 1e-6 and report.cosine > 0.99999 and report.identity is None
    tokens = fitted.provenance["tokens"]
    assert tokens["target"] > tokens["matched"] == tokens["used"] > 0.5 * tokens["target"]
    x = small.run("of some hill", read="resid.0").at("resid.0", position=-1)
    assert torch.allclose(fitted[0, 0](x), planted @ x + shift, atol=1e-3)
    said = ps.Patchscope("the {x} of", layer=0, map=fitted.map, model=wider, max_new_tokens=1)(
        ps.Source(small, "of some hill", layer=0)
    )
    assert said.table.height > 1


def test_fits_are_saved_with_what_they_come_from(tmp_path: Path) -> None:
    model = loaded("llama")
    again = [maps.fit(model, TEXTS, [(2, 4)], kind="low_rank", rank=3, positions=4, seed=1) for _ in range(2)]
    assert maps.digest_of(again[0].map) == maps.digest_of(again[1].map)
    again[0].save(tmp_path / "f.safetensors")
    found = maps.load_map(tmp_path / "f.safetensors")
    assert maps.digest_of(found) == maps.digest_of(again[0].map)
    about = maps.provenance_of(tmp_path / "f.safetensors")
    assert about["source_model"]["weight_hash"] == model.weight_hash and about["kind"] == "low_rank" and about["seed"] == 1
    assert about["reports"][0]["error"] == again[0].reports[0].error and about["tokens"]["used"] < about["tokens"]["matched"]
    assert again[0].table.height == 1
    (fresh,) = maps.evaluate(found, model, split(TEXTS, 0.2, 1)[1], [(2, 4)])
    assert fresh.floor <= fresh.error and fresh.n > 0


@pytest.mark.parametrize("kind", ["affine", "low_rank", "per_direction", "mean"])
def test_the_floor_is_never_above_the_error(kind) -> None:
    reports = maps.fit(loaded("gpt2"), TEXTS, "last", kind=kind, rank=4 if kind == "low_rank" else None, seed=2).reports
    assert len(reports) == 5 and all(0 <= r.floor <= r.error + 1e-9 and r.mean is not None and r.mean > 0.99 for r in reports)
    if kind == "mean":
        assert all(r.error == pytest.approx(r.mean) for r in reports)
    if kind == "affine":
        assert all(r.error < 1 and r.ridge is not None and r.condition is not None and r.rank == WIDTH for r in reports[1:])


def test_one_layer_into_itself_is_the_identity() -> None:
    (report,) = maps.fit(loaded("llama"), TEXTS, [(2, 2)], ridge=0.0).reports
    assert report.error < 1e-6 and report.identity == 0 and report.floor < 1e-6


@pytest.mark.parametrize("kind", ["affine", "low_rank", "per_direction"])
def test_the_ridge_is_the_best_of_its_kind_from_half_to_half(kind) -> None:
    """By fits of each half, applied to the other, vector by vector."""
    x, y = correlated(40, 8, 3), correlated(40, 8, 5) + 0.5 * correlated(40, 8, 3)
    halves = [(x[:20], y[:20]), (x[20:], y[20:])]
    moments = [in_chunks(a, b, (20,)) for a, b in halves]
    rank = 2 if kind == "low_rank" else None

    def error(ridge: float) -> float:
        total = 0.0
        for one, (a, b) in zip(moments, halves[::-1], strict=True):
            f = one.low_rank(2, ridge) if kind == "low_rank" else getattr(one, kind)(ridge)
            total += float((f(a) - b).double().square().sum())
        return total

    errors = {ridge: error(ridge) for ridge in RIDGES}
    assert len({round(e, 6) for e in errors.values()}) == len(RIDGES)
    assert _best_ridge(*moments, kind, rank) == min(errors, key=lambda ridge: errors[ridge])
    for ridge in RIDGES:
        both = _across(moments[0], moments[1], kind, rank, ridge) + _across(moments[1], moments[0], kind, rank, ridge)
        assert both == pytest.approx(errors[ridge], rel=1e-4)


def test_equal_texts_stand_in_one_half() -> None:
    model = loaded("llama")
    where = states(model, None, [(1, 2)], "resid")
    first, second = _halves(where.texts([*TEXTS[:5], *TEXTS[:5]], None, 0))
    assert {one.source.text for one in first} | {one.source.text for one in second} == set(TEXTS[:5])
    assert not {one.source.text for one in first} & {one.source.text for one in second} and len(first) + len(second) == 10
    assert maps.fit(model, [*TEXTS[:1] * 4, TEXTS[1]], [(1, 2)]).reports[0].ridge == 1e-3  # no two halves to choose from


@pytest.mark.parametrize(
    ("layers", "more", "error", "words"),
    [
        ([(1, 9)], {}, LayerError, "9"),
        ("some", {}, LayerError, "'same', 'last', 'all'"),
        ([], {}, LayerError, "at least one pair"),
        ("last", {"ridge": -1.0}, InputError, "at least 0"),
        ("last", {"ahead": -1}, InputError, "ahead is -1"),
        ("last", {"kind": "low_rank"}, InputError, "a rank belongs"),
        ("last", {"held_out": 1.0}, InputError, "between 0 and 1"),
        ("last", {"site": "logits"}, InputError, "not at 'logits'"),
    ],
)
def test_what_cannot_be_fitted_is_told(layers, more: dict, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        maps.fit(loaded("llama"), TEXTS, layers, **more)
    assert words in str(caught.value)


def test_words_that_are_no_settings_are_told() -> None:
    """As `fit` sees them where types are not checked."""
    with pytest.raises(UnknownName, match="unknown kind of map 'afine'"):
        _require("afine", None, "auto")
    for ridge in ("big", None, float("nan")):
        with pytest.raises(InputError, match="expected 'auto' or a number of at least 0"):
            _require("affine", None, ridge)


def test_texts_that_say_nothing_are_told(wider: Model) -> None:
    model = loaded("llama")
    with pytest.raises(InputError, match="at least two, one of them"):
        maps.fit(model, ["the hill"] * 5)
    with pytest.raises(InputError, match="none of the 1 texts has a position"):
        maps.fit(wider, ["hill", "sea"])
    with pytest.raises(InputError, match="makes vectors 3 wide"):
        maps.evaluate(maps.Affine(draws(3, WIDTH)), model, TEXTS, [(1, 2)])
