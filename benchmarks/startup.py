"""What `import gemmakit` and `gemmakit --help` cost over a bare interpreter: python benchmarks/startup.py [--out FILE]

The commands run in turn, so that whatever else the machine does falls on all of them; medians are reported.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from output import finish

from gemmakit.cli.env import about

COMMANDS = {
    "bare": [sys.executable, "-c", "pass"],
    "import gemmakit": [sys.executable, "-c", "import gemmakit"],
    "gemmakit --help": [str(Path(sys.executable).with_name("gemmakit")), "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) * 1000 for name, values in times.items()}
    result = {
        "what": "process start to end, milliseconds, medians",
        **about(1),
        "rounds": args.rounds,
        "ms": {name: round(value, 1) for name, value in medians.items()},
        "ms_over_bare": {n: round(v - medians["bare"], 1) for n, v in medians.items() if n != "bare"},
    }
    finish(result, args.out)


if __name__ == "__main__":
    main()
