"""A batch on a thousand workers that die at random: the files, the runner, the pool and the schedulers are the real
ones, time and the models are not.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
import time
from collections import Counter
from contextlib import closing, suppress

import pytest

from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.batch.scheduler import Scheduler, Sequence
from gemmakit.serve.batch_runner import open_run, run_batch
from gemmakit.serve.ray_pool import Pool

STEP_S, ROWS_EACH = 0.02, 8


class Lost(Exception):
    pass


class Stopped(Exception):
    """The process that writes the files is gone."""


class SimulatedTime(asyncio.SelectorEventLoop):
    """Where nothing is ready, the clock stands at what comes next at once."""

    def __init__(self):
        super().__init__(_NoWait(self))
        self.now = 0.0

    def time(self):
        return self.now


class _NoWait(selectors.SelectSelector):
    def __init__(self, loop):
        super().__init__()
        self.loop = loop

    def select(self, timeout=None):
        if timeout:
            self.loop.now += timeout
        return super().select(0)


class Worker:
    """An engine whose scheduler is real: a step takes 20 ms, and now and then it dies with all that it holds."""

    def __init__(self, rng, life_s):
        self.rng, self.life_s, self.answer, self.deaths, self.made, self.most = rng, life_s, self, 0, 0, 0
        self._start(0.0)

    def _start(self, now):
        self.scheduler, self.waiting, self.stepping = Scheduler(PagePool(64, 16, True), ROWS_EACH, 512), {}, None
        self.dies = now + self.rng.expovariate(1 / self.life_s)

    async def remote(self, url, body):
        loop, prompt = asyncio.get_running_loop(), body["prompt"]
        tokens = [ord(letter) for letter in prompt]
        sequence = Sequence(self.made, tokens, len(tokens) + body["max_tokens"])
        self.made += 1
        self.scheduler.add(sequence)
        self.waiting[sequence.id] = future = loop.create_future()
        self.most = max(self.most, len(self.waiting))
        self.stepping = self.stepping or loop.create_task(self._step(loop))
        await future
        said = {"text": prompt[::-1], "finish_reason": "stop"}
        return 200, {"choices": [said], "usage": {"completion_tokens": body["max_tokens"]}}

    async def _step(self, loop):
        while self.scheduler.has_work:
            await asyncio.sleep(STEP_S)
            if loop.time() > self.dies:
                lost = self.waiting
                self.deaths += 1
                self._start(loop.time())
                for future in lost.values():
                    self._tell(future, Lost())
                return
            step = self.scheduler.plan()
            for part in (*step.prefill, *step.decode):
                self.scheduler.advance(part, 7 if part.last else None)
                if part.sequence.full:
                    self.scheduler.remove(part.sequence)
                    self._tell(self.waiting.pop(part.sequence.id))
        self.stepping = None

    def _tell(self, future, error=None):
        if not future.done():  # cancelled, where the process that asked is gone
            future.set_result(None) if error is None else future.set_exception(error)


def simulate(tmp_path, rows, workers, stops, life_s):
    """Seconds of the processor a row, simulated seconds, deaths of workers, how often rows were asked, and the most
    rows that a worker held. stops: of the writing process.
    """
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rng = random.Random(rows)
    with source.open("w") as file:
        for i in range(rows):
            row = {"custom_id": f"id {i}", "prompt": f"text {i}", "max_tokens": rng.randint(1, 6)}
            file.write(json.dumps(row) + "\n")
    deaths, simulated, asked, most = 0, 0.0, 0, 0
    started = time.process_time()
    for stop in [*sorted(rng.sample(range(1, rows), stops)), None]:
        run = open_run(source, out, {"model": "simulated"}, resume=True)

        def told(run=run, stop=stop):
            if stop is not None and run.done >= stop:
                raise Stopped

        with closing(SimulatedTime()) as loop:
            pool = Pool([Worker(rng, life_s) for _ in range(workers)], False, Lost)

            async def answer(row, pool=pool):
                return await pool.answer(row.url, row.body)

            with suppress(Stopped):
                loop.run_until_complete(run_batch(run, answer, workers * ROWS_EACH, told))
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            deaths += sum(worker.deaths for worker in pool.actors)
            most = max(most, *(worker.most for worker in pool.actors))
            simulated += loop.time()
            asked += run.answers + pool.deaths
        run.stack.close()  # without a last sync, as where it is killed
    took = time.process_time() - started
    ids = Counter(json.loads(line)["custom_id"] for line in out.open())
    assert len(ids) == rows
    assert set(ids.values()) == {1}
    assert all(f"id {i}" in ids for i in range(rows))
    return took / rows, simulated, deaths, asked, most


def test_no_row_is_lost_or_doubled_where_workers_die_at_random(tmp_path):
    _, simulated, deaths, asked, most = simulate(tmp_path, rows=3_000, workers=40, stops=2, life_s=3.0)
    assert deaths > 5
    assert asked <= 3_000 + deaths * most
    assert simulated < 60


@pytest.mark.slow  # minutes of one core
def test_a_million_rows_on_a_thousand_workers(tmp_path):
    seconds, simulated, deaths, asked, most = simulate(tmp_path, rows=1_000_000, workers=1_000, stops=5, life_s=60.0)
    print(f"{seconds * 1e6:.0f} us a row, {simulated:.0f} simulated s, {deaths} deaths, {asked:,} askings")
    assert deaths > 50
    assert asked <= 1_000_000 + deaths * most
    assert most <= 2 * ROWS_EACH  # more than its share only while others, who died, are not asked
