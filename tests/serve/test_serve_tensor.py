"""gemmakit serve --tensor N: a server whose model several processes share."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from test_serve_process import address, start

ASKED = [{"prompt": f"If the file {i}", "max_tokens": 6 + i % 3, "temperature": 0} for i in range(8)]


def choices(url, body):
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]


@pytest.mark.slow  # three loads of the demo model
def test_a_server_of_two_processes_answers_as_one_and_ends_when_told(tmp_path):
    found = []
    for more in ((), ("--tensor", 2)):
        process = start("--port", 0, "--dtype", "float32", *more)
        try:
            url = address(process)
            with ThreadPoolExecutor(4) as together:
                said = together.map(
                    lambda body, url=url: httpx.post(f"{url}/v1/completions", json=body, timeout=60), ASKED
                )
                found.append([answer.json()["choices"] for answer in said])
            with httpx.stream("POST", f"{url}/v1/completions", json={**ASKED[0], "stream": True}, timeout=60) as answer:
                lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
            assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == found[-1][0][0]["text"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert found[0] == found[1]
