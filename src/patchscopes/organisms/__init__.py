"""Model organisms: small models that are part of the package and whose facts are known because they were planted.

A folder here with `weights/config.json` is a bundled model of that name.
"""

from pathlib import Path


def bundled() -> dict[str, Path]:
    """Name -> folder in Hugging Face format, for every bundled model."""
    return {config.parent.parent.name: config.parent for config in sorted(Path(__file__).parent.glob("*/weights/config.json"))}


def bundled_lenses() -> dict[str, Path]:
    """Name -> file of its tuned lens, for every bundled model that has one."""
    return {lens.parent.name: lens for lens in sorted(Path(__file__).parent.glob("*/tuned_lens.safetensors"))}
