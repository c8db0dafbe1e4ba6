"""A loss computed some positions at a time is the loss of all logits, and so are its gradients; its memory is not."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gemma import far, left_padded, prompts, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemmakit.errors import InputError
from gemmakit.pytorch.loss import causal_loss, chunked_loss


def batch(rows=2, width=11):
    ids, mask = left_padded([row[: width - 3 * i] for i, row in enumerate(prompts(rows, width))], width)
    return ids, mask, ids.masked_fill(mask == 0, -100)


def trained(model, chunk, scale=1.0, **given):
    """The loss, and every gradient by name."""
    model.zero_grad(set_to_none=True)
    ids, mask, labels = batch()
    out = model(ids, attention_mask=mask, labels=labels, loss_chunk_size=chunk, **given)
    assert (out.logits is None) == (chunk is not None)
    (out.loss * scale).backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def agree(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert far(ours[name], theirs[name]) < tolerance, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 7, 22, 1000])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(9.0)])
def test_loss_and_gradients_are_those_of_all_logits(tied, chunk, items):
    """float32; sums run in another order: 1e-6 of a loss, 1e-5 of a gradient's largest."""
    model = tiny(tie_word_embeddings=tied).train()
    loss, gradients = trained(model, None, num_items_in_batch=items)
    ours, mine = trained(model, chunk, num_items_in_batch=items)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    agree(mine, gradients, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [3, 22])
def test_half_formats_agree_up_to_their_rounding(dtype, chunk):
    """The loss comes from the same rounded logits. A gradient is summed in float32 and rounded once: it is off by what
    a product of half numbers is, some units in the last place."""
    model = tiny(tie_word_embeddings=False).to(dtype).train()
    loss, gradients = trained(model, None)
    ours, mine = trained(model, chunk)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    agree(mine, gradients, 16 * torch.finfo(dtype).eps)
    exact = trained(model.float(), None)[1]["lm_head.weight"]
    assert far(mine["lm_head.weight"], exact) < 4 * torch.finfo(dtype).eps


def test_a_scaled_loss_scales_every_gradient():
    model = tiny(tie_word_embeddings=False).train()
    _, once = trained(model, 4)
    _, thrice = trained(model, 4, scale=3.0)
    agree(thrice, {n: 3 * g for n, g in once.items()}, 1e-5)


def test_large_scales_do_not_vanish_in_half_precision():
    """As with a gradient scaler: the scale multiplies sums, not the small numbers of single positions."""
    model = tiny(tie_word_embeddings=False).half().train()
    _, plain = trained(model, 4, num_items_in_batch=10**6)
    _, scaled = trained(model, 4, scale=1e6, num_items_in_batch=10**6)
    assert far(scaled["lm_head.weight"], trained(model.float(), 4, num_items_in_batch=1)[1]["lm_head.weight"]) < 4e-3
    assert far(plain["lm_head.weight"].float() * 1e6, scaled["lm_head.weight"].float()) < 0.1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape_chunk_and_ignored_labels(data):
    n, D, V = (data.draw(st.integers(1, high)) for high in (9, 5, 12))
    chunk = data.draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    head = torch.nn.Linear(D, V, bias=data.draw(st.booleans()))
    from gemmakit.pytorch.layers import Linear

    plain = Linear(D, V, bias=head.bias is not None)
    with torch.no_grad():
        for own, other in zip(plain.parameters(), head.parameters(), strict=True):
            own.copy_(other.normal_(generator=generator).mul_(3))
    targets = torch.randint(0, V, (1, n), generator=generator)
    targets[torch.rand(1, n, generator=generator) < 0.4] = -100
    hidden = torch.randn(1, n, D, generator=generator)
    got = []
    for module, size in ((plain, chunk), (head, chunk), (plain, None)):  # head: another class, so run as a module
        x = hidden.clone().requires_grad_()
        module.zero_grad()
        whole = size is None
        loss = causal_loss(module(x), targets) if whole else chunked_loss(module, x, targets, size)
        loss.backward()
        got.append([loss.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
    for theirs in got[:2]:
        for a, b in zip(theirs, got[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_nothing_to_predict_is_no_number_either_way():
    head = tiny().lm_head
    hidden, targets = torch.randn(1, 3, 40), torch.full((1, 3), -100)
    assert causal_loss(head(hidden), targets).isnan()
    assert chunked_loss(head, hidden, targets, 2).isnan()


def test_only_what_is_trained_gets_a_gradient():
    model = tiny(tie_word_embeddings=False).train()
    _, gradients = trained(model, None)
    model.requires_grad_(False)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(True)
    _, mine = trained(model, 4)
    assert set(mine) == {n for n in gradients if n.startswith("model.layers.0.")}
    agree(mine, {n: gradients[n] for n in mine}, 1e-5)
    with torch.no_grad():
        assert not model(batch()[0], labels=batch()[2], loss_chunk_size=4).loss.requires_grad


def test_a_head_with_hooks_sees_its_calls_and_trains_the_same():
    model = tiny(tie_word_embeddings=False).train()
    loss, gradients = trained(model, None)
    seen = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    ours, mine = trained(model, 8)
    assert seen[:3] == [8, 8, 6]
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    agree(mine, gradients, 1e-5)


def test_with_recomputed_layers_and_a_part_of_the_positions():
    model = tiny().train()
    ids, mask, labels = batch()
    expected = model(ids, attention_mask=mask, labels=labels, logits_to_keep=5).loss
    model.gradient_checkpointing_enable()
    loss = model(ids, attention_mask=mask, labels=labels, logits_to_keep=5, loss_chunk_size=3).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True, "8"])
def test_a_chunk_that_is_none_is_refused(chunk):
    ids, _, labels = batch()
    with pytest.raises(InputError, match=r"loss_chunk_size is .* >= 1"):
        tiny()(ids, labels=labels, loss_chunk_size=chunk)


def test_a_chunk_without_labels_is_refused():
    with pytest.raises(InputError, match="give labels"):
        tiny()(prompts(), loss_chunk_size=8)


# -- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def largest(chunk, hooked=False, positions=120, V=1500):
    model = tiny(vocab_size=V, hidden_size=8, max_position_embeddings=256).train()
    if hooked:
        model.lm_head.register_forward_hook(lambda *_: None)
    ids = prompts(1, positions)
    with Largest() as seen:
        model(ids, labels=ids, loss_chunk_size=chunk).loss.backward()
    return seen.numel


@pytest.mark.parametrize("hooked", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(hooked):
    assert largest(None, hooked) == 120 * 1500
    assert largest(16, hooked) == 16 * 1500


MEASURED = """
import resource, sys, torch
import gemmakit
config = gemmakit.GemmaConfig(vocab_size=256000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=1, num_key_value_heads=1, head_dim=16, dtype="bfloat16")
model = gemmakit.GemmaForCausalLM(config).bfloat16().train()
ids = torch.randint(4, 256000, (1, 1024))
model(ids[:, :8], labels=ids[:, :8], loss_chunk_size=8).loss.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(ids, labels=ids, loss_chunk_size=eval(sys.argv[1])).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere; run on Linux")
def test_a_training_step_of_the_whole_vocabulary_takes_a_fraction_of_the_memory():
    """1,024 positions of 256,000 logits are 1.05 GB in float32; 64 positions at a time 66 MB."""

    def peak_kib(chunk):
        done = subprocess.run([sys.executable, "-c", MEASURED, chunk], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert resource.getpagesize()
    assert peak_kib("None") > 1.5e6
    assert peak_kib("64") < 0.4e6
