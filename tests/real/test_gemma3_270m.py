"""Gemma 3 270M as Google trained it (Q4_K_M): llama.cpp's tokens and perplexity, and all ways of running it.

llama.cpp judges the file's weights as numbers in float32, written by us: of the blocks as they are stored it rounds to
8 bits what products read, which costs it more than half a percent.
"""

from __future__ import annotations

import json
import math

import pytest
import reference
import torch

import gemmakit

# Of two logits closer than this either may come out on top: float32's order of sums and a GELU in float16.
NEAR = 0.02
# Windows of the held-out text that are read here; benchmarks/real_quality.py reads all of them.
WINDOWS = 3

said = json.loads(reference.FILE.read_text())


@pytest.fixture(scope="module")
def tokenizer(gemma3_gguf):
    return gemmakit.GemmaTokenizerFast.from_pretrained(str(gemma3_gguf))


@pytest.fixture(scope="module")
def exact(gemma3_gguf):
    """In float32: the file's blocks as numbers, unrounded."""
    return gemmakit.AutoModelForCausalLM.from_pretrained(gemma3_gguf, dtype="float32")


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return reference.windows(tokenizer)[:WINDOWS]


@torch.no_grad()
def losses(model, pieces) -> list[float]:
    """Of each piece, the mean -log p of its tokens but the first."""
    found = []
    for piece in pieces:
        ids = torch.tensor([piece])
        logits = model(ids).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return found


@pytest.fixture(scope="module")
def exact_losses(exact, pieces):
    return losses(exact, pieces)


def perplexity(losses: list[float]) -> float:
    return math.exp(sum(losses) / len(losses))


def theirs(kind: str) -> list[float]:
    return [loss / count for loss, count in zip(said[kind]["losses"], said["tokens"], strict=False)][:WINDOWS]


def greedy(model, ids, count):
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def parted(model, prompts, kind: str) -> dict[tuple[int, int], float]:
    """(prompt, step) -> llama.cpp's gap between its best two, where ours is another; each step after what it said."""
    found = {}
    answers = zip(prompts, said[kind]["continuations"], said[kind]["gaps"], strict=True)
    for row, (ids, tokens, gaps) in enumerate(answers):
        ours = model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, len(ids) - 1 :].argmax(-1).tolist()
        found |= {(row, i): gaps[i] for i in range(len(tokens)) if ours[i] != tokens[i]}
    print(f"{kind}: {len(found)} of {len(prompts) * reference.NEW_TOKENS} steps part, at gaps {sorted(found.values())}")
    return found


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Twenty short ones, and one of 2,000 tokens: a window is 512."""
    return [*said["ids"], reference.long_prompt(tokenizer)]


def test_the_configuration_is_the_released_one(exact):
    released = gemmakit.GemmaConfig.preset("gemma3-270m")
    for i in range(released.num_hidden_layers):
        assert exact.config.layer(i) == released.layer(i)
    assert exact.config.rope_parameters == released.rope_parameters
    assert (exact.config.vocab_size, exact.config.hidden_size) == (released.vocab_size, released.hidden_size)


def test_the_vocabulary_of_the_file_gives_llama_cpps_ids(tokenizer):
    assert tokenizer(list(reference.PROMPTS))["input_ids"] == said["ids"]


def test_perplexity_is_llama_cpps_on_the_same_numbers(exact_losses):
    """Each window by itself within 2 in 10,000."""
    assert exact_losses == pytest.approx(theirs("float32"), abs=2e-4)


def test_greedy_tokens_are_llama_cpps_but_for_near_ties(exact, prompts):
    """40 tokens after each of 20 prompts and after 2,000 tokens, the file written by us and read by llama.cpp."""
    found = parted(exact, prompts, "float32")
    assert all(gap < NEAR for gap in found.values()), found


def test_the_file_as_it_is_stored_costs_next_to_nothing(exact_losses, gemma3_gguf, pieces):
    """Plain matrices in bfloat16, the embedding in the file's own 8 bits."""
    stored = gemmakit.AutoModelForCausalLM.from_pretrained(gemma3_gguf)
    assert stored.dtype == torch.bfloat16
    assert perplexity(losses(stored, pieces[:1])) == pytest.approx(perplexity(exact_losses[:1]), rel=1e-2)


# Perplexity that a form may add on the first window, in shares of float32's; int4 on top of 4-bit blocks adds 0.30.
SAVED = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.02, "int4": 0.35, "Q8_0": 0.02}


@pytest.fixture(scope="module")
def plain(gemma3_gguf, tmp_path_factory):
    """Its plain form in bfloat16, 536 MB, which others are made of."""
    out = tmp_path_factory.mktemp("plain")
    gemmakit.convert_checkpoint(gemma3_gguf, out, dtype="bfloat16")
    return out


@pytest.mark.parametrize("form", SAVED)
def test_saved_and_loaded_it_is_as_good_as_its_format(
    exact_losses, gemma3_gguf, tokenizer, pieces, tmp_path, form, request
):
    out = tmp_path / ("x.gguf" if form == "Q8_0" else "out")
    if form == "bfloat16":
        out = request.getfixturevalue("plain")
    elif form.startswith("int"):
        gemmakit.quantize_checkpoint(request.getfixturevalue("plain"), out, form)
    elif form == "Q8_0":
        gemmakit.convert_checkpoint(gemma3_gguf, out, type=form, dtype="float32")
    else:
        gemmakit.convert_checkpoint(gemma3_gguf, out, dtype=form)
    again = gemmakit.AutoTokenizer.from_pretrained(out)
    assert again.encode("The sea") == tokenizer.encode("The sea")
    model = gemmakit.AutoModelForCausalLM.from_pretrained(out)
    assert losses(model, pieces[:1])[0] <= exact_losses[0] + math.log1p(SAVED[form])


def test_batches_of_eight_and_a_stream_say_what_each_prompt_says_alone(exact, tokenizer):
    """Left padding and pages, windows counted from where each row begins. The order of sums alone differs."""
    texts, settings = list(reference.PROMPTS[:8]), dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    alone = [greedy(exact, ids, 8) for ids in said["ids"][:8]]
    assert exact.generate(**batch, **settings)[:, -8:].tolist() == alone
    assert [result.new_ids for result in exact.generate_batch(said["ids"][:8], **settings)] == alone
    for ids, tokens in zip(said["ids"][:2], alone, strict=False):
        assert [step.token for step in exact.stream(torch.tensor([ids]), **settings)] == tokens
