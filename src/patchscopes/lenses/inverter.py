"""Inverter: which tokens a state was made of, read off by linear heads that were trained on texts.

    log p(token at t − k = c | h_ℓ[t]) = (A_ℓk (h − μ_ℓ) / σ_ℓ + b_ℓk) · ê_c + const,        k = 0 … K − 1

ê_c is the model's own embedding of c, centred, of length √d_model, and stays as it is: d_model² numbers a head instead of d_model · vocab,
and tokens that no text had can be told too. A head a token back as in Feucht et al. 2024 ("Token Erasure …"), who train a table of their
own. One state gives the K tokens up to its own, all states of a text give all tokens by their heads for k = 0: inversions B and A of Li et
al. 2025 (arXiv 2509.13316), linear here. A linear head bounds from below what a state tells of its text.

Training minimises the cross-entropy, the mean over layers, heads and tokens, by Adam with a rate that falls to 0, over the tokens of a step
and `negatives` others drawn from those of the texts (sampled softmax). The windows of a step and what is drawn hang on (seed, step) alone;
checkpoints and resuming are those of `descent`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError, RefusedError, VectorError
from patchscopes.core.files import make_folder, write_whole
from patchscopes.core.finite import require_finite
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.core.tensor_files import read_tensor_file
from patchscopes.lenses.descent import State, TrainingProgress, claim, descend, finish
from patchscopes.lenses.report import made_from
from patchscopes.lenses.training import Recipe, windows_of_step
from patchscopes.lenses.windows import SCORES_AT_ONCE, Window, batches, digest_of, require_one_stream, windows
from patchscopes.maps.states import split
from patchscopes.model.model import Model
from patchscopes.model.tokens import as_tokens

INVERTER = "inverter.safetensors"
FORMAT = 1
SCALED_ON = 8192  # tokens that μ and σ are taken from, about


@dataclass(frozen=True)
class InverterRecipe:
    """Everything that the result depends on, beside the model, the layers and the texts. offsets: K; negatives: tokens drawn for a step."""

    offsets: int = 4
    steps: int = 300
    tokens_per_step: int = 256
    negatives: int = 256
    rate: float = 3e-3
    clip: float = 1.0
    length: int | None = None  # tokens of a window; None: the model's context, 2048 at most
    held_out: float = 0.1  # share of the texts
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {name: value for name, value in asdict(self).items() if name in _WHOLE and value < 1}
        if whole or not self.rate > 0:
            found = ", ".join(f"{name}={value}" for name, value in (whole or {"rate": self.rate}).items())
            raise InputError(f"{found}; expected {', '.join(_WHOLE)} of at least 1, and a rate above 0")


_WHOLE = ("offsets", "steps", "tokens_per_step", "negatives")


@dataclass(frozen=True)
class HeadReport:
    """One head: the share of tokens held out that it tells; of those that it tells from states dealt out anew among them (`shuffled`);
    of those that are the commonest token of the training texts (`unigram`). n: tokens."""

    layer: int
    offset: int
    accuracy: float
    shuffled: float
    unigram: float
    n: int


@dataclass(frozen=True, eq=False)
class Inverter:
    """weight[ℓ, k] is A, bias[ℓ, k] is b, mean and scale are μ and σ, for the layers of `layers`; tokens: ê. provenance: model, texts,
    training, and under "report" each head's accuracy on texts held out."""

    layers: tuple[int, ...]
    weight: Float[Tensor, "layer offset d_model d_model"]
    bias: Float[Tensor, "layer offset d_model"]
    mean: Float[Tensor, "layer d_model"]
    scale: Float[Tensor, "layer d_model"]
    tokens: Float[Tensor, "vocab d_model"] = field(repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("weight", "bias", "mean", "scale"):
            require_finite(getattr(self, name), f"the {name} of the inverter")

    @property
    def offsets(self) -> int:
        """K: the tokens up to its own that one state gives."""
        return self.weight.shape[1]

    def ids(self, h: Float[Tensor, "row d_model"], layer: int) -> Int[Tensor, "row offset"]:
        """The likeliest token at t, t − 1, …, of states at t. LayerError if it was not trained at this layer."""
        if layer not in self.layers:
            raise LayerError(f"the inverter was not trained at layer {layer}; it has {', '.join(map(str, self.layers))}")
        at = self.layers.index(layer)
        if h.shape[-1] != self.weight.shape[-1]:
            raise VectorError(f"the states are {h.shape[-1]} wide; the inverter is {self.weight.shape[-1]} wide")
        x = (h.float().to(self.mean.device) - self.mean[at]) / self.scale[at]
        heads = torch.einsum("rd,ked->rke", x, self.weight[at]) + self.bias[at]
        rows = max(1, SCORES_AT_ONCE // (len(self.tokens) * self.offsets))
        found = [(some @ self.tokens.T).argmax(-1) for some in heads.split(rows)]
        return torch.cat(found) if found else torch.zeros(0, self.offsets, dtype=torch.long)

    @property
    def table(self) -> pl.DataFrame:
        """The report: a row for each layer and offset."""
        return pl.DataFrame(list(self.provenance.get("report", ())), infer_schema_length=None)

    def save(self, path: str | Path) -> None:
        """As safetensors with provenance. The embeddings are the model's and are not written."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous().clone() for name in _TENSORS}
        about = {"format": FORMAT, "layers": list(self.layers), "provenance": dict(self.provenance)}
        write_whole(Path(path), save(tensors, {"inverter": json.dumps(about)}))


_TENSORS = ("weight", "bias", "mean", "scale")


def load_inverter(path: str | Path, model: Model) -> Inverter:
    """An inverter from a file that `save` wrote or a folder that training left. RefusedError if it was trained on other weights: what its
    heads make is held against the model's own embeddings."""
    path = Path(path)
    path = path / INVERTER if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"there is no inverter {str(path)!r}; expected a file that save wrote, or a folder that training left")
    about, tensors = read_tensor_file(path, "inverter", "an inverter")
    if about.get("format") != FORMAT or set(tensors) != set(_TENSORS):
        raise InputError(
            f"{str(path)!r} holds {', '.join(tensors) or 'nothing'} of format {about.get('format')}; expected an inverter of "
            f"format {FORMAT}"
        )
    if tensors["weight"].shape[-1] != model.d_model:
        raise VectorError(f"the inverter is {tensors['weight'].shape[-1]} wide; {model.name} is {model.d_model} wide")
    provenance = about["provenance"]
    if not made_from(model, provenance) and provenance.get("weight_hash") != model.weight_hash:
        trained = provenance.get("model", {}).get("model", "unknown")
        raise RefusedError(
            f"the inverter {str(path)!r} was trained on other weights ({trained}, {provenance.get('weight_hash')}) than {model.name} has "
            f"({model.weight_hash}); train one on this model"
        )
    weight, bias, mean, scale = (tensors[name] for name in _TENSORS)
    return Inverter(tuple(about["layers"]), weight, bias, mean, scale, _embeddings(model).cpu(), provenance)


def train_inverter(
    model: Model,
    texts: Sequence[str],
    layers: Layers = "all",
    out: str | Path | None = None,
    recipe: InverterRecipe = InverterRecipe(),
    *,
    checkpoint_seconds: float = 120.0,
    progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Inverter:
    """Train on texts, of which a share is held out for the report. progress.kl is the cross-entropy in bits.

    out   folder for the inverter and its checkpoints; training that was stopped there goes on, a finished one is returned. RefusedError if
          the folder belongs to another recipe, model, other layers or texts. None: nothing is written
    """
    require_one_stream(model)
    wanted = resolve_layers(layers, model.n_layers)
    fitted, away = split(texts, recipe.held_out, recipe.seed)
    some, fresh = windows(model, fitted, recipe.length), windows(model, away, recipe.length)
    about = {
        "recipe": asdict(recipe),
        "layers": wanted,
        "weight_hash": model.weight_hash,
        "texts": digest_of(some),
        "held_out": digest_of(fresh),
    }
    folder = None if out is None else make_folder(Path(out))
    if folder is not None:
        claim(folder, about, "inverter")
        if (folder / INVERTER).exists():
            return load_inverter(folder / INVERTER, model)
    weights = _Weights.untrained(model, wanted, some, recipe)
    state = State(weights.parameters, torch.optim.Adam(weights.parameters, lr=recipe.rate))
    descend(state, recipe.steps, recipe.clip, _step(model, some, recipe, weights), folder, checkpoint_seconds, progress)
    report = evaluate(weights.inverter({}), model, some, fresh, recipe.seed)
    provenance = {
        "method": "inverter",
        "model": model.provenance(),
        **about,
        "tokens": {"windows": len(some), "seen": state.seen},
        "report": [asdict(one) for one in report],
    }
    inverter = weights.inverter(provenance)
    if folder is not None:
        inverter.save(folder / INVERTER)
        finish(folder, {**about, "report": provenance["report"]})
    return inverter


@torch.no_grad()
def evaluate(
    inverter: Inverter, model: Model, fitted: Sequence[Window], fresh: Sequence[Window], seed: int = 0
) -> list[HeadReport]:
    """Every head on windows that it was not trained on. Tokens that the tokenizer puts in front (BOS) are not told."""
    states, ids = _states(model, fresh, inverter.layers)
    truth = _targets(ids, inverter.offsets, _known(model))
    seen = torch.cat([_targets([one], 1, _known(model))[0] for one in fitted])
    commonest = int(torch.bincount(seen[seen >= 0]).argmax())
    order = torch.randperm(truth.shape[1], generator=torch.Generator().manual_seed(seed))
    found = []
    for layer in inverter.layers:
        told = inverter.ids(states[layer], layer).T.cpu()
        for k in range(inverter.offsets):
            there = truth[k] >= 0
            n = int(there.sum())
            right = [told[k] == truth[k], told[k][order] == truth[k], truth[k] == commonest]
            accuracy, shuffled, unigram = (float(one[there].sum()) / max(n, 1) for one in right)
            found.append(HeadReport(layer, k, accuracy, shuffled, unigram, n))
    return found


@dataclass(eq=False)
class _Weights:
    """A and b as they are trained, and what stays as it is. pool: tokens of the texts, which negatives are drawn from."""

    layers: tuple[int, ...]
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter
    mean: Tensor
    scale: Tensor
    tokens: Tensor
    pool: Tensor

    @classmethod
    def untrained(cls, model: Model, layers: Sequence[int], some: Sequence[Window], recipe: InverterRecipe) -> _Weights:
        n, k, d = len(layers), recipe.offsets, model.d_model
        states, _ = _states(model, _about(some, SCALED_ON, recipe.seed), layers)
        mean = torch.stack([states[layer].mean(0) for layer in layers])
        scale = torch.stack([states[layer].std(0, unbiased=False) for layer in layers]).clamp_min(1e-6)
        known = _known(model)
        pool = torch.tensor(sorted({i for ids in some for i in ids} - known), device=mean.device)
        zeros = torch.zeros(n, k, d, d, device=mean.device)
        return cls(
            tuple(layers),
            torch.nn.Parameter(zeros),
            torch.nn.Parameter(zeros[..., 0].clone()),
            mean,
            scale,
            _embeddings(model).to(mean.device),
            pool,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.weight, self.bias]

    def inverter(self, provenance: Mapping[str, Any]) -> Inverter:
        weight, bias = self.weight.detach().cpu().clone(), self.bias.detach().cpu().clone()
        return Inverter(self.layers, weight, bias, self.mean.cpu(), self.scale.cpu(), self.tokens.cpu(), provenance)


def _step(model: Model, some: Sequence[Window], recipe: InverterRecipe, weights: _Weights) -> Callable[[int], tuple[float, int]]:
    order = Recipe(tokens_per_step=recipe.tokens_per_step, seed=recipe.seed)

    def gradients(step: int) -> tuple[float, int]:
        chosen = windows_of_step(some, order, step)
        states, ids = _states(model, chosen, weights.layers)
        targets = _targets(ids, recipe.offsets, _known(model)).to(weights.mean.device)
        drawn = torch.randint(
            len(weights.pool), (recipe.negatives,), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        )
        candidates = torch.unique(torch.cat([targets[targets >= 0], weights.pool[drawn.to(weights.pool.device)]]))
        return _gradients(weights, states, targets, candidates), targets.shape[1]

    return gradients


def _gradients(
    weights: _Weights, states: Mapping[int, Tensor], targets: Int[Tensor, "offset token"], candidates: Int[Tensor, " candidate"]
) -> float:
    """Gradients of the mean cross-entropy, left in the parameters; its value in nats."""
    table = weights.tokens[candidates]
    classes = torch.searchsorted(candidates, targets.clamp_min(int(candidates[0]))).masked_fill(targets < 0, -100)
    heads = [k for k in range(len(targets)) if bool((targets[k] >= 0).any())]
    total = 0.0
    for at, layer in enumerate(weights.layers):
        x = (states[layer] - weights.mean[at]) / weights.scale[at]
        with torch.enable_grad():
            logits = (torch.einsum("td,ked->kte", x, weights.weight[at]) + weights.bias[at][:, None]) @ table.T
            losses = [torch.nn.functional.cross_entropy(logits[k], classes[k]) for k in heads]
            loss = torch.stack(losses).mean() / len(weights.layers)
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def _states(model: Model, some: Sequence[Window], layers: Sequence[int]) -> tuple[dict[int, Tensor], list[Window]]:
    """([token, d_model] of each layer, the windows in the order of these rows)."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ids: list[Window] = []
    for batch in batches(some):
        run = model.run([as_tokens(one) for one in batch], read=[f"resid.{layer}" for layer in layers])
        real = run.mask.to(run.logits.device)
        ids += batch
        for layer in layers:
            found[layer].append(run[f"resid.{layer}"][real].float())
    return {layer: torch.cat(each) for layer, each in found.items()}, ids


def _targets(some: Sequence[Window], offsets: int, known: set[int]) -> Int[Tensor, "offset token"]:
    """The token k before each, -1 where there is none, or one that is no text."""
    rows = []
    for k in range(offsets):
        shifted = [-1 if t < k or ids[t - k] in known else ids[t - k] for ids in some for t in range(len(ids))]
        rows.append(torch.tensor(shifted))
    return torch.stack(rows)


def _about(some: Sequence[Window], tokens: int, seed: int) -> list[Window]:
    """Windows with about so many tokens, drawn."""
    order = random.Random(f"{seed} scale").sample(list(some), len(some))
    found, n = [], 0
    for one in order:
        if n >= tokens:
            break
        found.append(one)
        n += len(one)
    return found


def _known(model: Model) -> set[int]:
    return set(model.tokenizer.all_special_ids)


def _embeddings(model: Model) -> Float[Tensor, "vocab d_model"]:
    """ê. VectorError where the table of embeddings is of another width than the stream."""
    hf: Any = model.hf
    table = hf.get_input_embeddings().weight.detach().float()[: model.vocab]
    if table.shape[-1] != model.d_model:
        raise VectorError(
            f"the embeddings of {model.name} are {table.shape[-1]} wide, its stream {model.d_model}; an inverter needs both alike"
        )
    return torch.nn.functional.normalize(table - table.mean(0), dim=-1) * table.shape[-1] ** 0.5
