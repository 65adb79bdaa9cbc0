"""One thread, no network, annotations checked while tests run, and tests marked `shared` only where their files are."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch
from jaxtyping import install_import_hook

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository; not part of it

torch.set_num_threads(1)  # tiny models: threads cost more than they save
# Annotations are executed, shapes too; before patchscopes is imported. Not where functions are made for every pass (hooks): those
# would be compiled every time, and tests take twice as long.
CHECKED = ("core", "maps", "controls", "model", "scopes", "lenses", "engine.generate", "engine.score", "engine.caches")
CHECKED += ("engine.shared_prefix", "engine.memory", "engine.packing", "engine.sampling", "engine.speech", "engine.decode")
install_import_hook([f"patchscopes.{name}" for name in CHECKED], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"needs {SHARED}, which is not here"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the repository. For tests marked `shared`."""
    return SHARED


@pytest.fixture
def generator() -> torch.Generator:
    """Randomness that is the same in every run."""
    return torch.Generator().manual_seed(0)
