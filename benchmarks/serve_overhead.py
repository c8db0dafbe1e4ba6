"""What HTTP costs: the same answers from a server and from an engine in this process, in turn, on the demo model.

    python benchmarks/serve_overhead.py [--rounds 5] [--out FILE]

One client: time to the first token (p50) and tokens/s after it. Eight at a time: tokens/s together. The server is a
process of its own with as many threads; the client is the standard library's, so that little of the time is its own.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from output import finish

import gemmakit
from gemmakit.cli.env import about

PROMPT, NEW, CLIENTS = "Return the", 128, 8
ASKED = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True}

# When each token of an answer came, in seconds since it was asked for.
Times = list[float]


class OverHttp:
    def __init__(self) -> None:
        line = [sys.executable, "-m", "gemmakit.cli", "serve", "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ})
        assert self.process.stderr is not None
        said = next(one for one in self.process.stderr if " on http://" in one)
        self.address = said.split("http://")[1].strip()
        # Its lines in the log are read away, or the pipe would fill.
        ThreadPoolExecutor(1).submit(self.process.stderr.read)

    def ask(self) -> Times:
        connection = http.client.HTTPConnection(self.address)
        begun, times = time.perf_counter(), Times()
        connection.request("POST", "/v1/completions", json.dumps(ASKED), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        for line in answer:
            if line.startswith(b"data: {") and b'"finish_reason":null' in line:
                times.append(time.perf_counter() - begun)
        connection.close()
        return times

    def together(self, clients: int) -> float:
        """Tokens/s of so many at a time."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda _: self.ask(), range(clients)))
        return clients * NEW / (time.perf_counter() - begun)


class InProcess:
    def __init__(self) -> None:
        self.model = gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model())
        self.tokenizer = gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())
        self.engine = gemmakit.BatchEngine(self.model)

    def _add(self) -> int:
        settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        return self.engine.add(gemmakit.Request(self.tokenizer(PROMPT).input_ids, None, settings, self.tokenizer))

    def ask(self) -> Times:
        begun, times = time.perf_counter(), Times()
        self._add()
        while self.engine.has_work:
            times += [time.perf_counter() - begun for event in self.engine.step() if event.token is not None]
        return times

    def together(self, clients: int) -> float:
        begun = time.perf_counter()
        for _ in range(clients):
            self._add()
        while self.engine.has_work:
            self.engine.step()
        return clients * NEW / (time.perf_counter() - begun)


def measured(ask: Callable[[], Times], count: int) -> tuple[list[float], list[float]]:
    """First-token times and rates of some answers, one after another."""
    firsts, rates = list[float](), list[float]()
    for _ in range(count):
        times = ask()
        firsts.append(times[0])
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    return firsts, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sides: dict[str, Any] = {"in process": InProcess(), "over HTTP": OverHttp()}
    found: dict[str, dict[str, list[float]]] = {name: {"first_s": [], "rate": [], "together": []} for name in sides}
    try:
        for side in sides.values():
            measured(side.ask, 3)
            side.together(CLIENTS)
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                firsts, rates = measured(side.ask, 10)
                found[name]["first_s"] += firsts
                found[name]["rate"] += rates
                found[name]["together"].append(side.together(CLIENTS))
    finally:
        sides["over HTTP"].process.terminate()
    table = {name: {key: statistics.median(values) for key, values in each.items()} for name, each in found.items()}
    print(f"{'':<12}{'first token':>14}{'one client':>14}{f'{CLIENTS} at a time':>14}")
    for name, each in table.items():
        print(f"{name:<12}{each['first_s'] * 1e3:>11.2f} ms{each['rate']:>10.0f} t/s{each['together']:>10.0f} t/s")
    more = (table["over HTTP"]["first_s"] - table["in process"]["first_s"]) * 1e3
    print(f"HTTP adds {more:.2f} ms to the first token (p50 of {10 * arguments.rounds})")
    told = {"about": about(torch.get_num_threads()), "medians": table, "added_first_ms": more}
    finish(told, arguments.out, ("added_first_ms",))


if __name__ == "__main__":
    main()
