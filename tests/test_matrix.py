"""Every decoder family of transformers, tiny and random, against the oracle (oracle.py); what was measured goes into docs/families.md.

For every family and every check the way that the engine takes must equal the oracle, whichever it is. Where it is not the fast one,
`Capabilities` must say so and why. Which way is expected stands in families.py: a fallback in silence fails here.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from families import ABSENT, CONFIGS, READOUTS, REFUSED, ROUTES, STEPWISE, loaded, row_of, target, tiny, tiny_tokenizer
from oracle import (
    CLOSE,
    Patch,
    agree,
    error,
    full_logits,
    gradient,
    padded_logits,
    random_patches,
    say,
    say_with_cache,
    states,
)
from torch import Tensor, nn

import patchscopes as ps
from patchscopes.core.errors import RefusedError
from patchscopes.engine.generate import Decoding, generate
from patchscopes.engine.patch import next_logits
from patchscopes.engine.walk_gradients import walk_gradients

ROOT = Path(__file__).resolve().parents[1]
TEXT, SHORT = "Ab7 xyz,Q", "k9!ab"  # ten and six tokens: longer than windows of six
PREFIX = 4  # where late edits begin
STEPS = 3
MEASURED: dict[str, set[str]] = {}  # family -> checks that ran in this process
WHY: dict[str, str] = {}  # refused family -> what was found


@dataclass(frozen=True, eq=False)
class Case:
    """A model, a prompt, what plain hooks see in it, and edits at every layer: behind a prefix (`late`) and at its start (`early`)."""

    family: str
    model: ps.Model
    ids: list[int]
    seen: dict[str, Tensor]
    late: list[Patch]
    early: list[Patch]
    wanted: dict[Patch, Tensor]

    @property
    def hf(self) -> nn.Module:
        return self.model.hf

    @property
    def patches(self) -> list[Patch]:
        return [*self.late, *self.early]


@cache
def case_of(family: str) -> Case:
    model = loaded(family)
    ids = list(model.tokens(TEXT).ids)
    generator = torch.Generator().manual_seed(1)
    places = [(f"resid.{layer}", (PREFIX, len(ids) - 1, 6)[layer % 3]) for layer in range(model.n_layers + 1)]
    random.Random(0).shuffle(places)
    late = random_patches(model.hf, family, ids, places, generator)
    early = random_patches(model.hf, family, ids, [("resid.2", 0), ("resid.0", 2)], generator)
    wanted = {patch: full_logits(model.hf, family, ids, patch) for patch in (*late, *early)}
    return Case(family, model, ids, states(model.hf, family, torch.tensor([ids])), late, early, wanted)


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    check = request.function.__name__.removeprefix("test_")
    MEASURED.setdefault(request.param, set()).add(check)
    return case_of(request.param)


def resumed(case: Case, patches: list[Patch | None], route: str) -> float:
    """How far off the next token's logits of `patches`, run together, are."""
    got = next_logits(case.model.engine, target(case.ids), [row_of(p, last=len(case.ids) - 1) for p in patches], route)
    want = [case.seen["logits"][0, -1] if p is None else case.wanted[p][-1] for p in patches]
    return max(map(error, got, want))


def test_route(case: Case) -> None:
    """And the edits matter and differ, else the equalities below would say little."""
    able = case.model.capabilities
    assert (able.route, able.readout_route) == (ROUTES[case.family], READOUTS[case.family])
    assert all(a.ok or a.reason for a in able.abilities.values())
    assert all(able.ok(name) for name in ("own_pass", "hooks_seen", "no_op", "identity", "rows_independent"))
    plain = case.seen["logits"][0]
    moved = [p for p in case.patches if error(case.wanted[p], plain) > 10 * CLOSE]
    assert len(moved) >= len(case.patches) - 1
    assert min(error(case.wanted[a], case.wanted[b]) for a in moved for b in moved if a is not b) > 10 * CLOSE


def test_read(case: Case) -> None:
    run = case.model.run(TEXT, read=["resid.*"])
    assert error(run.logits, case.seen["logits"]) <= CLOSE
    for layer in range(case.model.n_layers + 1):
        assert error(run[f"resid.{layer}"], case.seen[f"resid.{layer}"]) <= CLOSE, layer


def test_edit(case: Case) -> None:
    for patch in case.patches:
        run = case.model.run(TEXT, edits=[ps.Edit(patch.site, position=patch.position, value=patch.value)])
        assert error(run.logits[0], case.wanted[patch]) <= CLOSE, patch.site


