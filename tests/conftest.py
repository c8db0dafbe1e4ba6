"""What every test relies on."""

import os
import random
import shutil
import signal
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

# A background job of a shell starts with Ctrl-C ignored, and so would every command that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Every draw of a test follows from its name and this number, whatever ran before it: a failure comes back when it is
# run alone. Another number is another set of draws, and hypothesis explores with it; at 0 it tries the same each time.
SEED = int(os.environ.get("GEMMAKIT_TEST_SEED", "0"))
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("exploring", print_blob=True)
hypothesis.settings.load_profile("exploring" if SEED else "same")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if SEED and config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header():
    return f"draws: GEMMAKIT_TEST_SEED={SEED}"


def seed(name):
    number = zlib.crc32(f"{SEED} {name}".encode())
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


# Minutes of a core, by file. These begin first, or whoever of several workers comes to them last is alone with them.
MINUTES = {"unit/triton/test_interpreted.py": 4}


def pytest_collection_modifyitems(items):
    root = Path(__file__).parent
    items.sort(key=lambda item: -next((MINUTES[name] for name in MINUTES if item.path == root / name), 0))


@contextmanager
def seeded_apart(name):
    """Draws from a seed of its own, after which those outside go on as if there had been none."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    states = random.getstate(), numpy and numpy.random.get_state(), torch and torch.get_rng_state()
    seed(name)
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        if torch:
            torch.set_rng_state(states[2])


@contextmanager
def folders_removed_after(fixturedef, request):
    """What a fixture made of tmp_path_factory goes with it: pytest would keep it to the end of the run.

    Not after a failure, which it may explain.
    """
    if "tmp_path_factory" not in fixturedef.argnames:
        yield
        return
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    before, made = set(base.iterdir()), set()

    def remove():
        for folder in made if not request.session.testsfailed else ():
            shutil.rmtree(folder, ignore_errors=True)

    fixturedef.addfinalizer(remove)  # the first to be added is the last to be run
    try:
        yield
    finally:
        made |= {folder for folder in base.iterdir() if folder not in before and not folder.is_symlink()}


def pytest_collectstart(collector):
    """What a module draws while it is imported."""
    seed(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture that tests share is the same whichever of them asks first, and takes no draws from that one."""
    if fixturedef.scope == "function":
        return (yield)
    name = f"{fixturedef.baseid} {fixturedef.argname} {getattr(request, 'param_index', 0)}"
    with seeded_apart(name), folders_removed_after(fixturedef, request):
        return (yield)


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


@pytest.fixture
def drafting(monkeypatch):
    """A draft model is asked whether it pays or not: those of tests are as large as what they help."""
    from gemmakit.pytorch.decode.strategies.assisted import DraftModel

    def eager(self, *given, own=DraftModel.__init__):
        own(self, *given)
        self.gain.count = lambda run, most: most

    monkeypatch.setattr(DraftModel, "__init__", eager)
