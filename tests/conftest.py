"""What every test relies on."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Nothing a test builds is kept in the user's cache folder."""
    os.environ["GEMMAKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
