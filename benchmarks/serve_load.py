"""Tokens a second and latencies of OpenAI-compatible servers under a closed loop of 1, 2, 4 and 8 clients.

    python benchmarks/serve_load.py --server 'ours=gemmakit serve MODEL --port {port}' \\
        --server 'theirs=python -m llama_cpp.server --model FILE.gguf --n_ctx 8192 --port {port}' --out load.json

Each server is started, warmed, measured and ended in turn, on a free port; `name=http://host:port` measures one that
runs already. Prompts are 200 to 800 words, of which half share their first 150 in a second pass; the same for every
server. A run that meets --limit-s says what it has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

WORDS = ["the", "file", "is", "open", "when", "a", "user", "reads", "it", "and", "then", "a", "list", "ends"]
SHARED_WORDS, START_S = 150, 300.0


@dataclass
class Load:
    """What a closed loop saw. times: of each request, when its pieces came, in seconds since it was sent."""

    seconds: float
    times: list[list[float]] = field(default_factory=list[list[float]])
    tokens: int = 0
    prompt_tokens: int = 0
    errors: int = 0

    def told(self) -> dict[str, Any]:
        gaps = [b - a for times in self.times for a, b in pairwise(times)]
        firsts = [times[0] for times in self.times]
        return {
            "requests": len(self.times),
            "errors": self.errors,
            "seconds": round(self.seconds, 2),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / self.seconds, 2),
            **{f"first_token_p{q}_s": _quantile(firsts, q) for q in (50, 95)},
            **{f"between_tokens_p{q}_s": _quantile(gaps, q) for q in (50, 95)},
        }


def _quantile(values: Sequence[float], q: int) -> float | None:
    """The smallest value that q percent do not exceed."""
    return round(sorted(values)[max(0, math.ceil(len(values) * q / 100) - 1)], 4) if values else None


def prompts(count: int, low: int, high: int, shared: bool, seed: int) -> list[str]:
    """Texts of low to high words; half of them begin alike where `shared`."""
    chance = random.Random(seed)
    begin = chance.choices(WORDS, k=min(SHARED_WORDS, low))
    made: list[str] = []
    for i in range(count):
        words = chance.choices(WORDS, k=chance.randint(low, high))
        made.append(" ".join(begin + words[len(begin) :] if shared and i % 2 else [str(chance.random()), *words]))
    return made


async def loop(url: str, model: str, texts: Sequence[str], clients: int, new: int, until: float) -> Load:
    """Each client asks for the next text as soon as it has its answer."""
    load, begun, left = Load(0.0), time.monotonic(), iter(texts)
    async with httpx.AsyncClient(timeout=600) as http:

        async def client() -> None:
            for text in left:
                if time.monotonic() > until:
                    return
                await _ask(http, url, model, text, new, load)

        await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = max(time.monotonic() - begun, 1e-9)
    return load


async def _ask(http: httpx.AsyncClient, url: str, model: str, text: str, new: int, load: Load) -> None:
    body = {"model": model, "prompt": text, "max_tokens": new, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    begun, times, usage = time.monotonic(), list[float](), dict[str, int]()
    async with http.stream(
        "POST", f"{url}/v1/completions", json={**body, "stream_options": {"include_usage": True}}
    ) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            said = json.loads(line[6:])
            usage = said.get("usage") or usage
            if said.get("choices"):
                times.append(time.monotonic() - begun)
    if answer.status_code != 200 or not times:
        load.errors += 1
        return
    load.times.append(times)
    load.tokens += usage.get("completion_tokens", len(times))  # who tells no usage sends a token a piece
    load.prompt_tokens += usage.get("prompt_tokens", 0)


@contextmanager
def running(server: str) -> Iterator[str]:
    """The URL of a server, started if it is a command."""
    if server.startswith("http"):
        yield server.rstrip("/")
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(shlex.split(server.replace("{port}", str(port))), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < until, f"it does not answer: {server}"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models").status_code == 200
    except httpx.TransportError:
        return False


def measure(name: str, server: str, arguments: argparse.Namespace, until: float) -> Iterator[dict[str, Any]]:
    """A line for each number of clients and each kind of prompts."""
    low, high = arguments.words
    with running(server) as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        asyncio.run(loop(url, model, prompts(1, low, high, False, 0), 1, 4, until))
        for shared in (False, True):
            for clients in arguments.clients:
                if time.monotonic() > until:
                    return
                texts = prompts(clients * arguments.rounds, low, high, shared, 2 * clients + shared)
                load = asyncio.run(loop(url, model, texts, clients, arguments.new, until))
                yield {"server": name, "clients": clients, "shared_prefix": shared, **load.told()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL|COMMAND")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--words", type=int, nargs=2, default=[200, 800], metavar=("LOW", "HIGH"))
    parser.add_argument("--new", type=int, default=64, help="tokens an answer")
    parser.add_argument("--rounds", type=int, default=2, help="requests a client")
    parser.add_argument("--limit-s", type=float, default=900.0, help="for a server")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for server in arguments.server:
        name, _, what = server.partition("=")
        for line in measure(name, what, arguments, time.monotonic() + arguments.limit_s):
            lines.append(line)
            print(json.dumps(line), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