def test_no_op(case: Case) -> None:
    """Reads, and states written where they stand, leave every bit as it is."""
    plain = case.model.run(TEXT, read=["resid.*"])
    layers = range(case.model.n_layers + 1)
    same = [ps.Edit(f"resid.{k}", position=5, value=plain.at(f"resid.{k}", position=5)) for k in layers]
    assert torch.equal(plain.logits, case.model.run(TEXT).logits)
    assert torch.equal(plain.logits, case.model.run(TEXT, edits=same).logits)


def test_unembed(case: Case) -> None:
    last = case.seen[f"resid.{case.model.n_layers}"]
    if case.model.capabilities.ok("unembed"):
        assert error(case.model.unembed(last), case.seen["logits"]) <= CLOSE
    else:
        with pytest.raises(RefusedError, match="decoding a residual is refused"):
            case.model.unembed(last)


def test_resume_with_prefix(case: Case) -> None:
    able = case.model.capabilities
    assert able.ok("stairs") == (ROUTES[case.family] == "stairs")
    assert resumed(case, list(case.late), "stairs" if able.ok("stairs") else able.readout_route) <= CLOSE


def test_resume_without_prefix(case: Case) -> None:
    able = case.model.capabilities
    assert able.ok("readout") == (READOUTS[case.family] != "hooks")
    assert resumed(case, list(case.patches), "whole" if able.ok("readout") else "hooks") <= CLOSE


def test_mixed_rows(case: Case) -> None:
    """Layers and positions in no order, and rows that are not edited, in one walk."""
    assert resumed(case, [*case.patches[::2], None, *case.patches[1::2], None], case.model.capabilities.readout_route) <= CLOSE


def test_left_padding(case: Case) -> None:
    """A short prompt beside a long one. The ability is measured here once more, with plain transformers."""
    ids = list(case.model.tokens(SHORT).ids)
    alone = full_logits(case.hf, case.family, ids)
    run = case.model.run([TEXT, SHORT], read=["resid.1"])
    assert error(run.logits[1, -len(ids) :], alone) <= CLOSE
    assert error(run.logits[0], case.seen["logits"][0]) <= CLOSE
    padded = error(padded_logits(case.hf, case.family, case.ids, 3), case.seen["logits"][0]) <= CLOSE
    assert case.model.capabilities.ok("left_padding") == padded


def test_generation(case: Case) -> None:
    some = [case.late[0], case.late[3], case.early[0]]
    oracle = say_with_cache if case.family in STEPWISE else say
    said = [oracle(case.hf, case.family, case.ids, patch, STEPS) for patch in some]
    rows = [row_of(patch) for patch in some]
    for one, want in zip(
        generate(case.model.engine, target(case.ids), rows, Decoding(STEPS), route=case.model.capabilities.route),
        said,
        strict=True,
    ):
        assert error(one.logits, want.logits[0]) <= CLOSE
        assert agree(one.tokens, want), (one.tokens, want.tokens)
        assert one.norm_ratio == pytest.approx(want.norm_ratio, rel=1e-3)


def test_gradient(case: Case) -> None:
    """∂ logit / ∂ states, through runs that are resumed where each is written; and that they are, unless it is said here."""
    some = [case.late[k] for k in range(3)]
    got = walk_gradients(case.model.engine, target(case.ids), [row_of(patch) for patch in some], lambda logits: logits[:, 7])
    assert case.model.engine.gradient_route == GRADIENTS.get(case.family, "stairs")
    for patch, value, logit in zip(some, got.values, got.metric, strict=True):
        want = gradient(case.hf, case.family, case.ids, patch, 7)
        off = float((value - want).abs().max())  # the gradient may be nothing: hash routing in HY-V4's lower blocks
        assert off <= 10 * CLOSE * max(float(want.abs().max()), 1e-6), patch.site
        assert not logit.requires_grad


