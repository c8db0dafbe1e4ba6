"""Padded prompts run without their padding: the same tokens and caches, from fewer tokens run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gemmakit.pytorch.decode import capture, prompt
from gemmakit.pytorch.masks import visibility

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
from strategy_models import Uncaptured
from tiny_gemma import far, left_padded, prompts, reference_logits, tiny

LENGTHS = (40, 21, 17)
CONTEXT = dict(max_position_embeddings=128)


def batch(lengths=LENGTHS):
    return left_padded([row[:n] for row, n in zip(prompts(len(lengths), max(lengths)), lengths, strict=True)],
                       max(lengths))  # fmt: skip


def both(model, monkeypatch, **given):
    """generate() with packing and without; how many tokens the first pass of each ran."""
    ran, out = [], []
    for packed in (True, False):
        with monkeypatch.context() as patch:
            if not packed:
                patch.setattr(prompt, "packing_pays", lambda *_: False)
            seen = []
            embed = model.model.embed_tokens
            handle = embed.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0].numel()))
            ids, mask = batch()
            out.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=None, **given))
            handle.remove()
            ran.append(seen[0])
    return out, ran


SETTINGS = {
    "greedy": {},
    "sampled": dict(do_sample=True, seed=3),
    "copies": dict(do_sample=True, seed=3, num_return_sequences=2),
    "beams": dict(num_beams=3),
    "static": dict(cache_implementation="static"),
    "offloaded": dict(cache_implementation="offloaded"),
    "no cache": dict(use_cache=False),
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tokens_are_those_of_the_padded_run(how, kv_heads, monkeypatch):
    (ours, theirs), (few, many) = both(tiny(num_key_value_heads=kv_heads, **CONTEXT), monkeypatch, **SETTINGS[how])
    assert torch.equal(ours, theirs)
    assert (few, many) == (sum(LENGTHS), len(LENGTHS) * max(LENGTHS))


def test_keys_and_values_are_those_of_the_padded_run(monkeypatch):
    (ours, theirs), _ = both(tiny(**CONTEXT), monkeypatch, return_dict_in_generate=True, output_logits=True)
    assert far(ours.logits[0], theirs.logits[0]) < 1e-5  # float32, sums in another order
    mask = batch()[1].bool()
    for a, b in zip(ours.past_key_values, theirs.past_key_values, strict=True):
        for x, y in zip(a, b, strict=True):
            real = torch.nn.functional.pad(mask, (0, x.shape[2] - mask.shape[1]), value=True)[:, None, :, None]
            assert far(x * real, y * real) < 1e-5
            assert not (x * ~real).any(), "padding holds something"


def test_the_replayed_loop_starts_from_packed_prompts_too(monkeypatch):
    monkeypatch.setitem(capture.CAPTURES, "cpu", Uncaptured)
    model = tiny(**CONTEXT)
    ids, mask = batch()
    given = dict(attention_mask=mask, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(model.generate(ids, **given), model.generate(ids, cuda_graphs=False, **given))
    assert capture.captured_steps(model).entries


PLAIN = {
    "attentions": dict(return_dict_in_generate=True, output_attentions=True),
    "hidden states": dict(return_dict_in_generate=True, output_hidden_states=True),
    "chunks": dict(prefill_chunk_size=64),
    "hidden states of a strategy": dict(penalty_alpha=0.6, top_k=4),
}


@pytest.mark.parametrize("why", PLAIN)
def test_what_needs_the_padded_shapes_gets_them(why, monkeypatch):
    _, ran = both(tiny(**CONTEXT), monkeypatch, **PLAIN[why])
    assert ran == [len(LENGTHS) * max(LENGTHS)] * 2


@pytest.mark.parametrize("changes", [dict(attn_implementation="eager"), dict(use_bidirectional_attention=True)])
def test_attention_that_would_need_a_mask_runs_padded(changes, monkeypatch):
    _, ran = both(tiny(**CONTEXT, **changes), monkeypatch)
    assert ran == [len(LENGTHS) * max(LENGTHS)] * 2


@pytest.mark.parametrize(("lengths", "pays"), [
    ((40, 40, 20), True), ((40, 40, 39), False), ((15, 15, 1), False), ((40, 8, 8), True), ((60, 1, 1), True),
    ((20, 1, 1, 1), False),
])  # fmt: skip
def test_packing_is_for_prompts_with_enough_padding_and_length(lengths, pays):
    assert prompt.packing_pays(tiny(**CONTEXT), batch(lengths)[1].bool()) == pays


# -- documents end to end, which is what a packed batch is -----------------------------------------------------------

DOCUMENTS = (30, 16, 1, 25)


def packed_row():
    ids = prompts(1, sum(DOCUMENTS))
    return ids, torch.cat([torch.arange(n) for n in DOCUMENTS])[None]


def told(positions, **given):
    S = positions.shape[1]
    settings = dict(batch=len(positions), queries=S, keys=S, past=0, causal=True, position_ids=positions)
    return visibility(None, device=positions.device, **{**settings, "segmented": True, **given})


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_document_sees_itself_alone(kv_heads):
    model = tiny(num_key_value_heads=kv_heads, **CONTEXT)
    ids, positions = packed_row()
    assert told(positions).segments == DOCUMENTS
    number = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
    visible = (number[:, None] == number).tril()[None]
    with torch.no_grad():
        ours = model(ids, position_ids=positions).logits
    assert far(ours, reference_logits(model, ids, visible, positions)) < 1e-5


def test_gradients_are_those_under_a_mask():
    ids, positions = packed_row()
    gradients = []
    for attn in ("sdpa", "eager"):
        model = tiny(attn_implementation=attn, **CONTEXT).train()
        model(ids, position_ids=positions, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert far(gradient, gradients[1][name]) < 1e-4, name  # float32, through all layers


def test_short_documents_several_rows_and_other_kernels_keep_their_mask():
    _, positions = packed_row()
    assert told(positions, segmented=False).segments is None
    assert told(positions, causal=False).segments is None
    assert told(positions.expand(2, -1)).segments is None
    short = torch.cat([torch.arange(5) for _ in range(8)])[None]
    for given in (told(short), told(positions, segmented=False)):
        assert given.mask is not None
    assert told(torch.arange(40)[None]).segments is None
