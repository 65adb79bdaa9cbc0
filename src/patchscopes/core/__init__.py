"""Plain data: sites, layers, edits, errors. Knows no model and, but for the values of edits, no tensors."""
