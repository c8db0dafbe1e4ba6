"""SIGKILL at a chosen step of the file system, for processes that tests start."""

import os
import signal
import sys
from pathlib import Path

import gemmakit

# Where such a process finds this module, and the very package under test.
PYTHONPATH = os.pathsep.join((str(Path(next(iter(gemmakit.__path__))).parent), str(Path(__file__).parent)))
STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "open", "fcntl.flock", "os.listdir"}


def kill_at(step, inside=""):
    """Kill this process at the n-th of the interpreter's own audit events that change or open a path with `inside`."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in STEPS and inside in str(arguments[:1]):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
