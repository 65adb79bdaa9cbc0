"""This engine side by side with other ways to the same cells: times, FLOPs, bytes, memory, and whether all say the same.

Nothing here asserts a time. Ratios are medians over repetitions in which all contestants take turns on the same work.
"""

from patchscopes.bench.bench import CONTESTANTS, bench, default_parts
from patchscopes.bench.parts import PARTS, Settings

__all__ = ["CONTESTANTS", "PARTS", "Settings", "bench", "default_parts"]
