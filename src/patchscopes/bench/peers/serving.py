"""How a peer's program talks: JSON lines on stdin and stdout, tensors in safetensors files.

    {"do": "load", "model": FOLDER, "blocks": PATH, "device": D, "threads": N}  -> {"versions": {…}, "variants": {"1": […], "many": […]}}
    {"do": "run", "work": FILE, "variant": V, "out": FILE}                     -> {"seconds": S}
    {"do": "flops", "work": FILE, "variant": V}                                -> {"flops": N}

A work file holds `target` [1, pos], `vectors` [row, d_model], `layers` [row], `position` and `tokens`; an answer `logits`
[row, vocab] and `said` [row, tokens]. An error is answered with {"error": "…"}. What a library prints goes to stderr.
"""

import json
import os
import sys
import time
from typing import Any

WORDS = 600  # of an error message


def serve(load):
    """Answer stdin until it ends. load(folder, blocks_path, device) -> (hf_model, {variant: run}, {variant: run}, versions): ways to
    the next token and ways to more; run(work) -> (logits, said)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), load, state)
        except Exception as e:  # whatever a library raises is told to the benchmark, which goes on without it
            answer = {"error": f"{type(e).__name__}: {e}"[:WORDS]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(asked, load, state):
    import torch
    from safetensors.torch import load_file, save_file

    if asked["do"] == "load":
        torch.set_num_threads(asked["threads"])
        device = torch.device(asked["device"])
        hf, one, many, versions = load(asked["model"], asked["blocks"], device)
        state.update(hf=hf, ways={**one, **many}, device=device)
        versions = {"torch": torch.__version__, **versions}
        return {"versions": versions, "variants": {"1": list(one), "many": list(many)}}
    work: dict[str, Any] = {name: t.to(state["device"]) for name, t in load_file(asked["work"]).items()}
    for name in ("position", "tokens"):
        work[name] = int(work[name])
    work["layers"] = work["layers"].tolist()
    way = state["ways"][asked["variant"]]
    with torch.no_grad():
        if asked["do"] == "flops":
            return {"flops": _flops(way, work, state["hf"])}
        _wait(state["device"])
        start = time.perf_counter()
        logits, said = way(work)
        _wait(state["device"])
        seconds = time.perf_counter() - start
    save_file({"logits": logits.float().cpu().contiguous(), "said": said.cpu().contiguous()}, asked["out"])
    return {"seconds": seconds}


def _flops(way, work, hf):
    from torch.utils.flop_counter import FlopCounterMode

    before = hf.config._attn_implementation
    if before != "eager":
        hf.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            way(work)
    finally:
        if before != "eager":
            hf.set_attn_implementation(before)
    return counter.get_total_flops()


def _wait(device):
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def rows_by_layer(work):
    """[(ℓ*, indices of its rows)], in order."""
    return [(layer, [r for r, other in enumerate(work["layers"]) if other == layer]) for layer in sorted(set(work["layers"]))]


def versions_of(*packages):
    """{package: version}."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}
