"""Run a model while reading and editing it: hooks, caches, resumed passes, generation, scoring, the self-check.

Knows token ids and tensors, and nothing of text, files or the bundled models.
"""
