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

    def __init__(self, B, S, N, K, H, held, dtype, rows_of_tables=1, seed=0, size=1.0):
        g = torch.Generator().manual_seed(seed)
        self.B, self.S, self.N, self.K, self.H, self.held, self.dtype = B, S, N, K, H, held, dtype
        self.q, self.k, self.v = (torch.randn(B, S, n * H, generator=g).to(dtype) for n in (N, K, K))
        self.q = self.q * size
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

    def expected(self, seen=None, softcap=None, q_norm=None, k_norm=None):
        B, S, H, T = self.B, self.S, self.H, self.held + self.S
        cos, sin = (t.transpose(1, 2) for t in self.tables)
        q, k = self.q.view(B, S, -1, H), self.k.view(B, S, -1, H)
        q, k = (x if n is None else reference.rms_norm(x, *n) for x, n in ((q, q_norm), (k, k_norm)))
        q, k = (reference.rotate(x, cos, sin) for x in (q, k))
        self.all_keys = torch.cat((self.keys[:, :, : self.held], k.transpose(1, 2)), 2)
        self.all_values = torch.cat((self.values[:, :, : self.held], self.v.view(B, S, -1, H).transpose(1, 2)), 2)
        seen = torch.ones(1, S, T, dtype=torch.bool) if seen is None else seen[..., :T]
        keys, values = (x.transpose(1, 2)[:, -seen.shape[-1] :] for x in (self.all_keys, self.all_values))
        out = reference.attend(q, keys, values, seen, H**-0.5, softcap)
        return out.reshape(B, S, -1)

    def check(self, placed=False, seen=None, **options):
        told = {name: options[name] for name in ("softcap", "q_norm", "k_norm") if name in options}
        y, expected = self.run(placed, **options), self.expected(seen, **told)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("q_norm", "k_norm"), ("q_norm",), ("k_norm",)], ids="-".join)
@pytest.mark.parametrize("H", [12, 128])
def test_heads_are_normed_before_they_turn(H, names, dtype):
    """Keys in the cache are near enough: a number of float32 that fell the other way when it was rounded."""
    g = torch.Generator().manual_seed(9)
    norms = {name: launch.Norm((torch.randn(H, generator=g) * 0.3).to(dtype), 1e-6) for name in names}
    case = Case(2, 2, 4, 2, H, 40, dtype, seed=3)
    seen = torch.ones(1, 2, 42, dtype=torch.bool).tril(40)
    y, expected = case.run(mask=seen[None], **norms), case.expected(seen, **norms)
    new = slice(case.held, case.held + 2)
    eps = torch.finfo(dtype).eps
    moved = (case.room.keys[:, :, new].float() - case.all_keys[:, :, new].float()).abs()
    assert (moved <= 3 * eps * case.all_keys[:, :, new].float().abs().amax(-1, keepdim=True)).all()
    assert torch.equal(case.room.keys[:, :, :40], case.keys[:, :, :40])
    assert (y.float() - expected.float()).abs().max() <= 4 * eps * case.all_values.abs().max().float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0, 1e3])
def test_scores_are_capped_before_the_mask(size, dtype):
    """A query so large that all its scores meet the cap sees all keys alike but the hidden ones."""
    mask = torch.rand(2, 1, 1, 75, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[..., 70] = True
    case = Case(2, 1, 4, 2, 64, 70, dtype, size=size)
    case.check(mask=mask, seen=mask[:, 0], softcap=20.0)


def test_a_cap_is_float64s_over_all_scores():
    """One key after another with one feature: a score is what it is made to be."""
    scores = torch.cat((torch.linspace(-40, 40, 4001), torch.tensor([1e-6, -1e-3, 1e4, -1e4])))
    for score in scores[::97].tolist():
        case = Case(1, 1, 1, 1, 16, 1, torch.float32)
        case.q, case.k, case.keys[..., 0, :] = torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), 0.0
        case.q[..., 0], case.keys[..., 0, 0] = score * 4, 1.0
        case.tables = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)
        case.values[..., 0, :], case.v = 1.0, torch.zeros(1, 1, 16)
        capped = 50.0 * torch.tensor(score, dtype=torch.float64).div(50).tanh()
        # 1e-5 is what a score near the cap may be off by: a few units of 50 in float32.
        assert abs(float(case.run(softcap=50.0)[0, 0, 0]) - float(capped.sigmoid())) <= 1e-5 * float(capped.sigmoid())


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(("held", "last"), [(20, 1), (100, 32), (300, 40), (300, 301), (10, 11)])
def test_a_window_reads_the_last_keys_alone(held, last, placed):
    """What stands before is not a number."""
    case = Case(2, 1, 4, 2, 64, held, torch.float32)
    first = held + 1 - last
    kept = case.keys[:, :, :first].clone(), case.values[:, :, :first].clone()
    case.keys[:, :, :first] = case.values[:, :, :first] = torch.nan
    y = case.run(placed, last=last)
    case.keys[:, :, :first], case.values[:, :, :first] = kept
    expected = case.expected(torch.ones(1, 1, last, dtype=torch.bool))
    assert (y - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("held", [3, 40, 200])
def test_a_window_whose_mask_speaks_of_all_keys_reads_no_more_of_them(held):
    """Where places are known to the device alone, the mask is as wide as the buffer."""
    S, window = 2, 24
    t, place = torch.arange(held + S + 5), torch.arange(held, held + S)[:, None]
    mask = (t <= place) & (t > place - window)
    case = Case(2, S, 4, 2, 64, held, torch.float32)
    expected = case.expected(mask[None])
    case.keys[:, :, : max(held + 1 - window, 0)] = case.values[:, :, : max(held + 1 - window, 0)] = torch.nan
    y = case.run(placed=True, reach=S + window - 1, mask=mask[None, None])
    assert (y - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("placed", [False, True])
def test_several_positions_of_a_window_see_what_their_mask_says(placed):
    """The columns of the mask are the keys that some query sees: S - 1 more than the window."""
    S, held, window = 4, 90, 24
    last = S + window - 1
    t, s = torch.arange(last), torch.arange(S)[:, None]
    mask = (t > s - 1) & (t <= s + window - 1)
    case = Case(2, S, 8, 2, 64, held, torch.float32)
    y = case.run(placed, last=last, mask=mask[None, None])
    assert (y - case.expected(mask[None])).abs().max() <= 2e-6


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
