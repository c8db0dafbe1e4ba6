"""Attention of rows that lie end to end over their pages: float64's, and to the bit that of each query alone."""

import itertools
import random

import pytest
import torch
from instruction_sets import FORMATS, runnable, using
from seam_tools import native

from gemmakit.pytorch.kernels import cpu, reference

pytestmark = native


class Pass:
    """Rows of some lengths in pages that lie in any order; all of each row's tokens have queries, keys and values."""

    def __init__(self, lengths, dtype, N=4, K=2, H=32, size=4, seed=0):
        made = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=made).to(dtype)  # noqa: E731
        self.lengths, self.size = lengths, size
        self.q = [draw(n, N, H) for n in lengths]
        self.k, self.v = ([draw(n, K, H) for n in lengths] for _ in range(2))
        counts = [-(-n // size) for n in lengths]
        order = (torch.randperm(sum(counts), generator=made) + 1).tolist()
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        # What no row owns is no number, so that whoever looks there is seen.
        self.store = torch.full((2, sum(counts) + 1, size, K, H), torch.nan, dtype=dtype)
        for row, pages in enumerate(self.pages):
            for t in range(lengths[row]):
                at = pages[t // size], t % size
                self.store[0][at], self.store[1][at] = self.k[row][t], self.v[row][t]

    def run(self, spans, **told):
        """spans: (row, from, to) of the queries of a pass. (queries, N, H) a span."""
        width = max(len(self.pages[row]) for row, _, _ in spans)
        table = torch.tensor([self.pages[row] + [0] * (width - len(self.pages[row])) for row, _, _ in spans])
        starts = torch.tensor([0, *itertools.accumulate(end - start for _, start, end in spans)])
        lengths = torch.tensor([end for _, _, end in spans])
        q = torch.cat([self.q[row][start:end] for row, start, end in spans])
        out = cpu.attend_pages(q, self.store, table, starts, lengths, scale=0.3, **told)
        return out.split(starts.diff().tolist())

    def exact(self, row, window=None, softcap=None):
        T = self.lengths[row]
        far = torch.arange(T)[:, None] - torch.arange(T)
        seen = (far >= 0) & (far < (window or T))
        told = (t[row][None].double() for t in (self.q, self.k, self.v))
        return _attend64(*told, seen[None], 0.3, softcap)[0]


def _attend64(q, keys, values, seen, scale, softcap):
    groups = q.shape[2] // keys.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (keys, values))
    scores = torch.einsum("bsnh,btnh->bnst", q, k) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return torch.einsum("bnst,btnh->bsnh", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("N", "K", "H"), [(4, 1, 32), (6, 2, 12), (3, 3, 80)])
@pytest.mark.parametrize("told", [{}, {"window": 37}, {"softcap": 2.0, "window": 160}])
def test_attention_over_pages_is_float64s(isa, dtype, N, K, H, told):
    one = Pass([1, 190, 40], dtype, N, K, H, size=5)
    with using(isa, 2):
        got = one.run([(row, 0, n) for row, n in enumerate(one.lengths)], **told)
    for row, found in enumerate(got):
        # Float32 over at most 190 keys with scores of size 5: one rounding of the format is more than all of it.
        torch.testing.assert_close(found.double(), one.exact(row, **told), rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("told", [{}, {"window": 37}, {"softcap": 2.0, "window": 160}])
def test_a_query_gives_the_same_in_any_parts_among_any_others_on_any_threads(isa, dtype, told):
    rng = random.Random(str(told))
    one = Pass([5, 333, 150], dtype, N=6, K=2, H=48, seed=1)
    with using(isa, 1):
        alone = [
            torch.cat([one.run([(row, t, t + 1)], **told)[0] for t in range(n)]) for row, n in enumerate(one.lengths)
        ]
    for threads in (1, 2, 3):
        with using(isa, threads):
            for _ in range(3):
                spans = []
                for row in rng.sample(range(3), rng.randint(1, 3)):
                    start, end = sorted(rng.sample(range(one.lengths[row] + 1), 2))
                    spans.append((row, start, end))
                for (row, start, end), found in zip(spans, one.run(spans, **told), strict=True):
                    assert torch.equal(found, alone[row][start:end])


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("window", [None, 1000])
def test_keys_that_threads_share_give_what_one_thread_gives(isa, window):
    # 8 heads of 64 features over 1,500 keys are enough work for threads to share the keys of one query.
    one = Pass([1500], torch.bfloat16, N=8, K=1, H=64, size=16)
    spans = [(0, 1499, 1500)]
    with using(isa, 1):
        expected = one.run(spans, window=window)[0]
        whole = one.run([(0, 1300, 1500)], window=window)[0]
    assert torch.equal(whole[-1:], expected)
    for threads in (2, 5):
        with using(isa, threads):
            assert torch.equal(one.run(spans, window=window)[0], expected)


@pytest.mark.parametrize("dtype", FORMATS)
def test_new_keys_go_to_their_pages_normed_and_turned(dtype):
    one = Pass([9, 6], dtype)
    S, H = 15, one.q[0].shape[-1]
    angles = torch.rand(S, H // 2) * 9
    cos, sin = (f(torch.cat((angles, angles), -1)).to(dtype) for f in (torch.cos, torch.sin))
    weights = [torch.randn(H).to(dtype) for _ in range(3)]
    norms = [cpu.Norm(w.data_ptr(), cpu.FORMATS[dtype], 1e-6, 1.0, 1.0) for w in weights]
    k, v = torch.cat(one.k), torch.cat(one.v)
    spans = [(0, 0, 9), (1, 0, 6)]
    one.store[:] = 0
    got = one.run(spans, new=(k, v, cos, sin), norms=norms)

    def turned(x, weight):
        normed = reference.rms_norm(x, weight, 1e-6)
        return reference.rotate(normed[None], cos[None, :, None], sin[None, :, None])[0]

    q, k = turned(torch.cat(one.q), weights[0]), turned(k, weights[1])
    one.v = list(reference.rms_norm(v, weights[2], 1e-6).split(one.lengths))
    one.q, one.k = list(q.split(one.lengths)), list(k.split(one.lengths))
    for row, found in enumerate(got):
        for t in range(one.lengths[row]):
            at = one.pages[row][t // one.size], t % one.size
            # The norm's float32 mean may be summed in another order: a rounding of the format more or less.
            torch.testing.assert_close(one.store[0][at], one.k[row][t], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            torch.testing.assert_close(one.store[1][at], one.v[row][t], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        # A score's sum of products of tens is off by as many times float32's eps, and its weight by the same share.
        far = max(8 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(found.double(), one.exact(row), rtol=far, atol=far)


def test_rows_that_end_behind_their_pages_are_refused():
    one = Pass([9], torch.float32)
    one.q = [torch.cat((one.q[0], one.q[0]))]
    with pytest.raises(AssertionError, match="end within their pages"):
        one.run([(0, 0, 18)])
