"""gemmakit serve --replicas N: the application behind Ray Serve, and what a replica's death costs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Semaphore

import httpx
import openai
import pytest
from test_serve_process import STEP_S, address, slow, start  # noqa: F401  (a fixture)

from gemmakit.cli import main
from gemmakit.errors import InputError
from gemmakit.serve.ray_pool import needs_of_one, tell_what_lacks

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'gemmakit[ray]' runs it")
ASKED = {"model": "gemmakit-demo", "prompt": "If the file", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True}
# A cluster of the test's own, whatever else runs on the machine. Ray gives what it starts its own niceness, with which
# a busy machine never gets round to it, and 30 s to come up.
RAY = {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "240", "RAY_ADDRESS": "local"}


@pytest.mark.parametrize(("other", "said"), [(("--tensor", "2"), "--tensor splits one"), (("--state", "s"), "--state")])
def test_what_replicas_cannot_share_is_refused_by_name(other, said, capsys):
    assert main(["serve", "--replicas", "2", *other]) == 2
    assert said in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(monkeypatch, capsys):
    plain = importlib.import_module

    def without(name, *rest):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(name)
        return plain(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["serve", "--replicas", "2", "--port", "0"]) == 2
    assert "--replicas needs the package ray: pip install 'gemmakit[ray]'" in capsys.readouterr().err


class Cluster:
    """What is asked of ray about a cluster. taken: what others hold of its GPUs, else of its processors."""

    def __init__(self, *processors, gpus=0, taken=0):
        self.processors, self.gpus, self.taken = processors, gpus, taken

    def available_resources(self):
        kind, held = ("GPU" if self.gpus else "CPU"), self.cluster_resources()
        held[kind] -= self.taken
        return {name: left for name, left in held.items() if left}  # as Ray has it

    def cluster_resources(self):
        return {"CPU": float(sum(self.processors)), **({"GPU": float(self.gpus)} if self.gpus else {})}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": float(n)}} for n in self.processors]


@pytest.mark.parametrize(
    ("cluster", "count", "threads"), [(Cluster(8, 8), 2, 8), (Cluster(8, 8), 4, 4), (Cluster(0, 2, 6), 1, 6)]
)
def test_models_on_processors_share_them(cluster, count, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    needs = needs_of_one(cluster, count)
    assert needs == {"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}


def test_a_cluster_without_room_is_refused_by_numbers():
    assert needs_of_one(Cluster(8, gpus=2), 2) == {"num_gpus": 1}
    with pytest.raises(InputError, match=r"3 models are asked for, but the cluster has 2 GPUs"):
        needs_of_one(Cluster(8, gpus=2), 3)
    with pytest.raises(InputError, match=r"3 models are asked for, but the cluster has 2 CPUs"):
        needs_of_one(Cluster(2), 3)


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (Cluster(2, taken=2), "waiting for CPUs: 2 asked for, 0 of the cluster's 2 free."),
        (Cluster(2, 1, taken=1.5), "waiting for CPUs: 2 asked for, 1.5 of the cluster's 3 free."),
        (Cluster(8, gpus=4, taken=3), "waiting for GPUs: 2 asked for, 1 of the cluster's 4 free."),
        (Cluster(2), None), (Cluster(0, gpus=2), None),
    ],
)  # fmt: skip
def test_what_is_waited_for_is_said_within_seconds(cluster, said, monkeypatch):
    told, begun = [], time.monotonic()
    tell_what_lacks(cluster, needs_of_one(cluster, 2), 2, told.append)
    assert time.monotonic() - begun < 5
    assert [line[: line.index(" It goes on")] for line in told] == ([said] if said else [])


@pytest.fixture(scope="module")
def served():
    process = start("--port", 0, "--replicas", 2, **RAY)
    try:
        yield process, address(process)
    finally:
        process.kill()
        process.communicate()


def replicas(process):
    """The processes of replicas that descend from the one that was started."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in told.splitlines()]
    parents = {int(id): int(parent) for id, parent, *_ in rows}

    def ours(id):
        while id in parents and id != process.pid:
            id = parents[id]
        return id == process.pid

    return {int(id) for id, _, *command in rows if "ServeReplica" in str(command) and ours(int(id))}


@needs_ray
@pytest.mark.slow  # Ray, and two models
def test_a_client_gets_from_two_replicas_what_it_gets_from_one(served, server):
    process, url = served
    want = server.post("/v1/completions", **ASKED).json()["choices"][0]["text"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    with ThreadPoolExecutor(8) as together:
        said = list(together.map(lambda _: client.completions.create(**ASKED), range(16)))
    assert [one.choices[0].text for one in said] == [want] * 16
    pieces = [one.choices[0].text for one in client.completions.create(**ASKED, stream=True)]
    assert len(pieces) > 3
    assert "".join(pieces) == want
    assert len(replicas(process)) == 2
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ready"}
    assert httpx.get(f"{url}/health", headers={"host": "elsewhere.org"}, timeout=60).status_code == 403


@needs_ray
@pytest.mark.slow
def test_a_replica_that_is_killed_ends_its_answers_alone_and_another_takes_its_place(served):
    process, url = served

    begun = Semaphore(0)

    def stream(_):
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as answer:
                lines = answer.iter_lines()
                next(lines)
                begun.release()
                return [line for line in lines if line][-1]
        except httpx.RemoteProtocolError:
            return "cut off"

    before = replicas(process)
    with ThreadPoolExecutor(8) as together:
        under_way = list(map(together.submit, [stream] * 8, range(8)))
        assert all(begun.acquire(timeout=120) for _ in under_way)
        os.kill(min(before), signal.SIGKILL)
        answers = [httpx.post(f"{url}/v1/completions", json=ASKED, timeout=120) for _ in range(8)]
        ends = [one.result() for one in under_way]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert set(ends) <= {"data: [DONE]", "cut off"}
    assert "data: [DONE]" in ends
    until = time.monotonic() + 240
    while len(replicas(process) - {min(before)}) < 2:
        assert time.monotonic() < until
        time.sleep(0.5)


@needs_ray
@pytest.mark.slow
def test_ctrl_c_lets_running_answers_end_and_leaves_nothing_behind(served):
    process, url = served
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(120) == 0
    assert not replicas(process)


@needs_ray
@pytest.mark.slow
def test_while_replicas_drain_they_refuse_as_one_server_does(slow):  # noqa: F811
    process = start("--port", 0, "--replicas", 1, "--no-speculate", **RAY, **slow)
    url = address(process)
    asked, seen = {**LONG, "max_tokens": round(6 / STEP_S)}, set()
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while (health := httpx.get(f"{url}/health", timeout=60)).status_code == 200:
                time.sleep(0.05)
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            refused = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "draining"
            assert [line for line in lines if line][-1] == "data: [DONE]"
        with suppress(httpx.TransportError):  # until it is gone
            while True:
                seen.add(httpx.get(f"{url}/health", timeout=60).status_code)
        assert seen <= {503}
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@needs_ray
@pytest.mark.slow
def test_a_model_that_replicas_cannot_load_is_one_line_and_exit_2(tmp_path):
    process = start(tmp_path / "none", "--port", 0, "--replicas", 1, **RAY)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert [line for line in said.splitlines() if "gemmakit: a replica could not load the model" in line], said
