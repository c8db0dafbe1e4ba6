"""The classification heads against transformers: logits, losses, gradients, pooling, and each other's checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import gemmakit
from gemmakit.pytorch.heads import GemmaForSequenceClassification, GemmaForTokenClassification

# float32 on both sides; the sums run in another order: a few times 1e-6 on values near 1, kept with a margin of ten.
CLOSE = dict(atol=3e-5, rtol=1e-4)

# 1 < K < N and K = 1; N * H is never D; two layers, so that a wrong hidden state is not the embedding.
SHAPES = [dict(num_attention_heads=4, num_key_value_heads=2), dict(num_attention_heads=3, num_key_value_heads=1)]
OURS = {"Sequence": GemmaForSequenceClassification, "Token": GemmaForTokenClassification}


def settings(shape, **more):
    base = dict(vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2, head_dim=8,
                max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1)  # fmt: skip
    return {**base, **shape, **more}


def pair(kind, shape, **more):
    """transformers' model and ours with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    theirs = getattr(transformers, f"GemmaFor{kind}Classification")(
        transformers.GemmaConfig(**settings(shape, **more))
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)  # norms and biases too: their fresh zeros would hide a missing one
    ours = OURS[kind](gemmakit.GemmaConfig(**settings(shape, **more))).eval()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(side="right", rows=3, length=7):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    for row in range(rows):
        hidden = slice(length - row, None) if side == "right" else slice(0, row)
        ids[row, hidden], mask[row, hidden] = 0, 0
    return ids, mask


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "multi-query"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_logits_equal_transformers_on_either_padding_side(shape, side):
    theirs, ours = pair("Sequence", shape, num_labels=3)
    ids, mask = batch(side)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits, **CLOSE
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_logits_equal_transformers_where_there_are_tokens(side):
    theirs, ours = pair("Token", SHAPES[0], num_labels=5)
    ids, mask = batch(side)
    with torch.no_grad():
        a, b = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **CLOSE)


LABELS = {
    "single, inferred": (dict(num_labels=4), torch.tensor([0, 3, 1])),
    "single, said": (dict(num_labels=4, problem_type="single_label_classification"), torch.tensor([2, -100, 1])),
    "multi, inferred": (dict(num_labels=3), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 1]])),
    "multi, said": (
        dict(num_labels=3, problem_type="multi_label_classification"),
        torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1]]),
    ),
    "regression, inferred": (dict(num_labels=1), torch.tensor([0.5, -2.0, 3.0])),
    "regression, column": (dict(num_labels=1), torch.tensor([[0.5], [-2.0], [3.0]])),
    "regression, several": (dict(num_labels=2, problem_type="regression"), torch.randn(3, 2)),
}


@pytest.mark.parametrize("case", LABELS)
def test_every_sequence_loss_and_gradient_equals_transformers(case):
    more, labels = LABELS[case]
    theirs, ours = pair("Sequence", SHAPES[0], **more)
    ids, mask = batch("left")
    a = ours(ids, attention_mask=mask, labels=labels)
    b = theirs(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(a.loss, b.loss, **CLOSE)
    same_gradients(a.loss, ours, b.loss, theirs)


def test_token_loss_and_gradient_equal_transformers_with_ignored_labels():
    theirs, ours = pair("Token", SHAPES[1], num_labels=5)
    ids, mask = batch("right")
    labels = torch.randint(0, 5, ids.shape, generator=torch.Generator().manual_seed(2))
    labels[mask == 0] = -100
    a, b = ours(ids, attention_mask=mask, labels=labels), theirs(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(a.loss, b.loss, **CLOSE)
    same_gradients(a.loss, ours, b.loss, theirs)


def same_gradients(a, ours, b, theirs):
    a.backward()
    b.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert p.grad.abs().max() > 0, f"{name} has no gradient"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_half_formats_stay_near_transformers(kind, dtype):
    theirs, ours = pair(kind, SHAPES[0], num_labels=3)
    ids, mask = batch("left")
    with torch.no_grad():
        exact = theirs(ids, attention_mask=mask).logits
        a = ours.to(dtype)(ids, attention_mask=mask).logits.float()
        b = theirs.to(dtype)(ids, attention_mask=mask).logits.float()
    keep = mask.bool() if kind == "Token" else slice(None)
    # Neither is exact in half: ours may be no further from float32 than twice theirs, and one rounding step.
    step = torch.finfo(dtype).eps * exact.abs().max()
    assert (a - exact)[keep].abs().max() <= 2 * (b - exact)[keep].abs().max() + step


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_transformers_loads_what_we_save_and_we_load_what_it_saves(kind, tmp_path):
    theirs, ours = pair(kind, SHAPES[0], num_labels=3, classifier_dropout=0.2)
    ids, mask = batch("left")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    ours2 = OURS[kind].from_pretrained(tmp_path / "theirs")
    theirs2 = getattr(transformers, f"GemmaFor{kind}Classification").from_pretrained(tmp_path / "ours")
    assert ours2.config.num_labels == theirs2.config.num_labels == 3
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        for model in (ours2, theirs2):
            got = model(ids, attention_mask=mask).logits
            keep = mask.bool() if kind == "Token" else slice(None)
            torch.testing.assert_close(got[keep], expected[keep], **CLOSE)


def test_cached_prefix_gives_the_same_sequence_logits():
    theirs, ours = pair("Sequence", SHAPES[0], num_labels=3)
    ids, _ = batch(rows=1)
    with torch.no_grad():
        head = ours(ids[:, :4], use_cache=True)
        cached = ours(ids[:, 4:], past_key_values=head.past_key_values, attention_mask=torch.ones(1, 7))
        torch.testing.assert_close(cached.logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("problem", ["single", "multi"])
def test_losses_do_not_write_their_guess_into_the_config(problem):
    # transformers stores the first guess and applies it to every later call; one config may serve two models.
    _, ours = pair("Sequence", SHAPES[0], num_labels=3)
    ids, mask = batch()
    before = copy.deepcopy(ours.config.to_dict())
    labels = torch.tensor([0, 1, 2]) if problem == "single" else torch.rand(3, 3)
    ours(ids, attention_mask=mask, labels=labels)
    assert ours.config.to_dict() == before
