"""Gemma 3 270M as Google trained it (Q4_K_M): the logits that llama.cpp computes from the same file, and its tokens."""

from __future__ import annotations

import pytest
import torch

import gemmakit

PROMPT = "The capital of France is"
IDS = [2, 818, 5279, 529, 7001, 563]
# " the capital of the country of France. It is the largest city in France and", greedy in float32.
TOKENS = [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001, 532]
# llama.cpp v0.5.0 on a CPU, keys and values in float32: its two likeliest tokens after each and their logits.
LLAMA = [
    ((506, 19.072), (496, 18.604)), ((5279, 17.57), (1346, 15.537)), ((529, 22.09), (3207, 19.436)),
    ((506, 19.462), (7001, 18.852)), ((2891, 16.266), (3640, 16.074)), ((236761, 19.585), (529, 19.557)),
    ((7001, 19.038), (506, 18.608)), ((236761, 20.945), (236764, 20.144)), ((1030, 21.538), (669, 20.852)),
    ((563, 24.178), (815, 21.793)), ((506, 20.1), (5628, 19.489)), ((5279, 16.71), (7488, 16.4)),
    ((3207, 20.848), (532, 18.815)), ((528, 23.477), (529, 20.934)), ((7001, 26.185), (506, 25.805)),
    ((236761, 22.116), (532, 22.055)),
]  # fmt: skip
# What a product reads is rounded to 8 bits there, which moves a logit by so much.
ROUNDED = 0.6


@pytest.fixture(scope="module")
def exact(gemma3_gguf):
    """In float32: the file's blocks as numbers, unrounded."""
    return gemmakit.AutoModelForCausalLM.from_pretrained(gemma3_gguf, dtype="float32")


def test_the_configuration_is_the_released_one(exact):
    released = gemmakit.GemmaConfig.preset("gemma3-270m")
    for i in range(released.num_hidden_layers):
        assert exact.config.layer(i) == released.layer(i)
    assert exact.config.rope_parameters == released.rope_parameters
    assert (exact.config.vocab_size, exact.config.hidden_size) == (released.vocab_size, released.hidden_size)


def test_logits_are_llama_cpps_as_far_as_it_does_not_round_them(exact):
    with torch.no_grad():
        logits = exact(torch.tensor([IDS + TOKENS])).logits[0, len(IDS) - 1 : -1]
    for row, likeliest in zip(logits, LLAMA, strict=True):
        for token, theirs in likeliest:
            assert float(row[token]) == pytest.approx(theirs, abs=ROUNDED), (token, theirs)


def test_greedy_tokens_are_llama_cpps_but_for_near_ties(exact):
    out = exact.generate(torch.tensor([IDS]), max_new_tokens=len(TOKENS), do_sample=False)[0, len(IDS) :].tolist()
    assert out == TOKENS
    others = {i: (best, dict(pair)[token]) for i, (token, pair) in enumerate(zip(TOKENS, LLAMA, strict=True))
              if token != pair[0][0] for best in [pair[0][1]]}  # fmt: skip
    assert list(others) == [5, 11, 15]
    assert all(best - ours < ROUNDED for best, ours in others.values())
