"""What is learnt from rows does not depend on how they are laid out: padded on either side, packed, or in parts."""

import warnings

import pytest
import torch
import transformers
from tiny_gemma import VOCAB, far, tiny

import gemmakit
from gemmakit.pytorch.loss import next_labels

# float32: sums run in another order, over about 20 targets.
CLOSE = 2e-6
LENGTHS = (9, 4, 7)


def rows():
    made = [torch.randint(4, VOCAB, (length,)) for length in LENGTHS]
    for row in made:
        row[0] = 2
    return made


def padded(rows, side):
    """ids, mask, and labels of all that is not padding."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def packed(rows):
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    ids = torch.cat(rows)[None]
    return dict(input_ids=ids, position_ids=positions, labels=ids)


def targets(batch):
    return int((next_labels(batch["labels"], batch.get("attention_mask"), batch.get("position_ids")) != -100).sum())


def learnt(model, *batches, num_items=None, **how):
    """The loss over all batches, and every gradient."""
    model.zero_grad(set_to_none=True)
    num_items = sum(map(targets, batches)) if num_items is None else num_items
    losses = [model(**batch, num_items_in_batch=num_items, **how).loss for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=CLOSE, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert far(ours[1][name], gradient) < 2e-5, name


def alone(model, texts):
    return learnt(model, *(dict(input_ids=row[None], labels=row[None]) for row in texts))


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_learns_what_its_rows_learn_alone(side, chunk):
    model, texts = tiny().train(), rows()
    batch = padded(texts, side)
    assert targets(batch) == sum(LENGTHS) - len(LENGTHS)
    same(learnt(model, batch, loss_chunk_size=chunk), alone(model, texts))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_of_a_padded_batch_is_over_the_targets_of_its_rows(side):
    """Without num_items_in_batch, and with labels that name even the padding."""
    model, texts = tiny(), rows()
    batch = padded(texts, side)
    loss = model(**batch).loss.detach()
    torch.testing.assert_close(loss, alone(model, texts)[0], rtol=CLOSE, atol=0)
    if side == "left":
        batch["labels"] = batch["input_ids"]
        torch.testing.assert_close(model(**batch).loss.detach(), loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_packed_row_learns_what_its_documents_learn_alone(attention):
    model, texts = tiny(attn_implementation=attention).train(), rows()
    batch = packed(texts)
    assert targets(batch) == sum(LENGTHS) - len(LENGTHS)
    reference = tiny(attn_implementation="eager").train()
    same(learnt(model, batch), alone(reference, texts))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("counts", [True, False], ids=["positions count on in padding", "positions stop in padding"])
def test_a_mask_beside_a_packed_row_does_not_join_its_documents(attention, padding, counts):
    """Most collators pass one. In transformers documents then see one another, and each is asked for the next."""
    model, texts = tiny(attn_implementation=attention).train(), rows()
    batch = packed(texts)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if padding != "none":
        width = (3, 0) if padding == "left" else (0, 3)
        batch = {name: torch.nn.functional.pad(x, width, value=-100 * (name == "labels")) for name, x in batch.items()}
        if counts and padding == "right":
            batch["position_ids"][:, -3:] = batch["position_ids"][:, -4:-3] + torch.arange(1, 4)
    assert targets(batch) == sum(LENGTHS) - len(LENGTHS)
    same(learnt(model, batch), alone(tiny(attn_implementation="eager").train(), texts))


@pytest.mark.parametrize("gap", [(2, 3), (5, 6), (1, 8)])
@pytest.mark.parametrize("positions", ["places", "counted"])
def test_a_gap_in_the_mask_is_no_end_of_a_document(gap, positions):
    """Whether positions count what is hidden or not."""
    model, ids = tiny(), rows()[0][None]
    mask = torch.ones_like(ids)
    mask[:, slice(*gap)] = 0
    given = torch.arange(ids.shape[1])[None] if positions == "places" else mask.cumsum(-1) - 1
    cached = model(ids, attention_mask=mask, position_ids=given, past_key_values=gemmakit.DynamicCache())
    found = model(ids, attention_mask=mask, position_ids=given, use_cache=False).logits
    torch.testing.assert_close(found, cached.logits)


def test_transformers_joins_packed_documents_where_there_is_a_mask(tmp_path):
    """All ones, as a collator makes it. Without it each document gets what it gets alone; ours does either way."""
    ours, batch = tiny(), packed(rows())
    ours.save_pretrained(tmp_path)
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path).eval()
    ids, positions, mask = batch["input_ids"], batch["position_ids"], torch.ones_like(batch["input_ids"])
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    joined = theirs(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    assert far(joined, expected) > 0.01
    assert far(ours(ids, position_ids=positions, attention_mask=mask).logits, expected) < 1e-4


def test_uneven_parts_learn_what_the_whole_learns():
    model, texts = tiny().train(), rows()
    whole = learnt(model, padded(texts, "left"))
    same(learnt(model, padded(texts[:1], "left"), padded(texts[1:], "right")), whole)
    means = learnt(model, padded(texts[:1], "left"), num_items=LENGTHS[0] - 1)[0]
    means = (means + learnt(model, padded(texts[1:], "left"), num_items=sum(LENGTHS[1:]) - 2)[0]) / 2
    assert abs(means - whole[0]) > 100 * CLOSE  # the mean of means is something else


def test_a_mask_over_past_tokens_hides_by_its_last_columns():
    labels = torch.tensor([[5, 6, 7]])
    mask = torch.tensor([[0, 1, 0, 1, 1]])
    assert next_labels(labels, mask).tolist() == [[-100, 7, -100]]


@pytest.mark.parametrize("kind", ["GemmaForCausalLM", "GemmaForTokenClassification", "GemmaForSequenceClassification"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_mean_over_nothing_is_said(kind, chunk):
    """transformers gives NaN and is silent; a sum over several batches is no such mean."""
    model, ids = tiny(kind=getattr(gemmakit, kind)), torch.cat(rows())[None]
    causal = kind == "GemmaForCausalLM"
    labels = torch.full((1,) if kind.endswith("SequenceClassification") else ids.shape, -100)
    how = dict(loss_chunk_size=chunk) if causal else {}
    with pytest.warns(UserWarning, match="nothing is left to learn: every target is -100"):
        assert model(ids, labels=labels, **how).loss.isnan()
    if causal:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model(ids, labels=labels, num_items_in_batch=3, **how).loss == 0
