"""The attention kernels equal their plain form. Run by test_interpreted.py, in Triton's interpreter.

Rotated keys and values are bit-equal in the cache. The output may be off by how the kernel rounds the weights of the
softmax (to the dtype before they meet the values, as every flash attention does) and by one rounding of the result.
"""

import interpreting  # noqa: F401  before triton
import pytest
import torch

from gemmakit.pytorch.kernels import reference
from gemmakit.pytorch.kernels.triton import launch, tuning

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Case:
    """A cache with `held` keys, S new positions, and what plain torch makes of them."""

    def __init__(self, B, S, N, K, H, held, dtype, rows_of_tables=1, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.B, self.S, self.N, self.K, self.H, self.held, self.dtype = B, S, N, K, H, held, dtype
        self.q, self.k, self.v = (torch.randn(B, S, n * H, generator=g).to(dtype) for n in (N, K, K))
        angle = torch.rand(rows_of_tables, 1, S, H // 2, generator=g) * 7
        angle = torch.cat((angle, angle), -1)
        self.tables = angle.cos().to(dtype), angle.sin().to(dtype)
        self.capacity = held + S + 5
        # What no one may read is not a number.
        self.keys, self.values = (torch.full((B, K, self.capacity, H), torch.nan, dtype=dtype) for _ in "kv")
        self.keys[:, :, :held] = torch.randn(B, K, held, H, generator=g).to(dtype)
        self.values[:, :, :held] = torch.randn(B, K, held, H, generator=g).to(dtype)

    def run(self, placed=False, **options):
        start = 0 if placed else self.held
        places = torch.arange(self.held, self.held + self.S) if placed else None
        most = self.capacity if placed else self.held
        self.room = launch.Room(self.keys.clone(), self.values.clone(), start, places, most=most)
        return launch.attend(self.q, self.k, self.v, self.tables, self.room, self.H, self.H**-0.5, **options)

    def expected(self, seen=None):
        B, S, H, T = self.B, self.S, self.H, self.held + self.S
        cos, sin = (t.transpose(1, 2) for t in self.tables)
        q, k = (reference.rotate(x.view(B, S, -1, H), cos, sin) for x in (self.q, self.k))
        self.all_keys = torch.cat((self.keys[:, :, : self.held], k.transpose(1, 2)), 2)
        self.all_values = torch.cat((self.values[:, :, : self.held], self.v.view(B, S, -1, H).transpose(1, 2)), 2)
        seen = torch.ones(1, S, T, dtype=torch.bool) if seen is None else seen[..., :T]
        out = reference.attend(q, self.all_keys.transpose(1, 2), self.all_values.transpose(1, 2), seen, H**-0.5)
        return out.reshape(B, S, -1)

    def check(self, placed=False, seen=None, **options):
        y, expected = self.run(placed, **options), self.expected(seen)
        T = self.held + self.S
        assert torch.equal(self.room.keys[:, :, :T], self.all_keys)
        assert torch.equal(self.room.values[:, :, :T], self.all_values)
        assert self.room.keys[:, :, T:].isnan().all(), "written behind the new positions"
        assert y.dtype == self.dtype
        # A rounded weight is off by eps / 2 of itself, and the weights sum to one.
        eps = torch.finfo(self.dtype).eps
        allowed = eps * self.all_values.abs().max().float() + (2e-6 if self.dtype == torch.float32 else 0.0)
        assert (y.float() - expected.float()).abs().max() <= allowed


@pytest.mark.parametrize("held", [0, 16, 299])
@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_a_step_equals_the_reference(K, B, held):
    """Contexts of 1, 17 and 300 keys; multi-query, grouped, multi-head."""
    Case(B, 1, 4, K, 64, held, torch.bfloat16).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [12, 64, 80, 256])
def test_every_head_size_and_dtype(H, dtype):
    Case(2, 1, 4, 2, H, 70, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_place_may_be_known_to_the_device_alone(dtype):
    """As in a captured graph: a buffer of which most is not written yet."""
    case = Case(2, 1, 8, 1, 64, 130, dtype)
    case.check(placed=True)
    assert torch.equal(case.run(placed=True), case.run(placed=True))


def test_one_launch_serves_every_length():
    """The same grid and constants, lengths from 0 to the whole buffer: all that differs is a number on the device."""
    long = Case(1, 1, 4, 1, 64, 300, torch.float32)
    for held in (0, 1, 31, 32, 33, 200):
        case = Case(1, 1, 4, 1, 64, held, torch.float32, seed=held)
        keys, values = (torch.full_like(long.keys, torch.nan) for _ in "kv")
        keys[:, :, :held], values[:, :, :held] = case.keys[:, :, :held], case.values[:, :, :held]
        case.keys, case.values, case.capacity = keys, values, long.capacity
        case.check(placed=True)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_padding_mask_hides_keys(rows):
    mask = torch.rand(rows, 1, 1, 105, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[..., 99] = True
    Case(3, 1, 4, 2, 64, 99, torch.float32).check(mask=mask, seen=mask[:, 0])


def test_whole_tiles_that_are_hidden_give_no_nan():
    mask = torch.zeros(1, 1, 1, 205, dtype=torch.bool)
    mask[..., 150] = True
    Case(2, 1, 4, 1, 64, 199, torch.float32).check(mask=mask, seen=mask[:, 0])


@pytest.mark.parametrize("held", [0, 40])
def test_blind_queries_give_zeros(held):
    """masks.Visibility: a blind query's row of the mask is all True, and its output is replaced."""
    blind = torch.tensor([False, True, False]).view(3, 1, 1, 1)
    seen = torch.ones(3, 1, held + 1, dtype=torch.bool) & ~blind[:, 0]
    mask = torch.ones(3, 1, 1, held + 1, dtype=torch.bool)
    Case(3, 1, 4, 2, 64, held, torch.float32).check(mask=mask, blind=blind, seen=seen)


@pytest.mark.parametrize("placed", [False, True])
def test_several_positions_see_what_came_before(placed):
    """With a mask, a query by key; 8 positions of 8 heads take two blocks of rows, of which one writes."""
    S, held = 8, 50
    mask = torch.arange(held + S + 5) <= torch.arange(held, held + S)[:, None]
    Case(1, S, 8, 1, 64, held, torch.float32).check(placed, mask=mask[None, None], seen=mask[None])


@pytest.mark.parametrize("causal", [False, True])
def test_a_first_call_may_be_causal_or_not(causal):
    seen = torch.ones(1, 6, 6, dtype=torch.bool)
    Case(2, 6, 4, 2, 64, 0, torch.float32).check(causal=causal, seen=seen.tril() if causal else seen)


def test_each_row_may_have_its_own_position():
    Case(3, 2, 4, 2, 64, 20, torch.float32, rows_of_tables=3).check(
        mask=(m := torch.rand(3, 1, 2, 27, generator=torch.Generator().manual_seed(1)) > 0.3), seen=m[:, 0]
    )


@pytest.mark.parametrize("S", [1, 3])
def test_pages_are_read_and_written_where_they_lie(S):
    """Rows of different lengths over shuffled pages; pages of others, and the page of zeros, stay as they are."""
    B, N, K, H, size = (3 if S == 1 else 1), 4, 2, 64, 16
    held = [0, 33, 150][-B:]
    store = torch.randn(2, 40, size, K, H, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    table = order[: B * 12].view(B, 12)
    before = store.clone()
    cases = [Case(1, S, N, K, H, n, torch.float32, seed=n) for n in held]
    for b, case in enumerate(cases):
        flat = store[:, table[b]].flatten(1, 2)[:, : case.held].permute(0, 2, 1, 3)
        case.keys[0, :, : case.held], case.values[0, :, : case.held] = flat[0], flat[1]
        case.tables = cases[0].tables
    q, k, v = (torch.cat([getattr(c, n) for c in cases]) for n in "qkv")
    lengths = torch.tensor(held) + S
    mask = None if S == 1 else (torch.arange(held[0] + S) <= torch.arange(held[0], held[0] + S)[:, None])[None, None]
    room = launch.Room(store[0], store[1], places=lengths, table=table, most=12 * size)
    y = launch.attend(q, k, v, cases[0].tables, room, H, H**-0.5, mask=mask)
    for b, case in enumerate(cases):
        expected = case.expected(None if mask is None else mask[0])
        assert (y[b] - expected[0]).abs().max() < 2e-6
        places = torch.arange(case.held, case.held + S)
        where = table[b, places // size], places % size
        new = torch.stack((case.all_keys, case.all_values))[:, 0, :, case.held :].transpose(1, 2)
        assert torch.equal(store[:, where[0], where[1]], new)
        store[:, where[0], where[1]] = before[:, where[0], where[1]]
    assert torch.equal(store, before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("held", [0, 16, 299, 700])
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_a_step_over_a_grid(B, H, K, held, placed, dtype):
    Case(B, 1, 8, K, H, held, dtype).check(placed)


@pytest.mark.parametrize(
    ("heads", "keys", "expected"), [(1, 8192, 64), (1, 1, 1), (1, 100, 4), (16, 8192, 16), (5, 8192, 32), (999, 99, 1)]
)
def test_splits_fill_the_machine_and_no_more(heads, keys, expected):
    assert tuning.splits(256, heads, 32, keys) == expected
