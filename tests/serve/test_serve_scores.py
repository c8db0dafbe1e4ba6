"""Log probabilities, echoes, several answers, penalties, stops: what a client is told beside the text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest
import torch
from running_server import NAME, Running

import gemmakit

QUESTION = [{"role": "user", "content": "What is 34 + 58?"}]
TEXT = "If the file"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model():
    return gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model())


@pytest.fixture(scope="module")
def tokenizer():
    return gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())


def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    """(S, V) log probabilities of what comes after each token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def test_echo_scores_the_prompt_as_the_model_does(client, model, tokenizer):
    ids = tokenizer(TEXT).input_ids
    said = client.completions.create(model=NAME, prompt=TEXT, max_tokens=1, echo=True, logprobs=2, temperature=0)
    (choice,) = said.choices
    assert choice.text.startswith(TEXT)
    own = logprobs_of(model, ids)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    told = choice.logprobs.token_logprobs[1 : len(ids)]
    # bfloat16 logits by another path: packed, in pages
    assert told == pytest.approx([own[i, token].item() for i, token in enumerate(ids[1:])], abs=0.05)
    assert len(choice.logprobs.tokens) == len(ids) + 1
    assert "".join(choice.logprobs.tokens[1:]) == choice.text
    assert choice.logprobs.text_offset[1:] == [
        len("".join(choice.logprobs.tokens[1:i])) for i in range(1, len(ids) + 1)
    ]
    best = choice.logprobs.top_logprobs[-1]
    assert max(best, key=best.get) == choice.logprobs.tokens[-1]


def test_echo_alone_scores_without_a_new_token(client, tokenizer):
    ids = tokenizer(TEXT).input_ids
    one = client.completions.create(model=NAME, prompt=ids, max_tokens=1, echo=True, logprobs=1).choices[0]
    none = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert none.text == TEXT and none.finish_reason == "length"
    assert none.logprobs.token_logprobs == one.logprobs.token_logprobs[: len(ids)]


def test_chat_scores_are_those_of_the_models_own_distribution(client, tokenizer):
    asked = dict(model=NAME, messages=QUESTION, max_tokens=6, seed=3, temperature=0.5, logprobs=True, top_logprobs=4)
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    streamed = [one for c in chunks if c.logprobs for one in c.logprobs.content]
    assert streamed == whole.logprobs.content and len(streamed) == 6
    for one in streamed:
        assert bytes(one.bytes).decode() == one.token
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1 + 1e-5
        tops = [top.logprob for top in one.top_logprobs]
        assert tops == sorted(tops, reverse=True) and len(tops) == 4 and one.logprob <= tops[0]
    assert "".join(one.token for one in streamed) == whole.message.content


def test_scores_are_the_same_whatever_temperature_and_processors_do(client):
    asked = dict(model=NAME, prompt=TEXT, max_tokens=1, logprobs=3)
    plain = client.completions.create(**asked, temperature=0).choices[0].logprobs.top_logprobs
    warm = client.completions.create(**asked, temperature=1.5, seed=1, presence_penalty=1).choices[0].logprobs
    told = {token: score for token, score in warm.top_logprobs[0].items() if token in plain[0]}
    assert told == plain[0]


def test_several_answers_are_each_their_own(client):
    asked = dict(model=NAME, prompt="Return the", max_tokens=12, temperature=1.2, seed=5)
    said = client.completions.create(**asked, n=3)
    assert [choice.index for choice in said.choices] == [0, 1, 2]
    assert len({choice.text for choice in said.choices}) == 3
    assert said.choices[0].text == client.completions.create(**asked).choices[0].text
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(**asked, n=3, stream=True):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [streamed[i] for i in range(3)] == [choice.text for choice in said.choices]
    assert said.usage.completion_tokens <= 36
    assert said.usage.prompt_tokens == client.completions.create(**asked).usage.prompt_tokens


def test_the_best_of_several_is_told(client):
    asked = dict(model=NAME, prompt="Return the", max_tokens=6, temperature=1.5, seed=5, logprobs=0)
    every = client.completions.create(**asked, n=4).choices

    def mean(choice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = client.completions.create(**asked, n=1, best_of=4).choices
    assert len(best) == 1 and mean(best[0]) == pytest.approx(max(mean(choice) for choice in every), abs=1e-6)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [" =", ["zebra", "58"], [" + 58 =", " = 9"], "4"])
def test_stops_end_the_text_before_them_and_are_never_told(client, stop, stream):
    asked = dict(model=NAME, messages=QUESTION, temperature=0)
    full = client.chat.completions.create(**asked).choices[0].message.content
    stops = [stop] if isinstance(stop, str) else stop
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stop=stop, stream=True)]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        choice = client.chat.completions.create(**asked, stop=stop).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert text == full[: min(place for one in stops if (place := full.find(one)) >= 0)]
    assert reason == "stop"


def test_penalties_and_biases_change_what_is_said(client, tokenizer):
    asked = dict(model=NAME, prompt="Return the", max_tokens=20, temperature=0, extra_body={"ignore_eos": True})
    again = client.completions.create(**asked, logprobs=0, frequency_penalty=-2).choices[0]
    never = client.completions.create(**asked, logprobs=0, presence_penalty=2, frequency_penalty=2).choices[0]

    def most(choice) -> int:
        return max(choice.logprobs.tokens.count(token) for token in choice.logprobs.tokens)

    assert most(never) < 4 < most(again)
    token = tokenizer("x", add_special_tokens=False).input_ids[0]
    biased = client.completions.create(**asked, logit_bias={str(token): 100}).choices[0].text
    assert biased == tokenizer.decode([token] * 20)


def test_penalties_are_openais():
    from gemmakit.serve.generation import Penalties

    ids, scores = torch.tensor([[5, 5, 1, 2, 2]]), torch.zeros(1, 6)
    assert Penalties(2, 0.5, 0.25)(ids, scores).tolist() == [[0, -0.75, -1.25, 0, 0, 0]]


def test_tokens_that_are_no_whole_characters_are_told_by_their_bytes(server: Running, tokenizer):
    asked = {"prompt": "x", "regex": "🙂é", "max_tokens": 20, "logprobs": 0, "temperature": 0}
    said = server.post("/v1/completions", **asked).json()["choices"][0]
    assert said["text"] == "🙂é"
    assert any(token.startswith("bytes:\\x") for token in said["logprobs"]["tokens"])


def test_a_stream_has_whole_characters_only(client):
    asked = dict(model=NAME, prompt="x", max_tokens=40, temperature=0, stream=True, extra_body={"regex": "(🙂é-){4}"})
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked)]
    assert [piece for piece in pieces if piece] == ["🙂é-"] * 4


def test_prefixes_are_shared_within_a_key_or_salt_only(serve):
    from gemmakit.serve.settings import ServeSettings

    server = serve(ServeSettings(api_keys=("one", "two")))

    def cached(key: str, **body) -> int:
        import httpx

        asked = {"prompt": [2, *range(300, 360)], "max_tokens": 1, **body}
        said = httpx.post(f"{server.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {key}"})
        return said.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0 and cached("one") > 0
    assert cached("two") == 0 and cached("two") > 0
    assert cached("one", cache_salt="shared") == 0 and cached("two", cache_salt="shared") > 0
    assert cached("one", cache_salt="other") == 0
