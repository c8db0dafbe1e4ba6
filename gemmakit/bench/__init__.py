"""What `gemmakit bench` measures on this machine; comparisons with other programs are in the repository."""

import time

STARTED = time.perf_counter()  # before anything here imports torch, which is part of a start
