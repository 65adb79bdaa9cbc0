"""Model organisms: small models that are part of the package and whose facts are known because they were planted.

A folder here with `weights/config.json` is a bundled model of that name; one with `weights/adapter_config.json` is an adapter of
another bundled model, and is loaded as one.
"""

from pathlib import Path


def bundled() -> dict[str, Path]:
    """Name -> folder in Hugging Face format, or in that of the package peft, for every bundled model."""
    configs = (
        config for name in ("config.json", "adapter_config.json") for config in Path(__file__).parent.glob(f"*/weights/{name}")
    )
    return {config.parent.parent.name: config.parent for config in sorted(configs)}


def bundled_lenses() -> dict[str, Path]:
    """Name -> file of its tuned lens, for every bundled model that has one."""
    return {lens.parent.name: lens for lens in sorted(Path(__file__).parent.glob("*/tuned_lens.safetensors"))}
