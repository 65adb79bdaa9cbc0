"""Heat maps are files of the kind that was asked for, whatever stands in the grid; word maps fit their terminal."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from patchscopes.core.errors import InputError
from patchscopes.scopes import Grid
from patchscopes.views.heatmap import _scale, _step, heatmap
from patchscopes.views.word_map import WordMap

BEGINS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def grid(values, *, metric: str = "surprisal", text: str = " Paris") -> Grid:
    values = np.array(values, dtype=float)
    n_rows, n_columns = values.shape
    rows, columns = tuple(map(str, range(n_rows))), tuple(map(str, range(n_columns)))
    texts = tuple((text,) * n_columns for _ in rows)
    return Grid(values, rows, columns, "source layer ℓ", "target layer ℓ*", metric, "bits", texts)


@pytest.mark.parametrize("suffix", BEGINS)
def test_the_suffix_says_what_is_written(tmp_path, suffix):
    path = heatmap(grid([[1, 2], [3, np.nan]]), tmp_path / "new folder" / f"map{suffix}", title="what was read")
    assert path.read_bytes().startswith(BEGINS[suffix])


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"'\.gif'.*\.png, \.svg, \.pdf"):
        heatmap(grid([[1]]), tmp_path / "map.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values", [[[1.0]], [[np.nan]], [[0.0, 0.0]], [[np.inf, -1.0]], [[0.0, 1.0]] * 81], ids=lambda v: str(v)[:20]
)
@pytest.mark.parametrize("metric", ["surprisal", "bits_over_others"])
def test_any_grid_can_be_drawn(tmp_path, values, metric):
    assert heatmap(grid(values, metric=metric), tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("shape", [(33, 33), (3, 12_000)], ids=["many layers", "long prompt"])
def test_a_big_grid_can_be_drawn(tmp_path, shape):
    assert heatmap(grid(np.zeros(shape)), tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("text", ["$x^2", "京都 🙂", "a\nb\tc", "", "<b>&", "\u200e\u202eabc", r"\frac{"])
def test_what_a_model_says_is_not_interpreted(tmp_path, text):
    svg = heatmap(grid([[1, 2]], text=text), tmp_path / "map.svg", title=text).read_text(encoding="utf-8")
    assert "</svg>" in svg


def test_the_words_and_names_stand_in_the_picture(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    svg = heatmap(grid([[1, np.nan]]), tmp_path / "map.svg", title="read through T").read_text(encoding="utf-8")
    for words in ("source layer ℓ", "target layer ℓ*", "surprisal (bits)", "read through T"):
        assert words in svg
    assert svg.count(">Paris<") == 1  # none in the cell without a reading
    assert "<pattern" in svg  # which is hatched


def test_words_are_left_out_where_cells_are_small(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    assert "Paris" not in heatmap(grid(np.zeros((81, 81))), tmp_path / "map.svg").read_text(encoding="utf-8")


def test_only_signed_metrics_are_centred_on_zero():
    norm, colours = _scale(grid([[-1, 4]], metric="bits_over_text"))
    assert (norm.vmin, norm.vmax, colours) == (-4, 4, "PuOr_r")
    norm, colours = _scale(grid([[-1, 4]], metric="logprob"))
    assert (norm.vmin, norm.vmax, colours) == (-1, 4, "viridis")


@pytest.mark.parametrize(("count", "size", "step"), [(9, 0.4, 1), (400, 0.05, 5), (2000, 0.001, 200), (2000, 0.00001, 2000)])
def test_labels_keep_a_distance(count, size, step):
    assert _step(count, size) == step


def printed(some: Grid, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(WordMap(some))
    return captured.get()


def test_a_word_map_has_every_cell_with_the_deepest_layer_on_top():
    lines = printed(grid([[1, np.nan], [3, 4]]), 80).splitlines()
    assert [line.split() for line in lines[1:]] == [["1", "│", "Paris", "Paris"], ["0", "│", "Paris", "·"], ["└", "0", "1"]]


@pytest.mark.parametrize("width", [80, 120])
def test_a_word_map_keeps_within_its_terminal(width):
    lines = printed(grid(np.zeros((9, 9)), text=" The capital of France"), width).splitlines()
    assert max(map(len, lines)) <= width
    assert "The" in lines[1]


def test_a_word_map_that_does_not_fit_says_so():
    assert "--figure" in printed(grid(np.zeros((2, 81))), 80)
