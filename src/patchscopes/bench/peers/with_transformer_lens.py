"""TransformerLens (4 and later): a TransformerBridge, run with hooks on `blocks.ℓ.hook_resid_pre`.

Ways to the next token: a batch of all rows, or a batch for each target layer. (`start_at_layer` runs the lower blocks too, and saves
nothing.) More tokens: the bridge's own `generate` and transformers' `generate`, under the same hooks. The bridge runs attention
eagerly, always.
"""

from typing import Any

from serving import rows_by_layer, serve, versions_of  # pyright: ignore[reportMissingImports]


def load(folder, blocks_path, device):
    """The bridge, and its ways."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device=device)

    def hooks(work, layers):
        def at(layer, rows):
            index, done = torch.tensor(rows, device=device), []

            def change(x, hook):
                if done:  # a step of decoding
                    return x
                done.append(True)
                x = x.clone()
                x[index, work["position"]] = work["vectors"][index]
                return x

            return f"blocks.{layer}.hook_resid_pre", change

        return [at(layer, rows) for layer, rows in layers]

    def batch(work, layers, n):
        out = bridge.run_with_hooks(
            work["target"].expand(n, -1), fwd_hooks=hooks(work, layers), use_cache=False, logits_to_keep=1
        )
        return out[:, -1]

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

    def generating(generate, work, **options):
        ids, seen = work["target"].expand(len(work["layers"]), -1), []

        def first(x, hook):
            if not seen:
                seen.append(x[:, -1])
            return x

        with bridge.hooks(fwd_hooks=[*hooks(work, rows_by_layer(work)), ("unembed.hook_out", first)]):
            said = generate(ids, max_new_tokens=work["tokens"], do_sample=False, stop_at_eos=False, **options)
        return seen[0], said[:, ids.shape[1] :]

    def by_bridge(work):
        return generating(bridge.generate, work, verbose=False, return_type="tokens")

    def by_transformers(work):
        return generating(bridge.hf_generate, work)

    one = {"one batch": one_batch, "a batch a layer": batch_a_layer}
    many = {"the bridge's generate": by_bridge, "transformers' generate": by_transformers}
    return hf, one, many, versions_of("transformer-lens", "transformers")


if __name__ == "__main__":
    serve(load)
