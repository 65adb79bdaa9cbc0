"""`Model.generate` under edits against the whole text run anew for every token, with plain hooks at the same absolute positions."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from families import FAMILIES, loaded, tiny
from oracle import CLOSE, Patch, Said, agree, error, patched
from torch import Tensor, nn

from patchscopes.core.edits import Edit, knock_out
from patchscopes.core.errors import PromptError
from patchscopes.engine.continued import continued
from patchscopes.engine.speech import Decoding
from patchscopes.model import Model

STEPS = 4
TEXTS = ("abcdefgh", "xy z")
OTHERS = ("gemma3n", "gemma4", "mamba2", "falcon", "cohere", "granite", "rwkv", "gpt_oss")


def vectors(n: int, width: int = 64) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(7)) * 0.5


def oracle(hf: nn.Module, family: str, ids: list[int], edits: list[Edit], prompt: int) -> Said:
    """One full pass of the whole text for every token; each edit is a plain hook at each of its absolute positions."""
    said, logits = [], []
    for step in range(STEPS):
        with ExitStack() as stack:
            for edit in edits:
                if edit.prompt not in (None, prompt):
                    continue
                places = [edit.position % len(ids)] if isinstance(edit.position, int) else list(range(len(ids)))
                if isinstance(edit.steps, tuple):
                    places = [len(ids) + t for t in edit.steps if t < step]
                elif edit.steps == "always":
                    places += list(range(len(ids), len(ids) + step))
                for place in places:
                    stack.enter_context(patched(hf, family, Patch(edit.site, place, edit.value, edit.write)))
            with torch.no_grad():
                last = hf(torch.tensor([ids + said]), use_cache=False).logits[0, -1]
        logits.append(last)
        said.append(int(last.argmax()))
    top = torch.stack(logits).topk(2).values
    leads = ((top[:, 0] - top[:, 1]) / torch.stack(logits).abs().amax(-1)).tolist()
    return Said(said, torch.stack(logits), leads, 1.0)


def check(model: Model, family: str, edits: list[Edit]) -> None:
    batch = model._batch(TEXTS)
    got = model.generate(TEXTS, edits=edits, max_new_tokens=STEPS)
    for p, tokens in enumerate(batch):
        want = oracle(model.hf, family, list(tokens.ids), edits, p)
        assert error(got[p].logits, want.logits[0]) <= CLOSE
        end = next((k for k, token in enumerate(want.tokens) if token in model.end_ids), STEPS)
        sure = next((k for k, lead in enumerate(want.leads) if lead < 2 * CLOSE), STEPS)
        assert list(got[p].ids)[: min(end, sure)] == want.tokens[: min(end, sure)]
        assert agree(list(got[p].ids) + want.tokens[len(got[p].ids) :], want)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_edits_at_the_prompt_at_given_steps_and_always(family: str) -> None:
    model, v = loaded(family), vectors(4)
    check(
        model,
        family,
        [
            Edit("resid.1", -1, v[0]),
            Edit("resid.3", 0, v[1], "add", prompt=1),
            Edit("resid.2", -2, v[2], "add", steps="always", prompt=0),
            Edit("resid.4", None, v[3], "add", steps=(0, 2)),
        ],
    )


def by_running_anew(model: Model, edits: list[Edit]) -> list[tuple[list[int], Tensor]]:
    batch = model._batch(TEXTS)
    placed = model.placed(edits, batch)
    decoding = Decoding(STEPS, model.end_ids)
    return continued(
        model.engine,
        [t.tensor for t in batch],
        placed,
        decoding,
        seeds=[0, 1],
        cached=False,
        padding_exact=model.capabilities.ok("left_padding"),
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "bloom", "gpt_oss", "gemma4", "falcon"])
def test_inner_edits_hold_under_the_cache(family: str) -> None:
    """Keys and values that were edited, edges that were closed, heads that were written: as if the text were run anew each time."""
    model = loaded(family)
    d_head = model.run("ab", read=["z.2", "k.2"])
    v, kv = vectors(1, d_head["z.2"].shape[-1])[0], vectors(1, d_head["k.2"].shape[-1])[0]
    for edits in (
        [Edit("k.2.0", 1, kv), Edit("v.1.1" if d_head["k.2"].shape[2] > 1 else "v.1", 2, kv, "add")],
        knock_out("1:4", None, [1, 2], steps="always"),
        knock_out("*", -1, [0], heads=(1,)),
        [Edit("z.2.1", None, v, "add", steps="always"), Edit("pattern.3.0", None, write="scale", amount=0.5, steps="always")],
        [
            Edit("attn_in.2", -1, write="scale", amount=1.5, steps="always"),
            Edit("mlp_out.1" if family != "gemma4" else "mlp_in.1", None, write="scale", amount=0.0, steps=(1,)),
        ],
    ):
        got, want = model.generate(TEXTS, edits=edits, max_new_tokens=STEPS), by_running_anew(model, edits)
        for one, (tokens, logits) in zip(got, want, strict=True):
            assert error(one.logits, logits) <= CLOSE, edits
            assert list(one.ids) == tokens, edits
    plain = model.generate(TEXTS, max_new_tokens=STEPS)
    assert any(a.ids != b.ids for a, b in zip(plain, got, strict=True)) or not torch.equal(plain[0].logits, got[0].logits)


def test_rows_that_end_leave_and_the_others_stay_right() -> None:
    model = loaded("llama")
    texts = ["abcdefgh", "xy z", "birds", "k"]
    alone = [model.generate(t, max_new_tokens=6)[0] for t in texts]
    stop = alone[1].text[1:3]
    cut = [model.generate(t, max_new_tokens=6, stop=[stop])[0].text for t in texts]
    assert len({len(t) for t in cut}) > 1
    assert [s.text for s in model.generate(texts, max_new_tokens=6, stop=[stop])] == cut
    assert all(stop not in t for t in cut)


def test_sampling_has_a_seed_of_its_own_for_each_prompt() -> None:
    model = loaded("gpt2")
    both = model.generate(list(TEXTS), temperature=1.0, seed=3, max_new_tokens=8)
    assert both[0].ids == model.generate(TEXTS[0], temperature=1.0, seed=3, max_new_tokens=8)[0].ids
    assert both[0].ids != model.generate(TEXTS[0], temperature=1.0, seed=4, max_new_tokens=8)[0].ids


def test_a_text_that_gets_too_long_is_refused() -> None:
    with pytest.raises(PromptError, match="at most 128"):
        loaded("llama").generate("abc", max_new_tokens=128)
    assert tiny("llama") is not None
