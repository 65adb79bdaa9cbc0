"""Tiny random models of many families, and a tokenizer of single characters that fits them.

Five blocks, d_model 64, vocabulary 97. Weights have a standard deviation of 0.15: at the usual 0.02 a block adds next to nothing,
and most mistakes stay below any tolerance. Embedding and head are untied where they can be: random models with tied ones repeat
themselves.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import patchscopes
from patchscopes.core.sites import Site
from patchscopes.engine.patch import Row

if TYPE_CHECKING:
    from oracle import Patch

DEPTH, WIDTH, VOCAB = 5, 64, 97
STD = 0.15

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SHARED_KV = {
    **_LLAMA_LIKE,
    "sliding_window": 6,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
}

CONFIGS = {
    "gpt2": transformers.GPT2Config(**_SMALL, n_head=4, n_inner=96, n_positions=128),
    "llama": transformers.LlamaConfig(**_LLAMA_LIKE),
    "gpt_neox": transformers.GPTNeoXConfig(**_LLAMA_LIKE),
    "gemma2": transformers.Gemma2Config(
        **_LLAMA_LIKE, sliding_window=6, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "qwen3": transformers.Qwen3Config(**_LLAMA_LIKE),
    "mixtral": transformers.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
    "opt": transformers.OPTConfig(**_LLAMA_LIKE, ffn_dim=96, word_embed_proj_dim=WIDTH),
    "phi3": transformers.Phi3Config(**_LLAMA_LIKE),
    "bloom": transformers.BloomConfig(**_SMALL, n_head=4),
    "mamba": transformers.MambaConfig(**_SMALL, state_size=8),
    # what these add: a logit scale; a scale on logits and on what blocks add; an MLP output that the block writes into
    "cohere": transformers.CohereConfig(**_LLAMA_LIKE, logit_scale=0.25),
    "granite": transformers.GraniteConfig(**_LLAMA_LIKE, residual_multiplier=0.22, logits_scaling=8.0),
    "falcon": transformers.FalconConfig(**_SMALL, num_attention_heads=4),
    # four residual streams, and later blocks that use the keys and values of earlier ones; the latter alone; recurrent states that
    # continue a prompt; a model without a cache
    "gemma3n": transformers.Gemma3nTextConfig(**_SHARED_KV, laurel_rank=4, activation_sparsity_pattern=[0.0] * DEPTH),
    "gemma4": transformers.Gemma4TextConfig(**_SHARED_KV, global_head_dim=16),
    "mamba2": transformers.Mamba2Config(**_SMALL, state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=8),
    "rwkv": transformers.RwkvConfig(**_SMALL, attention_hidden_size=WIDTH),
}
FAMILIES = tuple(CONFIGS)[:10]

BLOCKS = {
    **dict.fromkeys(CONFIGS, "model.layers"),
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "mamba": "backbone.layers",
    "mamba2": "backbone.layers",
    "rwkv": "rwkv.blocks",
}
# The fastest exact way to run each, where it is not "stairs": said here and not asked of the engine, which would fall back in silence.
ROUTES = {**dict.fromkeys(CONFIGS, "stairs"), "mamba": "whole", "rwkv": "hooks"}
# (attention, MLP, factor): what a block adds to the residual stream is their outputs times the factor (read in transformers 5.23)
WRITERS = {
    "gpt2": ("attn", "mlp", 1),
    "llama": ("self_attn", "mlp", 1),
    "gpt_neox": ("attention", "mlp", 1),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm", 1),
    "qwen3": ("self_attn", "mlp", 1),
    "mixtral": ("self_attn", "mlp", 1),
    "opt": ("self_attn", "fc2", 1),
    "phi3": ("self_attn", "mlp", 1),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", 1),
    "mamba": ("mixer", None, 1),
    "cohere": ("self_attn", "mlp", 1),
    "granite": ("self_attn", "mlp", 0.22),
    "falcon": ("self_attention", "mlp", 1),
}


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of `family`, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(CONFIGS[family]).to(dtype)
        for parameter in hf.parameters():
            if parameter.ndim >= 2:
                parameter.data.normal_(0, STD)
            else:  # biases and norms away from 0 and 1, where leaving them out would not show
                parameter.data += 0.1 * torch.randn_like(parameter)
    return hf.eval().requires_grad_(False)


def blocks_of(hf: nn.Module, family: str) -> nn.ModuleList:
    return hf.get_submodule(BLOCKS[family])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character a token, <s> in front: 97 ids with the four special ones."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [*string.ascii_letters, *string.digits, *" \n", *string.punctuation][: VOCAB - len(special)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def loaded(family: str) -> patchscopes.Model:
    """`patchscopes.load` of a tiny model, shared by the tests of a process: none may leave a trace on it."""
    return patchscopes.load((tiny(family), tiny_tokenizer()))


def prompt(length: int, *, seed: int = 0) -> list[int]:
    """Token ids, none of them special."""
    return torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def target(ids: Sequence[int]) -> torch.Tensor:
    """Ids as the engine takes them, [1, pos]."""
    return torch.tensor([list(ids)])


def row_of(patch: Patch | None, *, last: int = 0, target: int = 0) -> Row:
    """An edit as the engine takes it; None: nothing is written, in a prompt whose last position is `last`."""
    if patch is None:
        return Row(Site("resid", 0), last, None, target=target)
    name, index = patch.site.split(".")
    return Row(Site(name, int(index)), patch.position, patch.value, patch.write, target)
