"""The figures of the privileged-information test: pure functions of what was read, said and asked.

For a pair (M1 is read, M2 speaks), items (facts that M1 knows) and source layers: does M2 say M1's fact out of the state, more often than
it does without one? Rates are means over relations (of statements and generic texts: over readings), intervals and tests resample or flip
entities, and p-values are adjusted (Holm) over all pairs and layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchscopes.controls.texts import answer_in_source, conflict, majority
from patchscopes.evaluate import statistics
from patchscopes.evaluate.answer_bits import AnswerBits
from patchscopes.evaluate.best_of import BestOf, best_of
from patchscopes.evaluate.data import Item
from patchscopes.evaluate.generic import Generic, generic
from patchscopes.evaluate.paired import Compared, compared, sign_flip
from patchscopes.evaluate.permutation import Permuted, paired
from patchscopes.evaluate.power import detectable_difference, effective_n
from patchscopes.evaluate.scoring import names
from patchscopes.evaluate.statements import Stated, stated
from patchscopes.evaluate.statistics import Estimate

if TYPE_CHECKING:
    from patchscopes.runs import Run

Told = Literal["more than the text", "of its source", "nothing", "not compared"]
EVIDENCE = ("bits_over_nothing", "bits_over_random", "bits_over_others", "bits_over_text", "explained")
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Seen:
    """What was read of items: texts[kind][item, layer] ("none" for the readings), evidence[column][item, layer], above[item, layer]."""

    items: tuple[Item, ...]
    layers: tuple[int, ...]
    texts: dict[str, np.ndarray]
    evidence: dict[str, np.ndarray]
    above: np.ndarray

    @property
    def groups(self) -> list[str]:
        """The relation of every item."""
        return [item.relation for item in self.items]

    @property
    def clusters(self) -> list[str]:
        """The entity of every item."""
        return [item.cluster for item in self.items]

    def hits(self, kind: str = "none") -> np.ndarray:
        """[item, layer]: whether the text names the item's answer, as whole words. NaN where there is none."""
        return hits_of(self.texts[kind], self.items)


@dataclass(frozen=True, eq=False)
class Baselines:
    """What needs no state of the item's own, or not through the scope. named: M2 asked in words; inverted[item, layer]: M2 asked about what
    was reconstructed; names_found[item, layer]: whether the reconstruction holds the subject's name; probe, probe_control: [item, layer]
    hits of a linear probe of M1's state, and of its control task. Absent: not run."""

    named: tuple[str, ...]
    bits: AnswerBits
    inverted: np.ndarray | None = None
    names_found: np.ndarray | None = None
    probe: np.ndarray | None = None
    probe_control: np.ndarray | None = None


@dataclass(frozen=True)
class Layer:
    """One source layer of a pair. over_text: readings against M2 asked in words. bits: of the answer, over each text and control.
    target, prior: readings that name M1's fact, and M2's own answer, where the two differ. told: what may be said of it, once p-values
    of all pairs and layers are adjusted; adjusted: of `bits`, by what they are over."""

    layer: int
    over_text: Compared
    bits: dict[str, Estimate]
    p: dict[str, float]
    controls: dict[str, Estimate]
    permuted: Permuted
    stated: Stated
    generic: Generic
    evidence: dict[str, Estimate]
    above: Estimate
    target: Estimate
    prior: Estimate
    detectable: float
    inverted: Estimate | None = None
    name_found: Estimate | None = None
    probe: Estimate | None = None
    probe_control: Estimate | None = None
    adjusted: dict[str, float] = field(default_factory=dict)
    told: Told = "nothing"


@dataclass(frozen=True)
class PairScores:
    """A pair. conflicts: items on which M1 and M2 disagree; majority: the rate of one constant answer a relation, that of other
    entities; leaked: items whose prompt says the answer; best: any layer beside as many looks at another entity's state; attributed: of
    readings in conflict that give one of the two answers, those that the sign of bits_over_text gives to the right one."""

    read: str
    speaks: str
    items: int
    entities: int
    conflicts: int
    leaked: int
    named: Estimate
    majority: Estimate
    best: BestOf | None
    attributed: Estimate
    layers: tuple[Layer, ...]


