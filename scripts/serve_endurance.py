"""A server's memory, files and threads over many requests, and its pages after many clients that left.

    python scripts/serve_endurance.py --requests 10000 --leaving 1000

Starts `gemmakit serve` with the demo model, and says what it held as it went.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

CLIENTS, START_S = 8, 120.0
ENDED = 'vllm:request_success_total{finished_reason="'


def held(pid: int) -> dict[str, int]:
    """What a process holds, as Linux tells it."""
    said = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"rss_mb": int(said["VmRSS"].split()[0]) // 1024, "threads": int(said["Threads"]), "files": files}


async def requests(url: str, pid: int, count: int) -> None:
    """Ask `count` times, half of them streamed; says what is held, at every tenth part."""
    left = iter(range(count))

    async def client(http: httpx.AsyncClient) -> None:
        for i in left:
            body = {"prompt": f"What is {i} + {i % 7}?", "max_tokens": 4, "ignore_eos": True, "stream": i % 2 == 0}
            answer = await http.post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            if i % max(1, count // 10) == 0:
                print(json.dumps({"requests": i, **held(pid)}), flush=True)

    async with httpx.AsyncClient(timeout=120) as http:
        await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
    print(json.dumps({"requests": count, **held(pid)}), flush=True)


async def leaving(url: str, count: int, seed: int = 0) -> dict[str, Any]:
    """Clients that leave while they wait, are read or are answered; what the engine holds once the last has left."""
    chance, left = random.Random(seed), iter(range(count))

    async def client(http: httpx.AsyncClient) -> None:
        for i in left:
            body = {"prompt": f"{i} " + "the file " * 50, "max_tokens": 100, "ignore_eos": True, "stream": True}
            task = asyncio.ensure_future(http.post(f"{url}/v1/completions", json=body))
            await asyncio.wait([task], timeout=chance.uniform(0.0, 0.4))
            task.cancel()  # closes its connection
            await asyncio.wait([task])

    async with httpx.AsyncClient(timeout=120) as http:
        await asyncio.gather(*(client(http) for _ in range(2 * CLIENTS)))
        begun = time.monotonic()
        while True:
            text = (await http.get(f"{url}/metrics")).text
            now = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line[0] != "#"}
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            holds = {name: now[f"vllm:{name}"] for name in names}
            if not any(holds.values()) or time.monotonic() - begun > 10:
                ended = {
                    line.split('"')[1]: float(line.split()[-1]) for line in text.splitlines() if line.startswith(ENDED)
                }
                return {"left": count, "ended": ended, "free_after_s": round(time.monotonic() - begun, 3), **holds}
            await asyncio.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--leaving", type=int, default=1000)
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gemmakit.cli", "serve", "--port", str(port), "--device", "cpu"]
    server, url = subprocess.Popen(command, stderr=subprocess.DEVNULL), f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not _ready(url):
            assert server.poll() is None and time.monotonic() < until, "the server does not begin"
            time.sleep(0.2)
        print(json.dumps({**asyncio.run(leaving(url, arguments.leaving)), **held(server.pid)}), flush=True)
        begun = time.monotonic()
        asyncio.run(requests(url, server.pid, arguments.requests))
        print(json.dumps({"seconds": round(time.monotonic() - begun, 1)}))
    finally:
        server.kill()
        server.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
