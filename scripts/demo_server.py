"""Starts the server on the demo model, asks it by curl and by OpenAI's client, and stops it."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

QUESTION = '{"messages": [{"role": "user", "content": "What is 34 + 58?"}]}'


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server, which is told to end and waited for."""
    command = [sys.executable, "-m", "gemmakit.cli", "serve", "--port", "0"]
    print("gemmakit serve --port 0", flush=True)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = None
        for line in server.stderr:
            print(line, end="", flush=True)
            if "serving" in line and " on http" in line:
                url = line.split(" on ")[1].strip()
                break
        try:
            if url is None:
                raise SystemExit("the server did not start.")
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            print(server.stderr.read(), end="", flush=True)


def by_curl(url: str) -> None:
    command = ["curl", "-sS", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", QUESTION]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)
    print("\n")


def by_openai(url: str) -> None:
    from openai import OpenAI

    print(f'>>> client = openai.OpenAI(base_url="{url}/v1", api_key="none")')
    print('>>> client.chat.completions.create(model="gemmakit-demo", messages=[...], stream=True)', flush=True)
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "user", "content": "Sort 41, 7, 23"}]
    for chunk in client.chat.completions.create(model="gemmakit-demo", messages=messages, stream=True):  # type: ignore[arg-type]
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print("\n")


if __name__ == "__main__":
    with serving() as url:
        by_curl(url)
        by_openai(url)
