"""Kill `gemmakit batch` at random moments and resume it, then hold the result against an uninterrupted run.

    python scripts/batch_kills.py --rows 5000 --kills 20

Says how many rows are there (each once), whether every answer is equal, and what part of the work was done twice.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OWN = ("created", "prompt_tokens_details", "id")  # of an answer, and of nothing that it says
# Counts each token that the engine makes in a file that outlives the process.
COUNTED = """
import mmap, struct, sys
from gemmakit.cli import main
from gemmakit.pytorch.decode.batch import BatchEngine

with open(sys.argv[1], "r+b") as file:
    count = mmap.mmap(file.fileno(), 8)
step = BatchEngine.step

def counted(engine):
    events = step(engine)
    made = sum(event.token is not None for event in events)
    count[:] = struct.pack("<q", struct.unpack("<q", count[:])[0] + made)
    return events

BatchEngine.step = counted
sys.exit(main(sys.argv[2:]))
"""


def row(i: int) -> dict[str, Any]:
    """Questions of the demo model in both formats, drawn and not, some with scores; every fiftieth is bad."""
    if i % 50 == 49:
        return {"custom_id": f"id-{i}", "prompt": "x", "temperature": "hot"}
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"What is {i % 97} + {i % 89}?"}],
        "max_tokens": 12,
        "ignore_eos": True,  # every row takes the same work, so that work can be counted in rows
    }
    if i % 3 == 1:
        asked |= {"temperature": 0.9, "top_p": 0.95}
    if i % 3 == 2:
        asked |= {"logprobs": True, "top_logprobs": 3}
        return {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/chat/completions", "body": asked}
    return {"custom_id": f"id-{i}", **asked}


def start(source: Path, out: Path, counter: Path) -> subprocess.Popen[str]:
    told = [counter, "batch", source, out, "--resume", "--device", "cpu"]
    command = [sys.executable, "-c", COUNTED, *map(str, told)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def counted(path: Path) -> int:
    return int.from_bytes(path.read_bytes(), "little")


def answers(path: Path) -> dict[str, list[Any]]:
    """What must be equal: everything but when it was made, its random id, and how much of the prompt was cached."""

    def same(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: same(v) for k, v in value.items() if k not in OWN}
        return [same(v) for v in value] if isinstance(value, list) else value

    found: dict[str, list[Any]] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        found.setdefault(result["custom_id"], []).append(same(result))
    return found


def measure(folder: Path, rows: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """Run a batch whole, and once more with kills; what came of both."""
    source, whole, broken = folder / "in.jsonl", folder / "whole.jsonl", folder / "broken.jsonl"
    source.write_text("".join(json.dumps(row(i)) + "\n" for i in range(rows)))
    counters = folder / "whole.count", folder / "broken.count"
    for counter in counters:
        counter.write_bytes(bytes(8))
    begun = time.monotonic()
    child = start(source, whole, counters[0])
    said = child.communicate()[1]
    assert child.returncode == 0, said
    whole_s = time.monotonic() - begun
    moments = random.Random(seed)
    # Kills come when so many lines are there, and a little later, so that any moment of a row may be the one.
    marks = sorted(moments.sample(range(1, int(rows * 0.97)), kills))
    for mark in marks:
        child = start(source, broken, counters[1])
        while child.poll() is None and (not broken.exists() or len(broken.read_bytes().splitlines()) < mark):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    child = start(source, broken, counters[1])
    said = child.communicate()[1]
    assert child.returncode == 0, said
    expected, found = answers(whole), answers(broken)
    failed = answers(broken.with_name(f"{broken.name}.errors"))
    return {
        "rows": rows,
        "kills": kills,
        "answers": len(found),
        "errors": len(failed),
        "missing": rows - len(found) - len(failed),
        "doubled": sum(len(lines) > 1 for lines in (*found.values(), *failed.values())),
        "different": sum(found.get(name) != lines for name, lines in expected.items()),
        "tokens_whole": counted(counters[0]),
        "tokens_broken": counted(counters[1]),
        "done_twice": counted(counters[1]) / counted(counters[0]) - 1,
        "whole_s": round(whole_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments.rows, arguments.kills, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
