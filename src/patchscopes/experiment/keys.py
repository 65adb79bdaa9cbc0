"""What the keys of an experiment mean, a sentence each: the help of the command line and the text in editors. Imports nothing."""

from __future__ import annotations

KEYS = {
    "name": "What the run is called.",
    "model": "A bundled model, a folder, a Hugging Face id, or a table that says how to load one; or several.",
    "prompts": "What is read: prompts, a table that names a file of prompts, or a table that names a file of vectors.",
    "at": (
        "Where to read: a piece of the prompt's text (its last token; word#2 for the second occurrence), an index (-1 is the last "
        "token), or all. A whole number is an index: for the text 1984 write 1984#1. A prompt's own comes first."
    ),
    "layers": "Layers to read: 3, or 3,5,9, or 0:8 (8 excluded), or 0:8:2, or all. 0 = embeddings, -1 = last.",
    "span": (
        "How many tokens, up to the position, have their states taken together, to be written in as many places; piece: those of the "
        "piece of text."
    ),
    "site": "What is read there: resid, attn_in, attn_out, mlp_in or mlp_out; layers then count blocks, but for resid.",
    "scope": (
        "describe, identity, identity-bare, logit-lens, or a prompt of your own with {x} where the state goes: 'The capital of {x} is'; "
        "or several."
    ),
    "map": "What is done to a state before it is written: identity, a scale, or a map or lens from a file; or several.",
    "target_layer": "Where to write: same (as read), all, or layers as above. Absent: the scope's own.",
    "tokens": "Tokens said at most. Absent: the scope's own.",
    "stop": "Strings that end a text and are no part of it. Absent: the scope's own.",
    "temperature": "0 says the likeliest token each time; above it, texts are sampled.",
    "draws": "Texts sampled for every cell; more than one needs a temperature above 0.",
    "seed": "Of everything that is drawn: texts, random vectors, a sample of the prompts.",
    "controls": (
        "Also run what a reading must be compared with, and weigh its evidence; or the names of what to run: nothing, zero, map_of_zero, "
        "mean, random, random_covariance, other, context, text, text_at_position."
    ),
    "evidence": "With controls: weigh the evidence of readings, which takes some 30 runs of each text; false: only their rows.",
    "second_look": (
        "The neutral text behind which sources are read again for their evidence. Several, as a list: the mean over them. Absent: three "
        "short ones."
    ),
    "outputs": "What is kept beside the table.",
    "top_k": "How many of the likeliest next tokens of each patched run stand in the table.",
    "save_vectors": "Keep the states that were read, as safetensors.",
    "save_logits": "Keep the next-token logits of each patched run, as safetensors; these are large.",
    "shard": "Readings in a shard, the unit of work that is never lost. Absent: chosen for the machine.",
    "on_bad_prompt": "What to do with prompts that cannot be read (the text of `at` is absent, too long): refuse all, or skip them.",
    "parts": "Parts of the experiment, each with settings of its own; what one lacks it takes from the experiment.",
    "revision": "Branch, tag or commit of a Hugging Face id.",
    "dtype": "auto, float32, float64, bfloat16 or float16. Absent: float32 on a CPU, else the checkpoint's.",
    "device": "cpu, cuda, cuda:1, mps. Absent: a GPU if there is one.",
    "device_map": "How transformers spreads the model over devices: auto, or a table. Not together with device.",
    "attention": "How transformers computes attention: eager, sdpa, flash_attention_2, …",
    "trust_remote_code": "Run code that comes with the model.",
    "file": "CSV, TSV, JSONL (NDJSON) or Parquet, told by its suffix; or a folder that Hugging Face datasets saved to disk.",
    "column": "The column that holds the prompts.",
    "at_column": "The column that says where to read each prompt.",
    "labels": "Columns that are carried along into the table of results.",
    "split": "Which split of a dataset folder.",
    "limit": "Only the first so many rows.",
    "sample": "Only so many rows, drawn with the seed; they stay in their order.",
    "chat": "Put each prompt into the model's chat template, as a user's turn.",
    "vectors": "A safetensors file with a matrix; each row is looked at as if it stood at the layer.",
    "tensor": "Which tensor of the file; not needed if it holds one.",
    "text": "The prompt's text.",
    "ids": "The prompt as token ids, taken as they are.",
}
