"""`gemmakit serve` as a process: how it begins, how it ends, and what it says to whom."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

LONG = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True}
STEP_S = 0.05  # of a `slow` engine: what follows a signal is seen before an answer of many steps has ended
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments: object, **environ: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "gemmakit.cli", "serve", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, text=True, env={**os.environ, **ENVIRONMENT, **environ}, **pipes)


def address(process: subprocess.Popen[str]) -> str:
    """Where it listens, once it answers."""
    assert process.stderr is not None
    for said in process.stderr:
        if " on http://" in said:
            return said.split(" on ")[1].strip()
    raise AssertionError(f"it ended with {process.wait()}")


def with_step(folder: Path, body: str) -> dict[str, str]:
    """An environment where the engine's step is `body`, the plain one being `step`: Python loads it at its start."""
    (folder / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'gemmakit.serve.service':\n"
        "            from gemmakit.pytorch.decode.batch import BatchEngine\n"
        "            step = BatchEngine.step\n"
        f"            def instead(self): {body}\n"
        "            BatchEngine.step = instead\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def slow(tmp_path: Path) -> dict[str, str]:
    return with_step(tmp_path, f"time.sleep({STEP_S}); return step(self)")


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    begun: list[subprocess.Popen[str]] = []

    def run(*arguments: object, **environ: str) -> tuple[subprocess.Popen[str], str]:
        begun.append(start("--port", 0, *arguments, **environ))
        return begun[-1], address(begun[-1])

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def test_sigterm_lets_running_answers_end_and_takes_no_new_ones(serve, slow):
    process, url = serve("--no-speculate", **slow)
    body = {**LONG, "max_tokens": round(4 / STEP_S)}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while (health := httpx.get(f"{url}/health")).status_code == 200:
            time.sleep(0.01)
        assert health.json()["status"] == "draining"
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.wait(20) == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(serve, slow, first: signal.Signals):
    process, url = serve("--no-speculate", **slow)
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 8}, timeout=60) as answer:
        next(answer.iter_lines())
        process.send_signal(first)
        while httpx.get(f"{url}/health").status_code == 200:
            time.sleep(0.01)
        process.send_signal(first)
        assert process.wait(10) == 0


def test_drain_has_an_end(serve, slow):
    process, url = serve("--no-speculate", "--drain-seconds", 0.1, **slow)
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 8}, timeout=60) as answer:
        next(answer.iter_lines())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_keys_come_from_the_environment_too(serve):
    _, url = serve("--api-key", "one", GEMMAKIT_API_KEY="two, three")
    asked = [httpx.get(f"{url}/v1/models", headers={"x-api-key": key}) for key in ("one", "two", "three", "")]
    assert [said.status_code for said in asked] == [200, 200, 200, 401]


def test_port_taken_is_one_line_and_exit_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--port", taken.getsockname()[1])
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert len(err.splitlines()) == 1 and "--port" in err


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_2(tmp_path: Path, damage: str):
    import shutil

    import gemmakit

    folder = tmp_path / "model"
    if damage != "missing":
        folder.mkdir()
    if damage == "truncated":
        shutil.copytree(gemmakit.demo_model(), folder, dirs_exist_ok=True)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    process = start(folder, "--port", 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    lines = [line for line in err.splitlines() if "loading" not in line]
    assert len(lines) == 1 and lines[0].startswith("gemmakit: ")


def test_an_engine_that_dies_ends_the_process_with_1(tmp_path: Path):
    process = start("--port", 0, **with_step(tmp_path, "raise RuntimeError('broken on purpose')"))
    url = address(process)
    said = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=30)
    assert said.status_code == 503 and said.json()["error"]["code"] == "engine_dead"
    assert process.wait(20) == 1
    _, err = process.communicate()
    assert "broken on purpose" in err