def seen(run: Run, items: Sequence[Item]) -> Seen:
    """The readings of a run whose parts are relations, prompts labelled with `at`. Items that were skipped are left out."""
    rows = run.table(status="ok").select("scope", "prompt_text", "at", "control", "source_layer", "text", "verdict", *EVIDENCE)
    said: dict[str, dict[tuple[str, str, str], dict[int, str]]] = {}
    numbers: dict[tuple[str, str, str], dict[int, tuple[Any, ...]]] = {}
    for target, prompt, at, kind, layer, text, verdict, *values in rows.iter_rows():
        key = (target, prompt, at)
        said.setdefault(kind, {}).setdefault(key, {})[layer] = text or ""
        if kind == "none":
            numbers.setdefault(key, {})[layer] = (verdict == "above", *values)
    kept = tuple(item for item in items if item.key in numbers)
    layers = tuple(sorted({layer for some in numbers.values() for layer in some}))
    shape = (len(kept), len(layers))
    texts = {
        kind: np.array([[of.get(item.key, {}).get(layer) for layer in layers] for item in kept], object).reshape(shape)
        for kind, of in said.items()
    }
    nothing = (None,) * (1 + len(EVIDENCE))
    cells = [[numbers[item.key].get(layer, nothing) for layer in layers] for item in kept]
    values = {
        name: np.array([[np.nan if cell[1 + k] is None else cell[1 + k] for cell in row] for row in cells], float).reshape(shape)
        for k, name in enumerate(EVIDENCE)
    }
    above = np.array([[np.nan if cell[0] is None else float(cell[0]) for cell in row] for row in cells], float).reshape(shape)
    return Seen(kept, layers, texts, values, above)


