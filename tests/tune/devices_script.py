"""Run by test_tune_devices.py in two processes: a run to its end, one that is cut off after its third step, and
one that goes on where one process was."""

import json
import sys
import warnings
from contextlib import suppress

from gemmakit.pytorch.parallel import processes
from gemmakit.tune import TuneSettings, resume, tune

warnings.simplefilter("ignore")


def cut(step, total):
    if step.step == 3:
        raise KeyboardInterrupt


def main():
    for settings in map(json.loads, sys.argv[1:]):
        tune(TuneSettings.from_dict({**settings, "devices": 2}, "a test"))
        with suppress(KeyboardInterrupt):
            out = f"{settings['out']}-cut"
            tune(TuneSettings.from_dict({**settings, "devices": 2, "out": out}, "a test"), tell=cut)
        resume(f"{settings['out']}-one-cut")
    print(json.dumps(processes.rank()))
    processes.leave()


main()
