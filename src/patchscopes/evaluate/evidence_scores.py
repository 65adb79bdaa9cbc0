"""Evidence as an estimator and as a classifier of true readings: pure functions of readings that were weighed.

    classifier   AUROC of each score, true against false readings, and the difference to the log-probability and to the agreement of draws
    confidence   the score turned into a probability on one half of the entities, scored on the other: ECE, Brier, NLL, risk–coverage
    attribution  whose knowledge is a reading, where M1 (read) and M2 (speaks) believe different things: the state's if the text is likelier
                 under it than after the source's own words (bits_over_text > 0), else M2's own
    null         texts that were said for another vector, weighed as if they were the item's own: p must be uniform, few may be "above"
    estimator    bits over n others, leave-one-out: b = log2 p(v′) − log2 mean p(others); with v′ among the terms of the mean (InfoNCE):
                 c = log2 (n + 1) − log2 (1 + n 2^−b) ≤ log2 (n + 1). Mean and spread over resampled others, and over looks

Intervals resample entities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchscopes.controls.evidence import SIGNIFICANT
from patchscopes.controls.texts import conflict
from patchscopes.evaluate import statistics
from patchscopes.evaluate.calibration import Bin, Calibration, calibrated, equal_mass
from patchscopes.evaluate.ranking import auroc, auroc_difference, auroc_of
from patchscopes.evaluate.recalibration import Fitted, cross_fitted, isotonic, platt
from patchscopes.evaluate.statistics import Estimate
from patchscopes.evaluate.uniformity import Uniformity, uniformity

ALL = "all pairs"
EXPLAINED, AGREEMENT, LOG_P = "explained", "agreement of draws", "log p of the text"
EVIDENCE = {  # score: column of a table of readings, sign
    EXPLAINED: ("explained", 1),
    "bits over others": ("bits_over_others", 1),
    "bits over random": ("bits_over_random", 1),
    "bits over nothing": ("bits_over_nothing", 1),
    "bits over text": ("bits_over_text", 1),
    "p-value": ("p_value", -1),
    "log p of the next token": ("logprob", 1),
}
SCORES = (*EVIDENCE, LOG_P, AGREEMENT)
RIVALS = (LOG_P, "log p of the next token", AGREEMENT)
TOLD = 20  # false readings that are shown
RESAMPLES = 50  # of the others of a reading


@dataclass(frozen=True)
class Weighed:
    """A reading. true: names the fact of the model that was read; prior: what the model that speaks answers by itself, None where it is
    the one that was read; scores: by `SCORES`, the higher the surer."""

    pair: str
    relation: str
    entity: str
    layer: int
    text: str
    answers: tuple[str, ...]
    prior: str | None
    true: bool
    above: bool
    scores: Mapping[str, float]

    @property
    def whose(self) -> str:
        """Whose answer it gives (see `controls.texts.conflict`); "agree" where M1 and M2 are one or believe the same."""
        return "agree" if not self.prior else conflict(self.text, self.answers, self.prior)


def complete(readings: Sequence[Weighed]) -> list[Weighed]:
    """Those that have every score: all scores are compared on the same readings."""
    return [one for one in readings if not any(math.isnan(one.scores[name]) for name in SCORES)]


def by_pair(readings: Sequence[Weighed]) -> dict[str, list[Weighed]]:
    """All together, then each pair, if there are several."""
    pairs = dict.fromkeys(one.pair for one in readings)
    each = {pair: [one for one in readings if one.pair == pair] for pair in pairs}
    return each if len(each) == 1 else {ALL: list(readings), **each}


# ----------------------------------------------------------------------------------------------------------------------- classifier


@dataclass(frozen=True)
class Classified:
    """Readings, the share of them that is true, AUROC of each score, and by how much that of `explained` is above each of `RIVALS`."""

    n: int
    true: Estimate
    above: Estimate
    above_if_false: Estimate
    auroc: dict[str, Estimate]
    over: dict[str, Estimate]


def classified(readings: Sequence[Weighed], *, seed: int = 0) -> Classified:
    """Of readings with every score."""
    y, clusters, s = _truth(readings), [one.entity for one in readings], _scores(readings)
    false = [one for one in readings if not one.true]
    return Classified(
        len(readings),
        statistics.rate(y, clusters, seed=seed),
        statistics.rate([float(one.above) for one in readings], clusters, seed=seed),
        statistics.rate([float(one.above) for one in false], [one.entity for one in false], seed=seed),
        {name: auroc_of(s[name], y, clusters, seed=seed) for name in SCORES},
        {name: auroc_difference(s[EXPLAINED], s[name], y, clusters, seed=seed) for name in RIVALS},
    )


def by_layer(readings: Sequence[Weighed], names: Sequence[str], *, seed: int = 0) -> dict[str, dict[int, Estimate]]:
    """AUROC of some scores at each source layer."""
    found: dict[str, dict[int, Estimate]] = {name: {} for name in names}
    for layer in sorted({one.layer for one in readings}):
        some = [one for one in readings if one.layer == layer]
        y, clusters, s = _truth(some), [one.entity for one in some], _scores(some)
        for name in names:
            found[name][layer] = auroc_of(s[name], y, clusters, seed=seed)
    return found


def falsehoods(readings: Sequence[Weighed]) -> list[Weighed]:
    """False readings of which the most is explained: consistent, and wrong."""
    return sorted((one for one in readings if not one.true), key=lambda one: -one.scores[EXPLAINED])[:TOLD]


# ----------------------------------------------------------------------------------------------------------------------- confidence


@dataclass(frozen=True)
class Confidence:
    """A confidence in [0, 1], and its reliability diagram in bins of as many rows each."""

    name: str
    figures: Calibration
    bins: tuple[Bin, ...]


def confidences(readings: Sequence[Weighed], *, seed: int = 0) -> list[Confidence]:
    """Evidence, agreement and log p as probabilities of being true, fitted on the other half of the entities; and agreement as it is.
    None where a half has no true or no false readings."""
    y, clusters, s = _truth(readings), [one.entity for one in readings], _scores(readings)
    first = np.array([statistics.in_first_half(one, seed) for one in clusters], bool)
    if any(len(set(y[half])) < 2 for half in (first, ~first)):
        return []
    fits: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], Fitted]]] = {
        "explained, Platt": (EXPLAINED, platt),
        "explained, isotonic": (EXPLAINED, isotonic),
        "bits over others, isotonic": ("bits over others", isotonic),
        "log p of the text, isotonic": (LOG_P, isotonic),
        "agreement, isotonic": (AGREEMENT, isotonic),
    }
    given = {name: cross_fitted(s[score], y, clusters, fit, seed=seed) for name, (score, fit) in fits.items()}
    given["agreement as it is"] = s[AGREEMENT]
    return [Confidence(name, calibrated(c, y, clusters, seed=seed), equal_mass(c, y)) for name, c in given.items()]


# ---------------------------------------------------------------------------------------------------------------------- attribution


@dataclass(frozen=True)
class Attributed:
    """Readings of items on which M1 and M2 disagree: in_conflict of them, so many give M1's answer or M2's own. right: of these, those
    that the sign of bits_over_text gives to the right one; and of either kind alone."""

    in_conflict: int
    of_target: Estimate
    of_speaker: Estimate
    right: Estimate
    right_if_target: Estimate
    right_if_speaker: Estimate


def attributed(readings: Sequence[Weighed], *, seed: int = 0) -> Attributed | None:
    """None where M1 and M2 disagree on nothing."""
    some = [(one, one.whose) for one in readings if one.whose != "agree"]
    if not some:
        return None

    def rate(values: Sequence[bool], kinds: tuple[str, ...]) -> Estimate:
        rows = [(float(v), one.entity) for v, (one, whose) in zip(values, some, strict=True) if whose in kinds]
        return statistics.rate([v for v, _ in rows], [entity for _, entity in rows], seed=seed)

    everything = ("target", "verbalizer", "both", "neither")
    right = [(one.scores["bits over text"] > 0) == (whose == "target") for one, whose in some]
    return Attributed(
        len(some),
        rate([whose == "target" for _, whose in some], everything),
        rate([whose == "verbalizer" for _, whose in some], everything),
        rate(right, ("target", "verbalizer")),
        rate(right, ("target",)),
        rate(right, ("verbalizer",)),
    )


# ----------------------------------------------------------------------------------------------------------------------------- null


@dataclass(frozen=True)
class Null:
    """Texts of one kind of vector, weighed under the item's own second looks. above: the share that the verdict calls so; uniform: of the
    p-values, against n others."""

    kind: str
    above: Estimate
    uniform: Uniformity


def null(kind: str, p: Sequence[float], above: Sequence[bool], n: int, entities: Sequence[str], *, seed: int = 0) -> Null:
    """p: of every text, ranked among n others."""
    share = statistics.rate([float(one) for one in above], entities, seed=seed)
    return Null(kind, share, uniformity(p, n, entities, alpha=SIGNIFICANT, seed=seed))


# ------------------------------------------------------------------------------------------------------------------------ estimator


@dataclass(frozen=True, eq=False)
class Raw:
    """log2 p of each reading's text. own: [row, look]; others: [row, other] of its relation, pool: [row, other] of other matters, both
    behind the first look's prefix; alone[k]: [row, other] of its relation behind the prefix of look k. stranger, stranger_others,
    stranger_pool: the same of a text that another entity's state brought forth, under the item's first look."""

    true: np.ndarray
    entities: tuple[str, ...]
    own: np.ndarray
    others: np.ndarray
    pool: np.ndarray
    alone: tuple[np.ndarray, ...]
    stranger: np.ndarray
    stranger_others: np.ndarray
    stranger_pool: np.ndarray


def log2_mean(log2_p: np.ndarray) -> np.ndarray:
    """[…, term] → […]: log2 of the mean of p."""
    return np.logaddexp2.reduce(log2_p, axis=-1) - math.log2(log2_p.shape[-1])


def explained_of(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[row]: the share of the surprise of each text that its source accounts for; 0 where there is none."""
    surprise = -log2_mean(others)
    return np.where(surprise > 1e-9, 1 + own / np.where(surprise > 1e-9, surprise, 1), 0.0)


