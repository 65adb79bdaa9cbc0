"""Tiny random models of many families, and a tokenizer of single characters that fits them.

Five blocks, d_model 64, vocabulary 97. Weights have a standard deviation of 0.15: at the usual 0.02 a block adds next to nothing,
and most mistakes stay below any tolerance. Embedding and head are untied where they can be: random models with tied ones repeat
themselves.
"""

from __future__ import annotations

import copy
import inspect
import string
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import patchscopes
from patchscopes.core.sites import Site
from patchscopes.engine.rows import Row

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

# What makes any other config small: it takes those of these settings that it has.
_SETTINGS = {
    **_LLAMA_LIKE,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(
        ("qk_rope_head_dim", "qk_nope_head_dim", "mamba_n_heads", "mamba_d_state", "mamba_chunk_size", "state_size"), 8
    ),
    "sliding_window": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_head": 16,
    "is_decoder": True,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": DEPTH,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 96),
}
_MLA = {"num_key_value_heads": 4, "head_dim": 8}  # low-rank keys and values, as DeepSeek has them
_SPARSE = {**_MLA, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}  # attention to the four best keys
_SWITCHING = {"layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"] * 2 + ["conv"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INKLING = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 6},
    **{"d_rel": 8, "rel_extent": 32, "unpadded_vocab_size": VOCAB, "n_layers_per_attn_res_block": 2},
}
_PLAIN = """
    afmoe apertus arcee aria_text bart beam bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small
    camembert cohere2 cohere2_moe cwm data2vec-text diffllama doge dots1 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_mamba
    flex_olmo flint gemma gemma3_text glm glm4 glm4_moe gpt-sw3 gpt_bigcode gpt_neox_japanese gpt_oss granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba jetmoe
    kolibri1 laguna llama4_text marian mbart megatron-bert mellum mimo_v2_flash minimax_m2 ministral ministral3 mistral
    modernbert-decoder moshi mpt mvp nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt pegasus persimmon phi phimoe
    plbart qwen2 qwen2_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rembert roberta roberta-prelayernorm
    roformer seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm-roberta xlm-roberta-xl zamba
"""
# What a family needs beyond these settings; None takes one of them away. "name#variant" is a second model of one type.
_MORE: dict[str, dict] = {
    **{name: {} for name in _PLAIN.split()},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _SPARSE),
    "deepseek_v4": {**_SPARSE, "head_dim": 16, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2},
    "hy_v4": {**_SPARSE, "hc_mult": 2},
    "longcat_flash": {
        **_MLA,
        **{
            "num_layers": DEPTH,
            "num_hidden_layers": None,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "zero_expert_num": 2,
        },
    },
    "bailing_hybrid": {**_MLA, **_SWITCHING},
    "kimi_linear": {**_MLA, "linear_head_dim": 16, "linear_num_heads": 4},
    **dict.fromkeys(("minimax", "granitemoehybrid"), _SWITCHING),
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONV),
    "lfm2": {**_CONV, "block_ff_dim": 96},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        **{
            "num_hidden_layers": None,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "moe_shared_expert_intermediate_size": 32,
    },
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
        **{
            "num_key_value_heads": 4,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "mamba_headdim": 32,
            "chunk_size": 8,
            "head_dim": None,
        },
        **{"num_mem_blocks": 1, "hybrid_layer_ids": [1, 3], "use_mem_rope": True},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "xlstm": {"num_heads": 4, "embedding_dim": WIDTH, "num_blocks": DEPTH},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    **dict.fromkeys(("inkling_text", "inkling2_text"), _INKLING),
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2},
        **{"hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 50, "ple_embed_dim": 16, "split_ngram_parts": 1},
        **{"heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 1},
    },
    "minimax_m3_vl_text": {
        **{"dense_intermediate_size": 96, "shared_intermediate_size": 32, "rotary_dim": 8},
        **{"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 2, "index_topk_blocks": 2},
    },
    "cohere_compass_text": {
        "layer_types": _SHARED_KV["layer_types"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        **{"max_position_embeddings": None, "max_seq_len": 128, "n_heads": 4, "n_layers": DEPTH},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "gpt_neo": {
        **{"num_hidden_layers": None, "num_layers": DEPTH, "num_heads": 4, "window_size": 6},
        "attention_types": [[["global", "local"], 2], [["global"], 1]],
    },
    "ctrl": {"dff": 96},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "roc_bert": {
        **{"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
        **{"enable_pronunciation": False, "enable_shape": False},
    },
    "falcon#alibi": {"alibi": True, "parallel_attn": False, "multi_query": False},
    "qwen2#sliding": {"use_sliding_window": True, "max_window_layers": 2},
    "gemma4_text#moe": {**_SHARED_KV, "global_head_dim": 16, "enable_moe_block": True, "top_k_experts": 2},
    "gemma4_unified_text": {"global_head_dim": 16},
}
# Models that are refused, with what is said of them: no stack of blocks that run one after the other, or none that is causal.
_REFUSED: dict[str, dict] = {
    "cpmant": {"dim_head": 16, "num_heads": 4, "dim_ff": 96, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "hrm_text": {"num_hidden_layers": 2},
    "prophetnet": {
        **{
            "num_decoder_layers": DEPTH,
            "num_encoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "num_encoder_attention_heads": 4,
        },
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local"] * DEPTH,
        "local_attn_chunk_length": 4,
        "feed_forward_size": 96,
    },
    "xlm": {"causal": True, "emb_dim": WIDTH, "n_heads": 4, "n_layers": DEPTH, "n_langs": 1},
    "xlnet": {"num_hidden_layers": None, "n_layer": DEPTH, "n_head": 4, "d_inner": 96, "d_head": 16},
}


# In transformers 5.15 these see later tokens although they are told to be decoders, so they are refused there; in 5.23 they do not.
_OLDEST = transformers.__version__.startswith("5.15.")
if _OLDEST:
    for _name in ("big_bird", "megatron-bert", "rembert", "roformer"):
        _REFUSED[_name] = _MORE.pop(_name)


def _config(name: str, more: dict) -> transformers.PreTrainedConfig | None:
    """A small config of a model type, None if this transformers does not know the type."""
    kind = name.split("#")[0]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    cls = CONFIG_MAPPING[kind]
    known = {*getattr(cls, "__dataclass_fields__", ()), *inspect.signature(cls.__init__).parameters, *cls.attribute_map}
    settings = {key: value for key, value in _SETTINGS.items() if key in known} | more
    return cls(**{key: value for key, value in settings.items() if value is not None})


_made = {name: _config(name, more) for name, more in _MORE.items()}
CONFIGS |= {name: config for name, config in _made.items() if config is not None}
ABSENT = tuple(name for name, config in _made.items() if config is None)  # newer than this transformers
REFUSED = {name: config for name, more in _REFUSED.items() if (config := _config(name, more)) is not None}

_WHERE = {  # the blocks, where they are not model.layers
    "transformer.h": "gpt2 bloom falcon falcon#alibi codegen gptj gpt_neo gpt_bigcode gpt-sw3 ctrl openai-gpt",
    "model.decoder.layers": """opt bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper""",
    "bert.encoder.layer": "bert bert-generation big_bird megatron-bert",
    "roberta.encoder.layer": "roberta camembert xlm-roberta xlm-roberta-xl xmod",
    "backbone.layers": "mamba mamba2 falcon_mamba",
    **{f"{name.replace('-', '_')}.encoder.layer": name for name in ("data2vec-text", "electra", "ernie", "rembert")},
    **{f"{name.replace('-', '_')}.encoder.layer": name for name in ("roberta-prelayernorm", "roc_bert", "roformer")},
    **{f"{name}.layers": name for name in ("gpt_neox", "gpt_neox_japanese", "biogpt")},
    **{"transformer.blocks": "mpt dbrx", "backbone.blocks": "xlstm", "rwkv.blocks": "rwkv"},
}
BLOCKS = {**dict.fromkeys(CONFIGS, "model.layers"), **{name: path for path, names in _WHERE.items() for name in names.split()}}
# The fastest exact way to run each, where it is not "stairs": said here and not asked of the engine, which would fall back in silence.
ROUTES = {
    **dict.fromkeys(CONFIGS, "stairs"),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), "whole"),
    **dict.fromkeys(("rwkv", "recurrent_gemma", "openai-gpt", "xlstm", "moshi", "minimax"), "hooks"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "hy_v4", "qwen4_exp_text", "inkling2_text"), "hooks"),
}
if _OLDEST:
    ROUTES["doge"] = "whole"  # there it masks wrong keys in a continuation that is longer than what it continues
    ROUTES["deepseek_v4"] = "hooks"  # and this one's own decoding is not its own full pass
# The route for one token, where it is another: nothing is continued there, so a cache that cannot be continued does no harm.
READOUTS = {
    **ROUTES,
    **dict.fromkeys(("rwkv", "recurrent_gemma", "openai-gpt", "xlstm", "moshi", "minimax"), "whole"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "hy_v4", "qwen4_exp_text"), "whole"),
}
if _OLDEST:
    READOUTS["deepseek_v4"] = "whole"
# Where batch and position stand in a hidden state, if not third and second from last: these have streams behind them.
LAYOUT = dict.fromkeys(("deepseek_v4", "hy_v4"), (-4, -3))
# The number of a prompt's first position, where it is not 0: RoBERTa's padding id, and one (fairseq's way of counting).
FIRST = dict.fromkeys(
    ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "xmod", "data2vec-text", "roberta-prelayernorm"), 1
)
# Models whose own one-token step is not their own full pass, by more than rounding: what is generated is compared with such steps.
STEPWISE = ("zamba2", "nemotron_h")
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
        return randomised(AutoModelForCausalLM.from_config(copy.deepcopy((CONFIGS | REFUSED)[family])).to(dtype))


def randomised(hf: nn.Module) -> nn.Module:
    """`hf` with weights drawn anew, in evaluation mode."""
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
