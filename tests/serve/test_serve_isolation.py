"""One request's trouble is its own: who leaves, what fails and what is slow costs the others nothing."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from running_server import Running, serving
from safetensors.torch import load_file, save_file
from test_serve_faults import begin, wait_for

import gemmakit
from gemmakit.serve import generation, shapes

LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}


class Gate:
    """Lets an engine step only when it is told to, in its own thread, with everything before and after as it is."""

    def __init__(self, server: Running):
        self.worker = server.service.worker
        self.engine = self.worker.engine
        self._step, self._may, self._done = self.engine.step, threading.Semaphore(0), threading.Semaphore(0)
        self.waits = threading.Event()
        self.engine.step = self._gated

    def _gated(self) -> Any:
        self.waits.set()
        self._may.acquire()
        self.waits.clear()
        events = self._step()
        self._done.release()
        return events

    def step(self, count: int = 1) -> None:
        """Back when the thread stands before the next step, or has nothing to do."""
        for _ in range(count):
            self._may.release()
            assert self._done.acquire(timeout=20)
            assert wait_for(lambda: self.waits.is_set() or not self.worker.busy, 20)

    def open(self) -> None:
        self.engine.step = self._step
        self._may.release()


# -- who leaves: 25 ----------------------------------------------------------------------------------------------------

PROMPT = [2, *range(300, 400)]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Running, Gate]]:
    """A server of two rows whose prompts are read 16 tokens at a time, and a token a step; and its gate."""
    with serving(max_batch_size=2, prefill_tokens=16, speculate=False) as server:
        gate = Gate(server)
        yield server, gate
        gate.open()


def stand(engine: Any) -> dict[str, Any]:
    """Who is there, and the pages that nobody running holds and that are not free."""
    now, pool = engine.scheduler, engine.scheduler.pool
    held = sum(len(sequence.holding.pages) for sequence in now.running)
    return {"running": len(now.running), "waiting": len(now.waiting), "lost": pool.pages - pool.idle - held}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("where", "steps"), [("queued", 1), ("prefill", 3), ("decoding", 13)])
def test_who_leaves_frees_its_pages_before_the_next_step(pair, where: str, steps: int, stream: bool):
    """The step under way ends; the next one finds neither its row nor its pages, and no other row has missed one."""
    server, gate = pair
    engine, inbox = gate.engine, gate.worker._inbox
    others = [begin(server, **LONG)]
    assert gate.waits.wait(20)
    if where == "queued":
        others.append(begin(server, **LONG))
        assert wait_for(lambda: not inbox.empty())
    gate.step(2)
    before = stand(engine)
    leaver = begin(server, **{**LONG, "prompt": PROMPT, "stream": stream})
    assert wait_for(lambda: not inbox.empty())
    gate.step(steps)
    now = stand(engine)
    assert (now["running"], now["waiting"]) == (2, 1 if where == "queued" else 0)
    if where != "queued":
        row = engine.scheduler.running[-1]
        assert row.computed >= 16 and (len(row.tokens) > len(PROMPT)) == (where == "decoding")
    lengths = [len(sequence.tokens) for sequence in engine.scheduler.running[: len(others)]]
    leaver.close()  # the engine's thread stands at the gate of a step that has its row in it
    assert wait_for(lambda: not inbox.empty())
    gate.step()
    assert stand(engine) == {**before, "lost": 0}
    assert [len(sequence.tokens) for sequence in engine.scheduler.running] == [length + 1 for length in lengths]
    for one in others:
        one.close()
    assert wait_for(lambda: inbox.qsize() == len(others))
    gate.step(2)  # the last one tells of those that left
    assert stand(engine) == {"running": 0, "waiting": 0, "lost": 0} and engine.stats().cache_usage == 0


# -- what fails: 32 ----------------------------------------------------------------------------------------------------

SICK = 777  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model answers NaN to whoever has said SICK, with few pages, so that they are used again."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(gemmakit.demo_model(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][SICK] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with serving(source=folder, max_batch_size=3, cache_tokens=384) as server:
        yield server


def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Requests that fail, each in its own way."""
    sound = generation.Penalties.__call__

    def raising(self: Any, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.presence == 1.5 and ids.shape[1] > self.prompt_length + 2:
            raise RuntimeError("broken on purpose")
        return sound(self, ids, scores)

    monkeypatch.setattr(generation.Penalties, "__call__", raising)
    plain = {"max_tokens": 30, "ignore_eos": True, "temperature": 0}
    return {
        "NaN at once": {**plain, "prompt": [2, 300, SICK, 301]},
        "NaN at the second token": {**plain, "prompt": "x", "logit_bias": {str(SICK): 100}},
        "a processor raises at the third": {**plain, "prompt": "x", "presence_penalty": 1.5},
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["NaN at once", "NaN at the second token", "a processor raises at the third"])
def test_what_fails_in_one_request_ends_it_alone_and_others_are_equal_to_the_bit(
    poisoned: Running, monkeypatch: pytest.MonkeyPatch, kind: str, stream: bool
):
    bodies = [
        {
            "prompt": [2, *range(300 + 40 * i, 350 + 40 * i)],
            "max_tokens": 16,
            "ignore_eos": True,
            "logprobs": 2,
            "seed": i,
        }
        for i in range(4)
    ]
    alone = [poisoned.post("/v1/completions", **body).json()["choices"] for body in bodies]
    bad = {**failing(monkeypatch)[kind], "stream": stream}
    with ThreadPoolExecutor(8) as pool:
        good, failed = [], []
        for body in bodies:
            good.append(pool.submit(poisoned.post, "/v1/completions", **body))
            failed.append(pool.submit(poisoned.post, "/v1/completions", **bad))
    assert [one.result().json()["choices"] for one in good] == alone
    for one in failed:
        said = one.result()
        if stream:  # the error is the last event, and no [DONE] follows it
            assert said.status_code == 200 and "[DONE]" not in said.text
            error = json.loads(said.text.rstrip().rpartition("data: ")[2])["error"]
        else:
            assert said.status_code == 500
            error = said.json()["error"]
        assert error["type"] == "server_error" and "broken on purpose" not in error["message"]
    assert poisoned.service.worker.error is None
    assert (
        wait_for(lambda: not poisoned.service.worker.busy) and poisoned.service.worker.engine.stats().cache_usage == 0
    )


def test_while_a_shape_is_made_ready_tokens_of_others_go_on(server: Running, monkeypatch: pytest.MonkeyPatch):
    """Row 24, with a shape that is not ready until the others have got twenty tokens."""
    began, enough = threading.Event(), threading.Event()
    make = shapes._make

    def slow(*arguments: Any) -> None:
        began.set()
        assert enough.wait(20)
        make(*arguments)

    monkeypatch.setattr(shapes, "_make", slow)
    with ThreadPoolExecutor(1) as pool, httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        shaped = pool.submit(server.post, "/v1/completions", prompt="x", max_tokens=4, regex="[0-9]{3}")
        assert began.wait(20)
        for _ in range(40):
            next(lines)
        enough.set()
        assert re.fullmatch("[0-9]{3}", shaped.result(20).json()["choices"][0]["text"])


# -- too little memory: 33 ---------------------------------------------------------------------------------------------


def test_without_room_the_youngest_waits_none_is_lost_and_it_is_told(serve):
    server = serve(max_batch_size=4, cache_tokens=192)
    body = {"max_tokens": 60, "ignore_eos": True, "temperature": 0, "logprobs": 0}
    bodies = [{**body, "prompt": [2, *range(300 + 90 * i, 380 + 90 * i)]} for i in range(4)]
    alone = [server.post("/v1/completions", **one).json()["choices"] for one in bodies]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: server.post("/v1/completions", **one).json()["choices"], bodies))
    assert together == alone
    (told,) = re.findall(r"^vllm:num_preemptions_total\{.*\} (.*)$", httpx.get(f"{server.url}/metrics").text, re.M)
    assert float(told) > 0


# -- clocks: 41 --------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_loses_no_request_and_no_time_is_negative(serve, monkeypatch: pytest.MonkeyPatch):
    """The wall clock goes an hour back and a day forth while answers are under way."""
    server = serve()
    clock, begun = time.time, time.time()
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "max_tokens": 300}) as answer:
        lines = answer.iter_lines()
        next(lines)
        for offset in (-3600.0, 86_400.0):
            monkeypatch.setattr(time, "time", lambda offset=offset: clock() + offset)
            said = server.post("/v1/completions", prompt="x", max_tokens=3, ignore_eos=True)
            assert said.json()["usage"]["completion_tokens"] == 3
            assert abs(said.json()["created"] - begun - offset) < 60
        assert [line for line in lines if line][-1] == "data: [DONE]"
    told = httpx.get(f"{server.url}/metrics").text
    sums = [float(value) for value in re.findall(r"_seconds_sum\{.*\} (.*)$", told, re.M)]
    assert len(sums) == 4 and all(0 <= value < 60 for value in sums)
