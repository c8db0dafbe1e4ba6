"""An engine says whether each request's bits are its own, and why not; where it says so, they are."""

import random

import pytest
import torch

from gemmakit import GemmaConfig, GemmaForCausalLM
from gemmakit.errors import InputError
from gemmakit.pytorch import attention
from gemmakit.pytorch.decode.batch import BatchEngine, Request
from gemmakit.pytorch.decode.processors import logits as processors
from gemmakit.pytorch.kernels import cpu, is_batch_invariant

native = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.decision().why}")
SIZES = dict(vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.5)  # fmt: skip


def made(**fields):
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**{**SIZES, **fields})).eval()


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def overridden(model):
    model.model.norm.forward = model.model.norm.forward


def replaced(model):
    class Own(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model.model.layers[0].mlp.up_proj = Own(24, 32, bias=False)


class Doubling(GemmaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


AGAINST = {
    "model.layers.1.mlp has a hook": lambda: (model := made(), hooked(model))[0],
    "model.norm has a method of its own, forward": lambda: (model := made(), overridden(model))[0],
    "model.layers.0.mlp.up_proj is a": lambda: (model := made(), replaced(model))[0],
    "Doubling": lambda: Doubling(GemmaConfig(**SIZES)).eval(),
    "attends through torch: attn_implementation is 'eager'": lambda: made(attn_implementation="eager"),
    "no native kernels for torch.float64": lambda: made().double(),
    "lm_head is in torch.float32 and the activations in torch.bfloat16": lambda: mixed(),
    "'dynamic' follow the longest text": lambda: made(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
}


def mixed():
    model = made(tie_word_embeddings=False).bfloat16()
    model.lm_head.float()
    return model


@native
@pytest.mark.parametrize("why", AGAINST)
def test_what_is_against_it_is_said_and_raised_where_it_is_asked_for(why):
    model = AGAINST[why]()
    engine = BatchEngine(model, cache_tokens=64)
    assert why in engine.batch_invariant.why
    assert not engine._runner.invariant
    with pytest.raises(InputError, match="batch_invariant is True, but"):
        BatchEngine(model, cache_tokens=64, batch_invariant=True)


@native
def test_an_attention_function_of_the_users_own_is_against_it(monkeypatch):
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "sdpa", lambda *args, **told: attention.sdpa(*args, **told))
    assert "attends through torch" in BatchEngine(made(), cache_tokens=64).batch_invariant.why


def test_without_kernels_it_is_not_had(monkeypatch):
    monkeypatch.setattr("gemmakit.native._loaded", lambda: (None, "not compiled"))
    assert "not compiled" in BatchEngine(made(), cache_tokens=64).batch_invariant.why


@native
@pytest.mark.parametrize("asked", [None, True, False])
def test_what_is_decided_is_what_runs(asked, monkeypatch):
    model, seen = made(), []
    engine = BatchEngine(model, cache_tokens=64, batch_invariant=asked)
    forward = GemmaForCausalLM.forward

    def watched(*args, **told):
        seen.append(is_batch_invariant())
        return forward(*args, **told)

    monkeypatch.setattr(GemmaForCausalLM, "forward", watched)
    engine.add(Request([2, 5, 9], settings={"max_new_tokens": 2}))
    while engine.has_work:
        engine.step()
    assert set(seen) == {asked is not False}
    assert engine.batch_invariant.why == ("batch_invariant is False" if asked is False else "")


def answers(model, requests, threads, order=None, **sizes):
    """Tokens and log probabilities of each request, by its place."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = BatchEngine(model, page_size=4, cache_tokens=2048, **sizes)
        assert not engine.batch_invariant.why
        ids = {engine.add(requests[place]): place for place in (order or range(len(requests)))}
        found = {place: [] for place in ids.values()}
        while engine.has_work:
            for event in engine.step():
                found[ids[event.id]].append((event.token, event.logprob, event.top_logprobs))
        return found
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu_erf", "head_dim": 16, "num_key_value_heads": 1}])
def test_answers_are_the_same_alone_and_together_on_any_number_of_threads(fields):
    model, rng = made(**fields).bfloat16(), random.Random(0)
    requests = [
        Request(
            [2, *(rng.randrange(4, 60) for _ in range(length))],
            settings={"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True, "seed": length, "top_p": 0.9},
            logprobs=2,
        )
        for length in (1, 300, 40, 7)
    ]
    alone = {}
    for place, request in enumerate(requests):
        alone[place] = answers(model, [request], 1)[0]
    for threads, order, size in ((1, [3, 1, 0, 2], 4), (2, [1, 3, 2, 0], 4), (2, [0, 1, 2, 3], 2)):
        assert answers(model, requests, threads, order, max_batch_size=size, prefill_tokens=37) == alone


@pytest.mark.parametrize(
    "process",
    [
        processors.TopP(0.9), processors.TopK(7), processors.MinP(0.02), processors.TopH(0.4), processors.TypicalP(0.8),
        processors.EpsilonCutoff(1e-4), processors.EtaCutoff(1e-3), processors.RenormalizeLogits(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_scores_do_not_depend_on_the_rows_beside_it(process, threads):
    # From rows of one likely token to such as take most of the vocabulary to reach any share.
    scores = torch.randn(9, 50_001) * torch.linspace(0.01, 4, 9)[:, None]
    no_ids = torch.empty((9, 0), dtype=torch.long)
    alone = [process(no_ids[:1], line.clone()) for line in scores.split(1)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in ([0, 8], [8, 7, 3], list(range(9)), [4]):
            together = process(no_ids[rows], scores[rows].clone())
            for row, line in zip(rows, together.split(1), strict=True):
                assert torch.equal(line, alone[row])
    finally:
        torch.set_num_threads(before)
