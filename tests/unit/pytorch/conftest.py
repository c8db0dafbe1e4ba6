import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Sums split over threads differ in their last bit; one thread makes every run the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
