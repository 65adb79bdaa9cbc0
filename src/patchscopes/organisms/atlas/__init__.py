"""atlas: a small Llama that knows the facts of `facts/*.tsv`. See `weights/README.md` for how it was made and what it can do."""
