"""nnsight (0.8 and later): blocks are reached inside a trace, and rows are set by index.

Ways to the next token: one trace over a batch of all rows; an invoke for each target layer, which nnsight puts together into one
batch; a trace for each target layer; and a trace for each target layer that skips the blocks below it, given their output of one
unpatched trace. More tokens: one `generate` over a batch of all rows, edited in its first pass.
"""

from typing import Any

from serving import rows_by_layer, serve, versions_of  # pyright: ignore[reportMissingImports]


def load(folder, blocks_path, device):
    """The model wrapped, and its ways."""
    import nnsight  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf: Any = AutoModelForCausalLM.from_pretrained(folder).to(device).eval().requires_grad_(False)
    model = nnsight.TransformersModel(hf, tokenizer=AutoTokenizer.from_pretrained(folder))
    blocks = model
    for name in blocks_path.split("."):
        blocks = getattr(blocks, name)

    def next_token(logits):
        return logits, logits.argmax(-1, keepdim=True)

    def in_order(parts, work):
        rows = [r for _, some in rows_by_layer(work) for r in some]
        return next_token(torch.cat(parts)[torch.tensor(rows, device=device).argsort()])

    def one_batch(work):
        ids, where, vectors = work["target"].expand(len(work["layers"]), -1), work["position"], work["vectors"]
        layers = rows_by_layer(work)
        with model.trace(ids, use_cache=False, logits_to_keep=1):
            for layer, rows in layers:
                blocks[layer].input[rows, where] = vectors[rows]
            logits = model.output.logits[:, -1].save()
        return next_token(logits)

    def invokes(work):
        target, where, vectors = work["target"], work["position"], work["vectors"]
        layers = rows_by_layer(work)
        with model.trace(use_cache=False, logits_to_keep=1) as tracer:
            parts = nnsight.save([])
            for layer, rows in layers:
                with tracer.invoke(target.expand(len(rows), -1)):
                    blocks[layer].input[:, where] = vectors[rows]
                    parts.append(model.output.logits[:, -1])
        return in_order(parts, work)

    def trace_a_layer(work):
        where, vectors, parts = work["position"], work["vectors"], []
        for layer, rows in rows_by_layer(work):
            with model.trace(work["target"].expand(len(rows), -1), use_cache=False, logits_to_keep=1):
                blocks[layer].input[:, where] = vectors[rows]
                logits = model.output.logits[:, -1].save()
            parts.append(logits)
        return in_order(parts, work)

    def skipping(work):
        where, vectors, parts = work["position"], work["vectors"], []
        layers = rows_by_layer(work)
        with model.trace(work["target"], use_cache=False, logits_to_keep=1):
            seen = nnsight.save([])
            for layer, _ in layers:
                seen.append(blocks[layer].input)
        for (layer, rows), h in zip(layers, seen, strict=True):
            x = h.repeat(len(rows), 1, 1)
            x[:, where] = vectors[rows]
            with model.trace(work["target"].expand(len(rows), -1), use_cache=False, logits_to_keep=1):
                for below in range(layer):
                    blocks[below].skip(x)
                blocks[layer].input = x
                logits = model.output.logits[:, -1].save()
            parts.append(logits)
        return in_order(parts, work)

    def generating(work):
        ids, where, vectors = work["target"].expand(len(work["layers"]), -1), work["position"], work["vectors"]
        layers, tokens = rows_by_layer(work), work["tokens"]
        mask = torch.ones_like(ids)
        with model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False) as tracer:
            for layer, rows in layers:
                blocks[layer].input[rows, where] = vectors[rows]
            logits = model.output.logits[:, -1].save()
            said = tracer.result.save()
        return logits, said[:, ids.shape[1] :]

    one = {
        "one trace, one batch": one_batch,
        "one trace, an invoke a layer": invokes,
        "a trace a layer": trace_a_layer,
        "a trace a layer, lower blocks skipped": skipping,
    }
    return hf, one, {"one generate, one batch": generating}, versions_of("nnsight", "transformers")


if __name__ == "__main__":
    serve(load)
