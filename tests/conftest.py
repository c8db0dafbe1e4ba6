"""What every test relies on."""

import os
import signal

import pytest

# A background job of a shell starts with Ctrl-C ignored, and so would every command that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Nothing a test builds is kept in the user's cache folder."""
    os.environ["GEMMAKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
