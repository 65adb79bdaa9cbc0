"""Model organisms: small models that are part of the package and whose facts are known because they were planted.

A folder here with `weights/config.json` is a bundled model of that name.
"""

from pathlib import Path


def bundled() -> dict[str, Path]:
    """Name -> folder in Hugging Face format, for every bundled model."""
    return {config.parent.parent.name: config.parent for config in sorted(Path(__file__).parent.glob("*/weights/config.json"))}
