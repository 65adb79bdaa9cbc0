"""A metric by layer, for more prompts than can be looked at one by one: the mean over prompts with the 95 % interval of a bootstrap over
prompts, and below it the share of readings that are above their controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.views.heatmap import require_suffix

if TYPE_CHECKING:
    import numpy as np

RESAMPLES, SEED, AT_ONCE = 2000, 0, 100
MARKERS = "o^sDvPX*"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")  # Okabe and Ito


@dataclass(frozen=True, eq=False)
class Line:
    """values and above are [prompt, layer]: a prompt's mean, and the share of its readings above their controls; NaN where it has none."""

    name: str
    layers: list[int]
    values: np.ndarray
    above: np.ndarray


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over prompts of [prompt, layer], and its 2.5th and 97.5th percentile over resampled prompts; NaN where no prompt has a value."""
    import numpy as np

    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)
    rng = np.random.default_rng(SEED)
    n = len(values)
    means = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, RESAMPLES, AT_ONCE):
            weights = rng.multinomial(n, np.full(n, 1 / n), size=min(AT_ONCE, RESAMPLES - start)).astype(float)
            means.append((weights @ filled) / (weights @ there))
        mean = filled.sum(0) / there.sum(0)
    resampled = np.concatenate(means)
    low, high = np.full(len(mean), np.nan), np.full(len(mean), np.nan)
    for k in np.flatnonzero(there.any(0)):
        low[k], high[k] = np.nanpercentile(resampled[:, k], [2.5, 97.5])
    return mean, low, high


def lines(some: list[Line], path: str | Path, *, label: str, title: str = "") -> Path:
    """Draw them into `path`, a PNG, SVG or PDF by its suffix (else InputError); the path. label: the metric with its units."""
    require_suffix(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    judged = any((line.above == line.above).any() for line in some)
    figure = Figure(figsize=(7.6, 6.2 if judged else 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if judged else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if judged else [1])[:, 0]
    for k, line in enumerate(some):
        aside = 0.0 if len(some) < 3 else 0.06 * (k - (len(some) - 1) / 2)  # layers, so that intervals stand beside each other
        _draw(panels[0], line, line.values, k, aside)
        if judged:
            _draw(panels[1], line, line.above, k, aside)
    panels[0].set_ylabel(label)
    if judged:
        panels[1].set_ylabel("share above controls")
        panels[1].set_ylim(-0.03, 1.03)
        panels[1].axhline(0.05, color="0.5", linewidth=0.8, linestyle=":")
        panels[1].annotate(
            "by chance at most", (1, 0.05), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="0.35"
        )
    panels[-1].set_xlabel("source layer ℓ")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.92")
        panel.set_axisbelow(True)
    if len(some) > 1 or some[0].name:
        panels[0].legend(frameon=False, fontsize=8)
    _title(panels[0], title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw(panel: Any, line: Line, values: np.ndarray, k: int, aside: float) -> None:
    import numpy as np

    mean, low, high = interval(values)
    prompts = values.shape[0]
    name = f"{line.name} ({prompts:,} prompt{'s' * (prompts != 1)})" if line.name else f"{prompts:,} prompts"
    colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
    label = name.replace("$", r"\$")  # no formula
    at = np.array(line.layers) + aside
    panel.plot(at, mean, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=label)
    if prompts > 1 and aside == 0:
        panel.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    elif prompts > 1:
        panel.vlines(at, low, high, color=colour, alpha=0.5, linewidth=1.6)


def _title(panel: Any, title: str) -> None:
    from patchscopes.views.heatmap import _wrapped

    if title:
        panel.set_title(_wrapped(title, 7.6), fontsize=9, loc="left", parse_math=False)
