"""Programs that run another library, each by itself in an environment of its own.

They import nothing of this package, which is not installed there. A program reads one JSON document a line from stdin and answers
each with one on stdout; tensors travel in safetensors files. `serving.py` is that protocol, `with_*.py` a library each.
"""
