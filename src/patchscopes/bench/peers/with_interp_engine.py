"""interp-engine: its eager backend (the other ones need vLLM and a GPU), its HookManager writing at the point resid_pre.

Ways to the next token: a batch of all rows, or a batch for each target layer, with the attention that transformers chooses (SDPA).
Its `steer` adds and projects and does not replace, so rows are written by its hooks. More tokens: transformers' `generate` under the
same hooks.
"""

from typing import Any

from serving import rows_by_layer, serve, versions_of  # pyright: ignore[reportMissingImports]


def load(folder, blocks_path, device):
    """The model wrapped, and its ways."""
    import torch
    from interp_engine import EagerModel, HookManager  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf: Any = AutoModelForCausalLM.from_pretrained(folder).to(device).eval().requires_grad_(False)
    model = EagerModel(folder, device=str(device), hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(folder))

    def writing(manager, work, layers):
        def at(layer, rows):
            index, done = torch.tensor(rows, device=device), []

            def change(x):
                if done:  # a step of decoding
                    return x
                done.append(True)
                x = x.clone()
                x[index, work["position"]] = work["vectors"][index]
                return x

            module, side = model.resolve_point("resid_pre", layer)
            manager.write(module, change, point=side)

        for layer, rows in layers:
            at(layer, rows)

    def batch(work, layers, n):
        with HookManager() as manager:
            writing(manager, work, layers)
            return hf(work["target"].expand(n, -1), use_cache=False, logits_to_keep=1).logits[:, -1]

    def one_batch(work):
        logits = batch(work, rows_by_layer(work), len(work["layers"]))
        return logits, logits.argmax(-1, keepdim=True)

    def batch_a_layer(work):
        parts, order = [], []
        for layer, rows in rows_by_layer(work):
            part = {**work, "vectors": work["vectors"][rows]}
            parts.append(batch(part, [(layer, list(range(len(rows))))], len(rows)))
            order += rows
        logits = torch.cat(parts)[torch.tensor(order, device=device).argsort()]
        return logits, logits.argmax(-1, keepdim=True)

    def generating(work):
        ids = work["target"].expand(len(work["layers"]), -1)
        with HookManager() as manager:
            writing(manager, work, rows_by_layer(work))
            out = hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work["tokens"],
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return out.logits[0], out.sequences[:, ids.shape[1] :]

    one = {"one batch": one_batch, "a batch a layer": batch_a_layer}
    return hf, one, {"one generate, one batch": generating}, versions_of("interp-engine", "transformers")


if __name__ == "__main__":
    serve(load)
