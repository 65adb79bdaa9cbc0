"""Experiments: a task makes sources and scopes, runs make tables, pure functions score them."""