def of_looks(raw: Raw) -> list[dict[str, Any]]:
    """Each look by itself, with the others behind the same prefix; then the mean of the first m. spread: the standard deviation of the
    bits that is left between looks, over √m."""
    spread = float(raw.own.std(axis=1, ddof=1).mean()) if raw.own.shape[1] > 1 else math.nan
    rows: list[dict[str, Any]] = []
    for k in range(raw.own.shape[1]):
        rows.append({"looks": f"prefix {k + 1} alone", **_told(raw, raw.own[:, k], raw.alone[k]), "spread": spread})
    for m in range(2, raw.own.shape[1] + 1):
        own = raw.own[:, :m].mean(axis=1)
        rows.append({"looks": f"mean of {m}", **_told(raw, own, raw.others), "spread": spread / math.sqrt(m)})
    return rows


def of_number(raw: Raw, numbers: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """As of n others, drawn anew `RESAMPLES` times, with replacement, from all there are: mean over readings of the bits (leave-one-out and
    InfoNCE), the standard deviation over draws of others, the bound log2 (n + 1), and how well `explained` sorts true from false."""
    rng, own = np.random.default_rng(seed), raw.own.mean(axis=1)
    first = raw.own[:, 0]  # behind the others' own prefix: only so are they one among others, as InfoNCE wants them
    rows = []
    for n in (n for n in numbers if n <= raw.others.shape[1]):
        picked = rng.integers(raw.others.shape[1], size=(RESAMPLES, len(own), n))
        drawn = [np.take_along_axis(raw.others, some, axis=1) for some in picked]
        bits = np.stack([own - log2_mean(some) for some in drawn])
        bounded = np.stack([first - log2_mean(np.concatenate([some, first[:, None]], axis=1)) for some in drawn])
        ranked = [auroc(explained_of(own, some), raw.true) for some in drawn]
        rows.append(
            {
                "n": n,
                "leave_one_out": float(bits.mean()),
                "leave_one_out_if_true": _mean(bits[:, raw.true]),
                "infonce": float(bounded.mean()),
                "infonce_if_true": _mean(bounded[:, raw.true]),
                "bound": math.log2(n + 1),
                "spread": float(bits.std(axis=0).mean()),
                "infonce_spread": float(bounded.std(axis=0).mean()),
                "auroc": float(np.mean(ranked)),
                "auroc_spread": float(np.std(ranked)),
            }
        )
    return rows


def of_kind(raw: Raw, *, seed: int = 0) -> list[dict[str, Any]]:
    """Others of the reading's own relation beside as many of other matters: bits, AUROC, and how often a stranger's text has p ≤ 0.05."""
    n = min(raw.others.shape[1], raw.pool.shape[1])
    own = raw.own.mean(axis=1)
    rows = []
    kinds = {"of the relation": (raw.others, raw.stranger_others), "of other matters": (raw.pool, raw.stranger_pool)}
    for kind, (others, under_stranger) in kinds.items():
        others, under_stranger = others[:, :n], under_stranger[:, :n]
        p = (1 + (under_stranger >= raw.stranger[:, None]).sum(axis=1)) / (n + 1)
        false_alarms = statistics.rate((p <= SIGNIFICANT).astype(float), raw.entities, seed=seed)
        rows.append({"others": kind, "n": n, **_told(raw, own, others), "false_alarms": false_alarms})
    return rows


def _told(raw: Raw, own: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    bits, share = own - log2_mean(others), explained_of(own, others)
    return {
        "bits": float(bits.mean()),
        "bits_if_true": _mean(bits[raw.true]),
        "auroc_bits": auroc_of(bits, raw.true, raw.entities),
        "auroc_explained": auroc_of(share, raw.true, raw.entities),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _truth(readings: Sequence[Weighed]) -> np.ndarray:
    return np.array([one.true for one in readings], float)


def _scores(readings: Sequence[Weighed]) -> dict[str, np.ndarray]:
    return {name: np.array([one.scores[name] for one in readings], float) for name in SCORES}