# Behind a prefix these raise, since they write into the states of their cache, or differ.
GRADIENTS = {
    **dict.fromkeys(
        [
            "mamba",
            "rwkv",
            "falcon_mamba",
            "jamba",
            "moshi",
            "olmo_hybrid",
            "openai-gpt",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
            "recurrent_gemma",
            "zamba",
            "deepseek_v32",
            "glm_moe_dsa",
            "bailing_hybrid",
            "kimi_linear",
            "minimax",
            "xlstm",
            "qwen4_exp_text",
        ],
        "whole",
    ),
    "inkling2_text": "hooks",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_stack_of_causal_blocks_is_refused(family: str) -> None:
    with pytest.raises(RefusedError, match="no decoder stack found") as refused:
        ps.load((tiny(family), tiny_tokenizer()))
    WHY[family] = "early positions see later ones" if "early positions" in str(refused.value) else "no chain of blocks"


# ------------------------------------------------------------------------------------------------------------------ the table

NEWEST = re.search(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
CHECKS = {name.removeprefix("test_") for name, value in list(globals().items()) if name.startswith("test_")} - {
    "what_is_no_stack_of_causal_blocks_is_refused"
}
INTRO = f"""# Families

Every decoder family of transformers {NEWEST}, tiny and random, as `tests/test_matrix.py` measured it. The page is written by that test;
it fails when the page and what it measures differ.

For **every** family in the first table these equal full passes with one plain hook and no cache: reading all layers, an edit at every
layer, a pass in which nothing is changed (bit for bit), rows of different layers and positions in one batch, the next token, generation,
prompts of different lengths together, and the gradient of a logit with respect to a state that is written. What differs is how fast a
way there is:

| column | says |
|---|---|
| generation | `stairs`: behind a shared prefix, each row from its own layer; `whole`: without a prefix; `hooks`: full passes |
| next token | the same for one token, where no cache is needed |
| lens | whether a state can be decoded alone by the model's own norm and head; refused where it cannot |
| padding | `together`: prompts of different lengths share a batch. `apart`: padding changes what this model says, so each runs alone |
| attention, MLP | whether a block adds the outputs of two modules at most to the stream: `attn_out` and `mlp_out` exist there |
| why not faster | what the self-check found |

No family is treated by name: all of this is measured when a model is loaded (`patchscopes check MODEL` prints it), so a model that is
in no table works on the day it appears. What holds in one configuration may not hold in another: the check runs on yours.

"""


def _found(case: Case, name: str, what: str) -> str:
    ability = case.model.capabilities.abilities[name]
    if ability.ok:
        return ""
    if ability.reason.startswith("off by"):
        return f"{what} it differs from full passes"
    if ability.reason.startswith("the model's own"):
        return ability.reason
    kind, _, said = ability.reason.partition(": ")
    return f"{what}: {said}" if kind == "RefusedError" else f"{what} it raises {kind}"


def _line(case: Case) -> str:
    able = case.model.capabilities
    why = [
        _found(case, "stairs", "behind a prefix"),
        _found(case, "whole", "on a cache of its own"),
        _found(case, "readout", "resumed without a cache"),
        _found(case, "unembed", "decoding a state"),
    ]
    if able.route == "hooks" and case.family not in STEPWISE and able.abilities["decoding"].reason.startswith("off by"):
        why.append("its own cached decoding differs from its own full pass")
    if case.family in STEPWISE:
        why.append("its own one-token step is not its full pass; what it generates equals its own steps")
    cells = [
        case.family,
        able.route,
        able.readout_route,
        "yes" if able.ok("unembed") else "no",
        "together" if able.ok("left_padding") else "apart",
        "yes" if able.ok("writers") else "no",
        "; ".join(dict.fromkeys(filter(None, why))),
    ]
    return "| " + " | ".join(cells) + " |"


def _page() -> str:
    head = (
        "| family | generation | next token | lens | padding | attention, MLP | why not faster |\n|---|---|---|---|---|---|---|\n"
    )
    lines = "\n".join(_line(case_of(family)) for family in sorted(CONFIGS))
    refused = "\n".join(f"| {family} | {WHY[family]} |" for family in sorted(WHY))
    return (
        f"{INTRO}{head}{lines}\n\nRefused, since they have no stack of causal blocks that run one after the other:\n\n"
        f"| family | what was found |\n|---|---|\n{refused}\n"
    )


def test_the_page_says_what_was_measured() -> None:
    """Runs last. The page is rewritten, and this fails, if it says anything else."""
    if transformers.__version__ != NEWEST:
        pytest.skip(f"docs/families.md is written with transformers {NEWEST}; this is {transformers.__version__}")
    lacking = [family for family in CONFIGS if MEASURED.get(family) != CHECKS] + [f for f in REFUSED if f not in WHY]
    if lacking:
        pytest.skip(f"not the whole matrix ran in this process: {len(lacking)} families lack checks")
    assert not ABSENT, f"transformers {NEWEST} does not know {ABSENT}"
    page, file = _page(), ROOT / "docs" / "families.md"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(page, encoding="utf-8")
    assert page == before, (
        "docs/families.md said something else than what was measured; it is rewritten now: look at it and commit it"
    )


@pytest.mark.parametrize("family", ABSENT)
def test_what_this_transformers_does_not_know(family: str) -> None:
    pytest.skip(f"{family} is newer than transformers {transformers.__version__}")