def hits_of(texts: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """[item, layer]: 1 where the text names the item's answer, 0 where it does not, NaN where there is no text."""
    rows = [
        [np.nan if text is None else float(names(text, item.answers)) for text in row]
        for row, item in zip(texts, items, strict=True)
    ]
    return np.array(rows, float).reshape(texts.shape)


def scores_of(
    read: str,
    speaks: str,
    found: Seen,
    base: Baselines,
    priors: Sequence[str | None],
    vocabulary: Mapping[str, Sequence[str]],
    *,
    seed: int,
) -> PairScores:
    """All figures of one pair, not yet adjusted. priors: M2's own answer to every item ("" where it has none, None where M2 is M1);
    vocabulary: all answers of the data."""
    own, groups, clusters = found.hits(), found.groups, found.clusters
    named = np.array([float(names(text, item.answers)) for text, item in zip(base.named, found.items, strict=True)])
    whose = _attributions(found, priors)
    layers = [
        _layer(k, layer, found, base, np.nan_to_num(own[:, k]), named, whose[:, k], vocabulary, seed)
        for k, layer in enumerate(found.layers)
    ]
    constant = majority([item.answers[0] for item in found.items], groups, clusters)
    right = [float(one is not None and names(one, item.answers)) for one, item in zip(constant, found.items, strict=True)]
    other = _strangers(found, seed)
    mean = lambda values: statistics.mean_of_rates(values, groups, clusters, seed=seed)
    return PairScores(
        read,
        speaks,
        len(found.items),
        len(set(clusters)),
        int((whose[:, 0] != "agree").sum()),
        sum(answer_in_source(item.answers, item.prompt) for item in found.items),
        mean(named),
        mean(right),
        None if np.isnan(other).any(axis=1).all() else best_of(np.nan_to_num(own), other, clusters, groups, seed=seed),
        _attributed(found, whose, seed),
        tuple(layers),
    )


def _attributions(found: Seen, priors: Sequence[str | None]) -> np.ndarray:
    """[item, layer]: whose answer each reading gives (see `controls.texts.conflict`)."""
    rows = [
        [_whose(text, item, prior) for text in row]
        for row, item, prior in zip(found.texts["none"], found.items, priors, strict=True)
    ]
    return np.array(rows, object).reshape(found.texts["none"].shape)


def _whose(text: str | None, item: Item, prior: str | None) -> str:
    if prior is None:
        return "agree"
    if text is None:
        return "neither"
    return conflict(text, item.answers, prior) if prior else "target" if names(text, item.answers) else "neither"


def _strangers(found: Seen, seed: int) -> np.ndarray:
    """[item, layer]: what was read out of another entity of the relation, held against the item's answer; NaN without such an entity."""
    partner = statistics.strangers(found.groups, [item.answers[0] for item in found.items], found.clusters, seed)
    crossed = np.full(found.texts["none"].shape, np.nan)
    for k, other in enumerate(partner):
        if other is not None:
            crossed[k] = [float(text is not None and names(text, found.items[k].answers)) for text in found.texts["none"][other]]
    return crossed


def _layer(
    k: int,
    layer: int,
    found: Seen,
    base: Baselines,
    own: np.ndarray,
    named: np.ndarray,
    whose: np.ndarray,
    vocabulary: Mapping[str, Sequence[str]],
    seed: int,
) -> Layer:
    groups, clusters, items = found.groups, found.clusters, found.items

    def mean(values: np.ndarray) -> Estimate:
        there = np.flatnonzero(~np.isnan(values)).tolist()
        return statistics.mean_of_rates(
            [values[i] for i in there], [groups[i] for i in there], [clusters[i] for i in there], seed=seed
        )

    bits = {name: base.bits.over(name)[:, k] for name in ("nothing", "others", "named", "source")}
    controls = {kind: mean(found.hits(kind)[:, k]) for kind in found.texts if kind != "none"}
    texts = ["" if text is None else text for text in found.texts["none"][:, k]]
    placeholder = found.texts.get("nothing")
    beside = None if placeholder is None else ["" if text is None else text for text in placeholder[:, k]]
    apart = whose != "agree"
    over = compared(own, named, clusters, groups, seed=seed)
    discordant = (over.table.only_first + over.table.only_second) / len(own)
    effective = max(1, int(effective_n(clusters, own - named)))
    rate = lambda values: mean(np.where(apart, values.astype(float), np.nan))
    return Layer(
        layer,
        over,
        {name: mean(values) for name, values in bits.items()},
        {name: _p(values, clusters, groups, seed) for name, values in bits.items()},
        controls,
        paired(_crossed(texts, items), groups, clusters, seed=seed),
        stated(texts, [{item.answers[0]} for item in items], _with_true(vocabulary, items), clusters, seed=seed),
        generic(texts, clusters, beside, seed=seed),
        {name: mean(_finite(values[:, k])) for name, values in found.evidence.items()},
        mean(found.above[:, k]),
        rate(np.isin(whose, ("target", "both"))),
        rate(np.isin(whose, ("verbalizer", "both"))),
        detectable_difference(effective, discordant) if discordant else np.nan,
        None if base.inverted is None else mean(base.inverted[:, k]),
        None if base.names_found is None else mean(base.names_found[:, k]),
        None if base.probe is None else mean(base.probe[:, k]),
        None if base.probe_control is None else mean(base.probe_control[:, k]),
    )


def _p(values: np.ndarray, clusters: Sequence[str], groups: Sequence[str], seed: int) -> float:
    there = np.flatnonzero(~np.isnan(values)).tolist()
    if not there:
        return math.nan
    return sign_flip(values[there], [clusters[i] for i in there], [groups[i] for i in there], seed=seed)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _crossed(texts: Sequence[str], items: Sequence[Item]) -> np.ndarray:
    """[reading, answer], each text against each item's answer."""
    answers = list(dict.fromkeys(item.answers for item in items))
    column = {answer: k for k, answer in enumerate(answers)}
    each = {text: np.array([float(names(text, answer)) for answer in answers]) for text in dict.fromkeys(texts)}
    order = [column[item.answers] for item in items]
    return np.stack([each[text][order] for text in texts])


def _with_true(vocabulary: Mapping[str, Sequence[str]], items: Sequence[Item]) -> dict[str, Sequence[str]]:
    return {**vocabulary, **{item.answers[0]: item.answers for item in items}}


def _attributed(found: Seen, whose: np.ndarray, seed: int) -> Estimate:
    """Of the readings in conflict that give one of the two answers: the state told them if the text is likelier under it than after the
    source's own words (bits_over_text > 0), else the verbalizer knew."""
    bits = found.evidence["bits_over_text"]
    rows = [
        (i, k) for i, k in zip(*np.nonzero(np.isin(whose, ("target", "verbalizer"))), strict=True) if not np.isnan(bits[i, k])
    ]
    right = [float((bits[i, k] > 0) == (whose[i, k] == "target")) for i, k in rows]
    return statistics.rate(right, [found.clusters[i] for i, _ in rows], seed=seed)


def adjusted(pairs: Sequence[PairScores]) -> tuple[PairScores, ...]:
    """With the p-values of bits adjusted over all pairs and layers, and what may be said of each layer."""
    flat = [(i, k) for i, pair in enumerate(pairs) for k in range(len(pair.layers))]
    after: dict[str, dict[tuple[int, int], float]] = {}
    for name in ("named", "nothing", "others"):
        there = [(i, k) for i, k in flat if not math.isnan(pairs[i].layers[k].p[name])]
        after[name] = dict.fromkeys(flat, math.nan) | dict(
            zip(there, statistics.holm([pairs[i].layers[k].p[name] for i, k in there]), strict=True)
        )
    found = []
    for i, pair in enumerate(pairs):
        layers = []
        for k, layer in enumerate(pair.layers):
            p = {name: values[i, k] for name, values in after.items()}
            up = {name: p[name] <= ALPHA and layer.bits[name].value > 0 for name in p}
            told: Told = "nothing"
            if any(math.isnan(value) for value in p.values()):
                told = "not compared"
            elif up["nothing"] and up["others"]:
                told = "more than the text" if up["named"] else "of its source"
            layers.append(replace(layer, adjusted=p, told=told))
        found.append(replace(pair, layers=tuple(layers)))
    return tuple(found)
