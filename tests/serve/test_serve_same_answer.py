"""The same answer whatever else runs: over HTTP, to the bit, tokens and log probabilities."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
from running_server import Running, serving

import gemmakit

SHARED = [2, *range(500, 570)]
WEIGHTS = {
    "bf16": {},
    "int8": {"quantization_config": gemmakit.WeightOnlyConfig(bits=8)},
    "int4": {"quantization_config": gemmakit.WeightOnlyConfig(bits=4)},
}


def make_request(draw: random.Random) -> dict[str, Any]:
    prompt = [
        *(SHARED if draw.random() < 0.5 else [2]),
        *(draw.randrange(300, 2000) for _ in range(draw.randrange(90))),
    ]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randrange(1, 32), "logprobs": draw.randrange(4)}
    body["temperature"] = 0
    if draw.random() < 0.6:
        body |= {"temperature": draw.uniform(0.3, 1.6), "seed": draw.randrange(2**40), "top_k": draw.choice([0, 5, 40])}
        body |= draw.choice([{}, {"top_p": 0.9}, {"min_p": 0.05}])
    body |= draw.choice([{}, {}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.7, "frequency_penalty": 0.3}])
    body |= draw.choice(
        [{}, {}, {"stop": ["e", "\n"]}, {"ignore_eos": True}, {"min_tokens": 1}, {"regex": "[a-z ]{3,9}"}]
    )
    body["n"] = draw.choice([1, 1, 1, 2, 3])
    body["echo"] = draw.random() < 0.2
    return body


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    said = await client.post("/v1/completions", json=body)
    assert said.status_code == 200, said.text
    return said.json()["choices"]


async def leave(client: httpx.AsyncClient, body: dict[str, Any], tokens: int) -> None:
    """Ask, and go after so many pieces."""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True, "max_tokens": 200}) as answer:
        async for _ in answer.aiter_lines():
            if (tokens := tokens - 1) < 0:
                return


async def all_at_once(url: str, bodies: list[dict[str, Any]], order: random.Random) -> list[Any]:
    """The answers in the order of the bodies, which arrive in another one, strangers that leave between them."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=40)) as client:
        answers: dict[int, Any] = {}

        async def one(place: int) -> None:
            await asyncio.sleep(order.random() * 0.5)
            if order.random() < 0.3:
                await leave(client, make_request(order), order.randrange(30))
            answers[place] = await ask(client, bodies[place])

        places = list(range(len(bodies)))
        order.shuffle(places)
        await asyncio.gather(*map(one, places))
        return [answers[place] for place in range(len(bodies))]


def check(server: Running, count: int, orders: int) -> None:
    draw = random.Random(11)
    bodies = [make_request(draw) for _ in range(count)]

    async def alone() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:  # none shares anything with another
            return [await ask(client, {**body, "cache_salt": f"alone {i}"}) for i, body in enumerate(bodies)]

    expected = asyncio.run(alone())
    for number in range(orders):
        for body, told, want in zip(
            bodies, asyncio.run(all_at_once(server.url, bodies, random.Random(number))), expected, strict=True
        ):
            assert told == want, (body, told, want)
    stats = server.service.worker.engine.stats()
    assert stats.prefix_hits > 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_an_answer_is_that_of_the_request_alone(weights: str):
    with serving(loading=WEIGHTS[weights], max_batch_size=6, cache_tokens=1024, prefill_tokens=48) as server:
        check(server, 16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_two_hundred_answers_in_three_orders_are_those_of_the_requests_alone(weights: str):
    with serving(loading=WEIGHTS[weights], max_batch_size=8, cache_tokens=1024, prefill_tokens=48) as server:
        check(server, 200, 3)
