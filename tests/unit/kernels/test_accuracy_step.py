"""RMSNorm, activations, rope, softmax and attention of the native decoding step against float64.

Every instruction set that was compiled and runs here; ragged sizes, unaligned memory, one and two threads, extremes.
u = 2^-24 is half a unit of float32's last place, in which everything is computed; h is that of the stored format.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import FORMATS, runnable

import gemmakit.native
from gemmakit.native.ids import Activation
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.cpu import Attention
from gemmakit.pytorch.kernels.reference import rotate
from gemmakit.pytorch.layers import GemmaRMSNorm

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.decision().why}")

SETS = runnable()
u = 2.0**-24


@pytest.fixture(params=SETS, autouse=True)
def isa(request):
    assert gemmakit.native.use_instruction_set(request.param)
    yield request.param
    gemmakit.native.use_instruction_set(None)


def half_unit(dtype):
    return torch.finfo(dtype).eps / 2


def floor(dtype):
    """Half the distance between the smallest numbers of a format: what rounding moves near zero."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2


def shifted(t):
    """The same numbers one place further, so that no vector is aligned."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def normal(*shape, dtype=torch.float32, seed=0, size=1.0):
    return shifted((torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype))


def native_norm(w, eps=1e-6, gain=1.0):
    return cpu.Norm(w.data_ptr(), cpu.FORMATS[w.dtype], eps, gain, 1.0)


def norm(x, w, eps, residual=None, gain=1.0):
    y, made = shifted(torch.zeros_like(x)), (cpu.Norm * 1)(native_norm(w, eps, gain))
    pointers = x.data_ptr(), len(x), x.shape[1], made, None if residual is None else residual.data_ptr(), y.data_ptr()
    assert cpu.library().gemmakit_rms_norm(cpu.FORMATS[x.dtype], *pointers, 2) == 0
    return y


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64, 130, 2051])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_rms_norm_is_float64s_rounded_once(dtype, width, size):
    for kind in FORMATS:
        x, w = normal(3, width, dtype=dtype, size=size), normal(width, dtype=kind, seed=1)
        wide = x.double()
        exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w.double())
        # Sums of squares lose u an addition, of which a chain has width / 16 + 8, and the root halves that; then the
        # division, the root, the two products and 1 + w; then the format. 1 + w may cancel, so its u is of 1 + |w|.
        lost = (width / 32 + 10) * u * wide.abs() / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w.abs())
        room = exact.abs() * half_unit(dtype) + lost + floor(dtype)
        assert ((norm(x, w, 1e-6).double() - exact).abs() <= room).all()


def test_rms_norm_of_extremes_is_the_modules():
    # Squares that overflow make the factor zero; those that vanish leave eps; NaN and infinity make their row NaN.
    rows = [[1e30, -1e30, 1.0], [1e-40, -1e-42, 0.0], [float("nan"), 1.0, 1.0], [float("inf"), 1.0, 1.0]]
    x = torch.tensor(rows)
    module = GemmaRMSNorm(3)
    expected = module(x).detach()
    got = norm(x, module.weight.detach(), module.eps)
    assert torch.equal(got.isnan(), expected.isnan())
    finite = ~expected.isnan()
    # One unit of the last place for another order, one for another root.
    assert ((got - expected)[finite].abs() <= 4 * u * expected[finite].abs() + 1e-44).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [1, 33, 640])
def test_a_norm_that_is_added_rounds_once_more(dtype, width):
    """A power of two as gain moves no digit but where float16 ends: there both are rounded to the same steps."""
    x, w, residual = (normal(n, width, dtype=dtype, seed=i) for i, n in enumerate((3, 1, 3)))
    alone = norm(x, w[0], 1e-6)
    assert torch.equal(norm(x, w[0], 1e-6, residual), residual + alone)
    scaled = norm(x, w[0], 1e-6, gain=2.0**-7)
    assert torch.equal(scaled[alone.abs() > 0.1], (alone * 2.0**-7)[alone.abs() > 0.1])
    assert torch.equal(norm(x, w[0], 1e-6, residual, 2.0**-7), residual + scaled)


def test_a_norm_in_an_unknown_format_is_refused():
    x, wrong = torch.ones(1, 8), (cpu.Norm * 1)(cpu.Norm(torch.ones(8).data_ptr(), 3, 1e-6, 1.0))
    assert cpu.library().gemmakit_rms_norm(2, x.data_ptr(), 1, 8, wrong, None, x.data_ptr(), 1) == 1


def gate(act, g, up, threads):
    y = shifted(torch.zeros_like(g))
    pointers = g.data_ptr(), up.data_ptr(), y.data_ptr()
    assert cpu.library().gemmakit_gated(cpu.FORMATS[g.dtype], act, *pointers, g.numel(), threads) == 0
    return y


def gelu(x):
    inner = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x * inner.sigmoid(), inner


ACTIVATIONS = {
    "gelu_tanh": (Activation.GELU_TANH, gelu),
    "silu": (Activation.SILU, lambda x: (F.silu(x), x)),
    "relu": (Activation.RELU, lambda x: (F.relu(x), torch.zeros_like(x))),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 40_001])
def test_activations_times_up_are_float64s(dtype, name, n):
    number, exact_form = ACTIVATIONS[name]
    g, up = normal(n, dtype=dtype, size=5), normal(n, dtype=dtype, seed=1)
    value, exponent = exact_form(g.double())
    exact = value * up.double()
    # The exponent is off by 4 u of itself, which is so much of the exponential; six roundings more; then the format
    # twice, after the activation and after the product. e^-x leaves float32 at x = 88, where less than 1e-36 is left.
    share = (4 * exponent.abs() + 8) * u + 2 * half_unit(dtype) * (1 + half_unit(dtype))
    room = exact.abs() * share + (floor(dtype) + 1e-36) * (up.double().abs() + 1)
    for threads in (1, 2):
        assert ((gate(number, g, up, threads).double() - exact).abs() <= room).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_the_ends(name):
    # A module gives NaN for -inf (0 * -inf) but relu; what is NaN stays NaN.
    x = torch.tensor([0.0, -0.0, 1e-40, 1e30, float("inf"), float("nan"), -1e30, -200.0, -90.0, 90.0])
    got = gate(ACTIVATIONS[name][0], x, torch.ones_like(x), 1)
    expected = torch.tensor([0.0, 0.0, 1e-40, 1e30, float("inf"), float("nan"), 0.0, 0.0, 0.0, 90.0])
    if name != "relu":
        expected[2] /= 2
    torch.testing.assert_close(got, expected, rtol=2 * u, atol=1e-36, equal_nan=True)


class Step:
    """One call of the attention kernel: B rows of S new positions behind `past` others."""

    def __init__(self, dtype, B=1, S=1, N=4, K=2, H=32, past=5, spare=3, size=1.0, tables=1):
        self.dtype, self.scale, self.past, self.S = dtype, H**-0.5, past, S
        self.q = normal(B, S, N * H, dtype=dtype, seed=1, size=size)
        self.k, self.v = (normal(B, S, K * H, dtype=dtype, seed=i) for i in (2, 3))
        self.keys, self.values = (normal(B, K, past + S + spare, H, dtype=dtype, seed=i) for i in (4, 5))
        angles = torch.rand(tables, S, H // 2, generator=torch.Generator().manual_seed(6)) * 100
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = (shifted(f(angles).to(dtype)) for f in (torch.cos, torch.sin))
        self.before = self.keys.clone(), self.values.clone()
        self.mask = self.blind = self.softcap = self.q_norm = self.k_norm = self.v_norm = None
        self.first = 0  # key that is seen
        self.without_keys = False

    def run(self, threads=1, causal=False):
        B, S, width = self.q.shape
        K, capacity, H = self.keys.shape[1:]
        y = shifted(torch.zeros_like(self.q))
        masks = [t.data_ptr() if t is not None else None for t in (self.mask, self.blind)]
        steps = [s for t in (self.mask, self.blind) for s in ((0, 0) if t is None else (t.stride(0), t.stride(1)))]
        tensors = (self.q, self.k, self.v, self.cos, self.sin, self.keys, self.values, y)
        given = [t.data_ptr() for t in tensors]
        given[1:3] = [None, None] if self.without_keys else given[1:3]
        norms = [cpu.Norm() if w is None else native_norm(w) for w in (self.q_norm, self.k_norm, self.v_norm)]
        call = Attention(B, S, width // H, K, H, self.first, self.past + S, self.past, capacity,
                         S * H if len(self.cos) > 1 else 0, *steps, *given, *masks, *norms,
                         cpu.FORMATS[self.dtype], causal, threads, self.scale, self.softcap or 0.0)  # fmt: skip
        assert cpu.library().gemmakit_attend(ctypes.byref(call)) == 0
        return y

    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.keys.shape[3]).transpose(1, 2)

    def turned(self, x, w=None):
        x = x if w is None else norm(x.reshape(-1, self.keys.shape[3]), w, 1e-6).view(x.shape)
        return rotate(self.heads(x), self.cos[:, None], self.sin[:, None])

    def seen(self, causal):
        T = self.past + self.S
        seen = torch.ones(len(self.q), self.S, T - self.first, dtype=torch.bool)
        seen = F.pad(seen if self.mask is None else self.mask.bool(), (self.first, 0))
        return seen & torch.ones(self.S, T, dtype=torch.bool).tril(self.past) if causal else seen

    def exact(self, causal=False):
        """Attention in float64 over what the cache now holds, and how far a float32 one may be from it."""
        T, G = self.past + self.S, self.q.shape[2] // self.k.shape[2]
        q, keys, values = (
            t.double() for t in (self.turned(self.q, self.q_norm), self.keys[:, :, :T], self.values[:, :, :T])
        )
        keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
        seen = self.seen(causal)[:, None]
        scores = q @ keys.mT * self.scale
        scores = scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out = weights @ values
        # A product of H terms is off by H u of their absolute sum, the scaled score by u more; an exponent's error is
        # that share of its weight. The sums over T are split: 160 additions in a chain, and 16 pieces to put together.
        # A cap is nowhere steeper than 1, and off by 12 u of what it gives itself.
        more = 4 if self.softcap is None else 16
        sizes = (q.abs() @ keys.abs().mT * self.scale).masked_fill(~seen, 0).amax(-1, keepdim=True)
        off = sizes * (q.shape[-1] + more) * u
        mixed = weights @ values.abs()
        room = 2 * off * mixed + (T / 4 + 180) * u * mixed + out.abs() * half_unit(self.dtype) + floor(self.dtype)
        return out, room

    def check(self, threads=1, causal=False):
        got = self.heads(self.run(threads, causal)).double()
        out, room = self.exact(causal)
        assert ((got - out).abs() <= room).all(), float(((got - out).abs() / room).max())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("H", [2, 12, 16, 30, 64, 80, 256])
def test_new_keys_are_turned_as_the_module_turns_them_and_others_stay(dtype, H):
    step = Step(dtype, B=2, S=3, K=2, H=H, tables=2)
    step.run()
    past, end = step.past, step.past + step.S
    keys, values = (t.clone() for t in step.before)
    keys[:, :, past:end], values[:, :, past:end] = step.turned(step.k), step.heads(step.v)
    assert torch.equal(step.keys, keys)
    assert torch.equal(step.values, values)
    x, half = step.heads(step.k).double(), H // 2
    cos, sin = step.cos[:, None].double(), step.sin[:, None].double()
    other = torch.cat((-x[..., half:], x[..., :half]), -1)
    exact = x * cos + other * sin
    # Each product is rounded to the format, then the sum: 1 + h of each.
    h = half_unit(dtype)
    room = ((x * cos).abs() + (other * sin).abs()) * h * (1 + h) + exact.abs() * h + 3 * floor(dtype)
    assert ((step.keys[:, :, past:end].double() - exact).abs() <= room * 1.01).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(4, 1), (8, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("H", [2, 12, 16, 48, 64, 256, 512])
def test_attention_is_float64s(dtype, N, K, H):
    for B, S, past in ((1, 1, 0), (1, 1, 16), (2, 1, 299), (2, 3, 31), (1, 8, 130)):
        for threads in (1, 2):
            Step(dtype, B=B, S=S, N=N, K=K, H=H, past=past, tables=B).check(threads, causal=S > 1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("H", [2, 30, 128, 256])
def test_queries_and_keys_are_normed_head_by_head_before_they_turn(dtype, kind, H):
    for names in (("q_norm", "k_norm"), ("q_norm",), ("k_norm",)):
        step = Step(dtype, B=2, S=3, K=2, H=H, tables=2)
        for i, name in enumerate(names):
            setattr(step, name, normal(H, dtype=kind, seed=8 + i))
        step.check(causal=True)
        start, end = step.past, step.past + step.S
        assert torch.equal(step.keys[:, :, start:end], step.turned(step.k, step.k_norm))
        assert torch.equal(step.values[:, :, start:end], step.heads(step.v))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("H", [2, 30, 512])
def test_values_are_normed_where_there_is_a_norm(dtype, kind, H):
    step = Step(dtype, B=2, S=3, K=2, H=H, tables=2)
    step.v_norm = normal(H, dtype=kind, seed=8)
    step.run(causal=True)
    rows = norm(step.v.reshape(-1, H), step.v_norm, 1e-6).view(step.v.shape)
    assert torch.equal(step.values[:, :, step.past : step.past + step.S], step.heads(rows))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("past", [0, 40])
def test_queries_alone_see_the_keys_that_are_there(dtype, past):
    step = Step(dtype, B=2, S=3, K=2, H=64, past=past, tables=2)
    step.q_norm = normal(64, dtype=dtype, seed=8)
    whole = step.run(causal=True)
    there = step.keys.clone(), step.values.clone()
    step.without_keys = True
    assert torch.equal(step.run(threads=2, causal=True), whole)
    assert torch.equal(step.keys, there[0])
    assert torch.equal(step.values, there[1])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("softcap", [1.0, 50.0])
def test_capped_scores_are_float64s(dtype, softcap):
    # From scores that a cap leaves as they are, to such as it bends, to such as all meet it.
    for size in (1e-3, 1.0, 30.0, 1e4):
        for B, S, past in ((1, 1, 0), (2, 1, 299), (2, 3, 31)):
            step = Step(dtype, B=B, S=S, H=64, past=past, size=size)
            step.softcap = softcap
            step.check(threads=2, causal=S > 1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_window_reads_the_last_keys_alone(dtype, threads):
    for past, first, S in ((5, 5, 1), (40, 33, 1), (2100, 1500, 1), (2100, 31, 2)):
        step = Step(dtype, B=2, S=S, N=8, K=1, H=64, past=past)
        step.keys[:, :, :first] = step.values[:, :, :first] = torch.nan
        step.first, step.softcap = first, 30.0
        step.mask = torch.rand(2, S, past + S - first, generator=torch.Generator().manual_seed(7)) < 0.7
        step.mask[..., -S:] = True
        out = step.heads(step.run(threads)).double()
        step.keys[:, :, :first] = step.values[:, :, :first] = 0.0  # what is hidden, for float64 to weigh with nothing
        exact, room = step.exact()
        assert ((out - exact).abs() <= room).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_split_keys_are_put_together(dtype, threads):
    # 8 heads * 64 features * 2,100 keys is enough work to be split over threads and over pieces of keys.
    Step(dtype, N=8, K=1, H=64, past=2099).check(threads)
    Step(dtype, B=2, S=2, N=8, K=2, H=64, past=1500).check(threads, causal=True)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_masks_hide_and_blind_queries_give_zeros(dtype, threads):
    for past in (40, 2000):
        step = Step(dtype, B=3, S=2, N=8, K=1, H=64, past=past, tables=3)
        mask = torch.rand(3, 2, past + 2, generator=torch.Generator().manual_seed(7)) < 0.5
        mask[0, :, : past - 3] = False  # whole blocks that nobody sees
        mask[1, 0] = False
        mask[2, 1] = False
        mask[2, 1, 7] = True  # one key alone
        blind = torch.zeros(3, 2, 1, dtype=torch.bool)
        blind[1, 0] = True
        mask[1, 0] = True  # as the masks module writes it: a blind query sees all and is then made zero
        step.mask, step.blind = mask, blind
        got = step.heads(step.run(threads)).double()
        out, room = step.exact()
        assert torch.equal(got[1, :, 0], torch.zeros_like(got[1, :, 0]))
        there = ~blind[:, None].expand(got.shape)
        assert ((got - out).abs() <= room)[there].all()
        assert (got[2, :, 1] == step.values[2, :, 7].double()).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_huge_scores_choose_one_key_and_tiny_ones_none(dtype):
    Step(dtype, size=300.0, past=200).check()
    step = Step(dtype, size=0.0, past=99)
    got = step.heads(step.run()).double()
    mean = step.values[:, :, :100].double().mean(2, keepdim=True).repeat_interleave(2, 1)
    assert ((got - mean).abs() <= mean.abs() * half_unit(dtype) + 200 * u).all()
    step.keys[:] = torch.finfo(dtype).tiny / 4  # denormal keys
    assert step.run().isfinite().all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_no_number_shows(dtype, threads):
    for bad in (float("nan"), float("inf")):
        step = Step(dtype, N=8, K=1, H=64, past=1200)
        step.keys[0, 0, 700, 3] = bad
        step.q[0, 0, :] = 1.0
        assert step.run(threads).isnan().all()


@pytest.mark.parametrize(
    "field", [{"first": -1}, {"first": 6}, {"start": -1}, {"S": 9}, {"N": 3}, {"H": 31}, {"T": 99}]
)
def test_calls_that_make_no_sense_are_refused(field):
    step = Step(torch.float32, N=4, K=2)
    good = dict(B=1, S=1, N=4, K=2, H=32, T=6, start=5, capacity=9, format=2, threads=1, scale=1.0)
    at = {n: getattr(step, n).data_ptr() for n in ("q", "k", "v", "cos", "sin", "keys", "values")}
    y = torch.empty(4 * 32)
    run = lambda **more: cpu.library().gemmakit_attend(  # noqa: E731
        ctypes.byref(Attention(**{**good, **at, "y": y.data_ptr(), **more}))
    )
    assert run() == 0
    assert run(**field) == 1
