"""Real servers on free ports of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from running_server import Running, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """The demo model on this machine's own address, no key asked."""
    with serving() as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Servers of a test's own: serve(ServeSettings(...), max_batch_size=2)."""
    with ExitStack() as stack:
        yield lambda *args, **named: stack.enter_context(serving(*args, **named))
