"""The user's model after runs, errors and Ctrl-C: the same weights, the same outputs, and no hook or wrapper left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from families import DEPTH, FAMILIES, ROUTES, WIDTH, WRITERS, blocks_of, prompt, row_of, target, tiny, tiny_tokenizer
from oracle import Patch
from torch import Tensor, nn

import patchscopes
from patchscopes.core.errors import PatchscopesError
from patchscopes.engine.generate import Decoding, generate
from patchscopes.engine.patch import next_logits
from patchscopes.engine.score import score
from patchscopes.model import Model

IDS = target(prompt(8))
ALWAYS = 10**9


def traces(hf: nn.Module) -> dict[str, object]:
    """All that a run could leave on a model beside its weights: hooks of every kind, replaced forwards, switched flags."""
    found: dict[str, object] = {}
    for name, module in hf.named_modules():
        hooks = {key: tuple(value) for key, value in vars(module).items() if "hooks" in key and value}
        found[name] = (hooks, sorted(vars(module)), module.training, type(module).forward)
    found["gradients"] = [p.requires_grad for p in hf.parameters()]
    found["config"] = hf.config.to_json_string(use_diff=False)
    return found


@torch.no_grad()
def output(hf: nn.Module) -> Tensor:
    return hf(IDS, use_cache=False).logits


@dataclass(frozen=True, eq=False)
class Watched:
    """A loaded model, and what it was before it was loaded."""

    family: str
    model: Model
    traces: dict[str, object]
    tensors: list[Tensor]
    output: Tensor

    def assert_as_before(self, what: object) -> None:
        hf = self.model.hf
        assert traces(hf) == self.traces, what
        assert all(torch.equal(a, b) for a, b in zip((*hf.parameters(), *hf.buffers()), self.tensors, strict=True)), what
        assert torch.equal(output(hf), self.output), what

    def calls(self) -> dict[str, Callable[[], object]]:
        """One call of everything that runs the model."""
        model, vector = self.model, torch.ones(WIDTH)
        second = "mlp_out.2" if WRITERS[self.family][1] else "attn_out.2"
        places = (("resid.3", 4), ("resid.1", 5), (second, 6), (f"resid.{DEPTH}", 7))
        rows = [row_of(Patch(site, i, vector)) for site, i in places]
        scored, texts = [replace(row, target=k % 2) for k, row in enumerate(rows)], [prompt(3), prompt(2)]
        route = ROUTES[self.family]
        edits = [patchscopes.Edit("resid.2", -1, vector), patchscopes.Edit(second, 0, vector)]
        return {
            "generate": lambda: generate(model.engine, IDS, rows, Decoding(3), route=route),
            "generate by hooks": lambda: generate(model.engine, IDS, rows, Decoding(2), route="hooks"),
            "next_logits": lambda: next_logits(model.engine, IDS, rows, route),
            "score": lambda: score(model.engine, IDS, scored, texts, route=route),
            "run": lambda: model.run(("ab", "abcd"), read=["resid.*", "attn_out.*"], edits=edits),
            "unembed": lambda: model.unembed(torch.ones(2, WIDTH)),
            "load": lambda: patchscopes.load((model.hf, model.tokenizer)),
        }


@pytest.fixture(scope="module", params=FAMILIES)
def watched(request: pytest.FixtureRequest) -> Watched:
    hf = tiny(request.param)
    next(hf.parameters()).requires_grad_(True)  # flags differ, so that none can be switched unseen
    before = traces(hf), [t.detach().clone() for t in (*hf.parameters(), *hf.buffers())], output(hf)
    return Watched(request.param, patchscopes.load((hf, tiny_tokenizer())), *before)


@contextmanager
def raising(module: nn.Module, exception: BaseException, after: int) -> Iterator[list[int]]:
    """A hook of the user's own that raises when the module has run `after` times. Yields the list of its calls."""
    calls: list[int] = []

    def hook(_module: nn.Module, _args: tuple, _out: object) -> None:
        calls.append(1)
        if len(calls) > after:
            raise exception

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        assert handle.id in module._forward_hooks  # what is the user's stays
        handle.remove()


def test_loading_and_running_leave_the_model_as_it_was(watched: Watched) -> None:
    watched.assert_as_before("load")
    for name, call in watched.calls().items():
        call()
        watched.assert_as_before(name)


@pytest.mark.parametrize("exception", [RuntimeError("the user's own"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_inside_leaves_the_model_as_it_was(watched: Watched, exception: BaseException) -> None:
    """Raised in the first and in the last pass of every call, by the last block: the others have run, or are bypassed."""
    last = blocks_of(watched.model.hf, watched.family)[-1]
    for name, call in watched.calls().items():
        if name == "load" and isinstance(exception, RuntimeError):
            continue  # what raises while abilities are measured counts as "not able"
        with raising(last, exception, after=ALWAYS) as calls:
            call()
        for after in {0, len(calls) - 1} if name != "load" else {len(calls) // 2}:
            with raising(last, exception, after), pytest.raises(type(exception)):
                call()
            assert traces(watched.model.hf) == watched.traces, (name, after)
    watched.assert_as_before(exception)


def test_after_an_exception_runs_give_what_they_gave_before(watched: Watched) -> None:
    call = watched.calls()["next_logits"]
    before = call()
    with raising(blocks_of(watched.model.hf, watched.family)[2], ValueError(), after=1), pytest.raises(ValueError):
        call()
    assert torch.equal(call(), before)


def test_a_refused_run_leaves_the_model_as_it_was(watched: Watched) -> None:
    run, edit, vector = watched.model.run, patchscopes.Edit, torch.ones(WIDTH)
    refused = [
        lambda: run("abc", read=["resid.17"]),
        lambda: run("abc", edits=[edit("resid.1", 0, torch.ones(WIDTH + 1))]),
        lambda: run("abc", edits=[edit("resid.1", 0, vector * torch.nan)]),
        lambda: run("abc", edits=[edit("resid.1", 9, vector)]),
        lambda: run("abc", edits=[edit("resid.1", "z", vector)]),
        lambda: run(("a", "b"), edits=[edit("resid.1", 0, vector, prompt=2)]),
    ]
    if WRITERS[watched.family][1] is None:
        refused.append(lambda: run("abc", read=["resid.*", "attn_out.*", "mlp_out.*"]))  # some hooks are on before this is found
    for call in refused:
        with pytest.raises(PatchscopesError):
            call()
    watched.assert_as_before("refused")
