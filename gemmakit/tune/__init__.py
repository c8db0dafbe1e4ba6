"""One command, one file, a better model: rows in, an adapter or a model out, whatever interrupts it."""

from gemmakit.tune.run import Result, merge, resume, tune
from gemmakit.tune.settings import TuneSettings

__all__ = ["Result", "TuneSettings", "merge", "resume", "tune"]
