import sys

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Sums split over threads differ in their last bit, and tiny models only lose time to threads."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
