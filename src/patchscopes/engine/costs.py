"""What passes and rows take, by formulas that err on the large side. Measured figures replace them while a plan runs (`memory`)."""

from __future__ import annotations

from patchscopes.engine.engine import Engine


def pass_cost(engine: Engine) -> float:
    """Tokens that a pass costs beside its own: weights are read once a pass, and a GPU is told every step of it.

    On an H200 a pass of few tokens took as long as 1,040 tokens more took in a large one (GPT-2 small, float32: 5.2 ms), 4,900
    (bfloat16: 5.2 ms), 1,220 (a Llama of 7 billion weights, bfloat16: 38 ms).
    """
    return 16.0 if engine.device.type == "cpu" else 1024.0


def activation_bytes(engine: Engine, tokens: int, keys: int) -> float:
    """Bytes that a row's `tokens` take inside a block, rather too many: residual, projections, MLP, scores over `keys`."""
    config = engine.config.get_text_config(decoder=True)
    number = next(engine.model.parameters()).element_size()
    d_ff = max(_numbers(getattr(config, "intermediate_size", None)) or [4 * engine.d_model])
    heads = max(_numbers(getattr(config, "num_attention_heads", None)) or [1])
    return tokens * ((6.0 * engine.d_model + 2 * d_ff) * number + 3 * 4 * heads * keys)


def _numbers(entry: object) -> list[int]:
    """An entry of a config: one number, or one a block (Gemma-3n), or none."""
    return [entry] if isinstance(entry, int) else [n for n in entry if isinstance(n, int)] if isinstance(entry, list) else []
