"""Chats and completions by the openai client, over a real connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest
import torch
from running_server import NAME, Running

import gemmakit

QUESTION = [{"role": "user", "content": "What is 34 + 58?"}]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def pipe():
    return gemmakit.pipeline("text-generation", device="cpu")


def test_chat_answer_is_that_of_generate(client, pipe):
    said = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=30, temperature=0)
    alone = pipe(QUESTION, max_new_tokens=30, **pipe.turn_ends())[0]["generated_text"][-1]["content"]
    assert said.choices[0].message.content == alone
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].finish_reason == "stop"
    assert said.usage.prompt_tokens == len(pipe.encode(QUESTION))
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_stream_gives_the_same_text_in_openais_order(client):
    whole = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=30, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=QUESTION,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *deltas, usage = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in deltas) == whole.choices[0].message.content
    assert deltas[-1].choices[0].finish_reason == "stop" and deltas[-1].choices[0].delta.content is None
    assert all(c.choices[0].finish_reason is None for c in deltas[:-1])
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_completion_continues_text_and_ids_alike(client, pipe):
    text = "If the file"
    by_text = client.completions.create(model=NAME, prompt=text, max_tokens=12, temperature=0)
    by_ids = client.completions.create(model=NAME, prompt=pipe.encode(text), max_tokens=12, temperature=0)
    alone = pipe(text, max_new_tokens=12, return_full_text=False)[0]["generated_text"]
    assert by_text.choices[0].text == by_ids.choices[0].text == alone
    streamed = client.completions.create(model=NAME, prompt=text, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone


def test_seeded_answer_is_that_of_generate(client, pipe):
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    said = client.completions.create(model=NAME, prompt="Return the", max_tokens=20, **settings)
    alone = pipe("Return the", max_new_tokens=20, return_full_text=False, do_sample=True, **settings)
    assert said.choices[0].text == alone[0]["generated_text"]


def test_several_prompts_are_answered_in_their_order(client):
    prompts = ["If the file", "Return the", "The"]
    alone = [client.completions.create(model=NAME, prompt=p, max_tokens=8, temperature=0) for p in prompts]
    together = client.completions.create(model=NAME, prompt=prompts, max_tokens=8, temperature=0)
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)


def test_model_is_listed_and_another_is_not_found(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)


def test_health_and_version(server: Running):
    import httpx

    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
    assert httpx.get(f"{server.url}/version").json() == {"version": gemmakit.__version__}


def test_a_seed_draws_what_it_draws_in_this_process(serve: Callable[..., Running]) -> None:
    """One rule: answer i of a prompt draws from (seed, i). In float32, whose rounding decides no token here."""
    running = serve(loading={"dtype": "float32"})
    pipe = running.service.ready().pipe
    settings = {"temperature": 1.2, "top_k": 0, "top_p": 1.0}
    ids = torch.tensor([pipe.encode("If the file")])
    for seed in (1, 2):
        drawn = {**settings, "do_sample": True, "seed": seed, "max_new_tokens": 12}
        here = pipe.model.generate(ids, **drawn, num_return_sequences=2)[:, ids.shape[1] :]
        there = running.post("/v1/completions", prompt="If the file", seed=seed, max_tokens=12, n=2, **settings).json()
        texts = [pipe.tokenizer.decode(row, skip_special_tokens=True) for row in here]
        assert [choice["text"] for choice in there["choices"]] == texts and texts[0] != texts[1]
