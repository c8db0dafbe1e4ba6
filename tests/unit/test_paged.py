"""The paged cache under the model: rows in pages see what rows in a growing cache see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit import DynamicCache, GemmaConfig, GemmaForCausalLM
from gemmakit.errors import InputError, NotEnoughMemory
from gemmakit.pytorch.cache import paged as cache_paged
from gemmakit.pytorch.cache.paged import PagedCache, Span, bytes_per_token

VOCAB = 60
# float32 sums in another order; logits are of size 1 to 10.
CLOSE = dict(atol=2e-5, rtol=1e-4)


def tiny(kv_heads=2, **fields):
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=128,
                         initializer_range=0.3, **fields)  # fmt: skip
    return GemmaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def paged(model, pages=12, page_size=4):
    return PagedCache(model.config, pages, page_size, torch.float32)


def ran(model, cache, spans, tokens):
    """Logits (rows, V) of the last token of each span. tokens: the row's ids, all of them."""
    where = cache.place(spans)
    ids = torch.tensor([t[s.start : s.end] for s, t in zip(spans, tokens, strict=True)])
    several = len(spans) > 1
    out = model(
        ids,
        attention_mask=where.mask if several else None,
        position_ids=where.positions if several else None,
        past_key_values=cache,
    )
    return out.logits[:, -1]


def alone(model, tokens):
    return model(torch.tensor([tokens]), past_key_values=DynamicCache()).logits[0, -1]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_rows_in_pages_give_the_logits_of_rows_alone(kv_heads, attn, data):
    model = tiny(kv_heads, attn_implementation=attn)
    size = data.draw(st.integers(1, 6), label="page_size")
    lengths = data.draw(st.lists(st.integers(2, 14), min_size=1, max_size=4), label="lengths")
    needed = [-(-n // size) for n in lengths]
    order = data.draw(st.permutations(range(1, sum(needed) + 1)), label="pages")
    pages = [[order.pop() for _ in range(n)] for n in needed]
    rows = [torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    cache = paged(model, sum(needed), size)
    for held in cache.storage:
        held[:, 1:] = 7.0  # what former owners left: finite, for the engine clears pages
    for row, own in zip(rows, pages, strict=True):  # all but the last token, in two parts
        cut = data.draw(st.integers(0, len(row) - 2), label="cut")
        for start, end in ((0, cut), (cut, len(row) - 1)):
            if start < end:
                ran(model, cache, [Span(own, start, end)], [row])
    logits = ran(model, cache, [Span(own, len(row) - 1, len(row)) for row, own in zip(rows, pages, strict=True)], rows)
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, alone(model, row), **CLOSE)
    assert not any(held[:, 0].any() for held in cache.storage), "the page of nobody stays zero"


def test_a_row_writes_to_its_own_pages_only():
    model, page_size = tiny(), 4
    cache = paged(model, 6, page_size)
    row = list(range(2, 13))
    ran(model, cache, [Span([5, 2, 3], 0, 11)], [row])
    for held in cache.storage:
        written = held.abs().sum((0, 3, 4)) > 0  # (pages + 1, page_size)
        assert written[[5, 2]].all()
        assert written[3].tolist() == [True, True, True, False]
        assert not written[[0, 1, 4, 6]].any()


def test_rows_of_different_lengths_are_placed_side_by_side():
    cache = paged(tiny(), 12, 4)
    where = cache.place([Span([7, 2, 9], 8, 9), Span([4], 2, 3), Span([5, 6], 4, 5)])
    assert where.table.tolist() == [[7, 2, 9], [4, 0, 0], [5, 6, 0]], "behind a row stands the page of nobody"
    assert where.places.tolist() == [9 * 4, 4 * 4 + 2, 6 * 4]
    assert where.positions.tolist() == [[8], [2], [4]]
    assert where.mask.shape == (3, 1, 1, 12)
    assert where.mask.sum(-1).flatten().tolist() == [9, 3, 5]
    alone = cache.place([Span([7, 2, 9], 3, 9)])
    assert (alone.past, alone.keys) == (3, 9)
    assert alone.places.tolist() == [7 * 4 + 3, 8, 9, 10, 11, 9 * 4]


def test_memory_is_stated_and_constant():
    model = tiny()
    cache = paged(model, 5, 4)
    before, places = cache.nbytes, [held.data_ptr() for held in cache.storage]
    assert before == 6 * 4 * bytes_per_token(model.config, torch.float32) == sum(h.nbytes for h in cache.storage)
    ran(model, cache, [Span([1, 2], 0, 7)], [list(range(2, 9))])
    assert cache.nbytes == before
    assert [held.data_ptr() for held in cache.storage] == places


def test_cleared_pages_are_zero_and_others_are_not():
    cache = paged(tiny(), 4, 4)
    for held in cache.storage:
        held.fill_(float("nan"))
    cache.clear([1, 3])
    for held in cache.storage:
        assert not held[:, [1, 3]].any()
        assert held[:, [2, 4]].isnan().all()


def test_a_pass_without_a_placement_or_with_another_shape_is_refused():
    model = tiny()
    cache = paged(model)
    ids = torch.tensor([[2, 3, 4]])
    with pytest.raises(InputError, match=r"place\(\) before"):
        model(ids, past_key_values=cache)
    cache.place([Span([1], 0, 2)])
    with pytest.raises(InputError, match="1 rows of 3 tokens, but 1 rows with 2 tokens"):
        model(ids, past_key_values=cache)
    with pytest.raises(InputError, match="one at a time"):
        cache.place([Span([1], 0, 2), Span([2], 0, 1)])
    cache.reset()
    with pytest.raises(InputError, match=r"place\(\) before"):
        model(ids, past_key_values=cache)


def test_what_needs_rows_is_refused():
    cache = paged(tiny())
    for use in (lambda: cache.crop(1), lambda: cache[0], lambda: cache.batch_repeat_interleave(2),
                lambda: cache.reorder_cache(torch.tensor([0])), cache.to_legacy_cache):  # fmt: skip
        with pytest.raises(InputError, match="no rows of its own"):
            use()


def test_pages_that_do_not_fit_are_refused_before_they_are_taken():
    with pytest.raises(NotEnoughMemory, match=r"bytes.*cache_tokens or max_batch_size"):
        paged(tiny(), pages=10**12)


def test_no_number_of_the_host_makes_it_wait_for_a_gpu(monkeypatch):
    """Copies from pinned memory alone do not wait for what was started before them."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **named: asked.append(named) or self)
    gpu = torch.device("cuda", 0)
    assert cache_paged.sent([[3, 4]], gpu).tolist() == [[3, 4]]
    assert asked == ["pinned", {"non_blocking": True}]


def test_placing_and_clearing_send_every_number_that_way(monkeypatch):
    sent, made = [], torch.tensor
    config = GemmaConfig(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    cache = PagedCache(config, 4, 4, torch.float32)
    monkeypatch.setattr(cache_paged, "sent", lambda numbers, device: sent.append(numbers) or made(numbers))
    monkeypatch.setattr(cache_paged.torch, "tensor", None)
    cache.clear([1, 2])
    cache.place([Span([1], 2, 3), Span([2, 3], 4, 5)])
    assert sent == [[1, 2], [6, 12], [[1, 0], [2, 3]], [3, 5]]  # the pages once, not once a layer
