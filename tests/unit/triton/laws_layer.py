"""A whole model through the Triton seams equals its modules. Run by test_interpreted.py, in Triton's interpreter."""

import sys
from pathlib import Path

import interpreting  # noqa: F401  before triton
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
import tiny_gemma
from tiny_gemma import far, left_padded, prompts

import gemmakit
from gemmakit.family import KINDS
from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.cache import DynamicCache, StaticCache, WindowCache
from gemmakit.pytorch.cache.paged import PagedCache, Span
from gemmakit.pytorch.fused import cuda, decide
from gemmakit.pytorch.fused.weights import weight_of
from gemmakit.pytorch.kernels import linear, linear_packed, linear_plan, triton
from gemmakit.pytorch.kernels.triton import attention, gemv, launch, rowwise
from gemmakit.pytorch.quantize import rounding
from gemmakit.pytorch.quantize.modules import QuantizedLinear

linear_module = sys.modules[linear.__module__]  # the package has a function of its name
TRITON = {"cpu": cuda.fuse}
# float32 sums in another order; bfloat16: a rounding that falls the other way (2^-8) passes through two layers.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}


def tiny(**changes):
    """Smaller still, with sizes that fill no block: the interpreter takes 10 ms and more for a program of a kernel."""
    sizes = dict(hidden_size=24, intermediate_size=20, head_dim=8, num_hidden_layers=1)
    return tiny_gemma.tiny(**{**sizes, **changes})


WINDOW = 6
CAPS = dict(attn_logit_softcapping=5.0, final_logit_softcapping=30.0)
MEMBERS = {
    "gemma2": CAPS,
    "gemma3_text": {},
    "vaultgemma": CAPS,
    "gemma4_text": dict(
        num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=1, query_pre_attn_scalar=None, global_head_dim=12, attention_k_eq_v=True,
        num_global_key_value_heads=1, hidden_size_per_layer_input=6, vocab_size_per_layer_input=130,
    ),
}  # fmt: skip


def member_of(name):
    """Another member of the family, as small."""
    classes = KINDS[name].classes
    config = getattr(gemmakit, classes["config"])(
        **dict(
            vocab_size=130, hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=64, num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, query_pre_attn_scalar=12,
        ) | MEMBERS[name]
    )  # fmt: skip
    return tiny_gemma.away_from_zero(getattr(gemmakit, classes["causal_lm"])(config)).eval()


@pytest.fixture
def both(monkeypatch):
    """f run through the modules and through the seams."""

    def run(model, f):
        results = []
        for forms in ({}, TRITON):
            monkeypatch.setattr(decide, "fused_layers", forms)
            for layer in model.model.layers:
                layer.__dict__.pop("fusion", None)
            with torch.no_grad():
                results.append(f())
        assert all(type(layer.__dict__["fusion"].form) is cuda.TritonLayer for layer in model.model.layers)
        assert not triton._refused, "a kernel did not start, and the modules took its place"
        return results

    return run


def steps(model, ids, cache, placed=False, mask=None):
    """The logits of a prompt of all but two tokens, by the modules if it is long, and of those two, one by one."""
    n = ids.shape[1] - 2
    out = [model(ids[:, :n], attention_mask=None if mask is None else mask[:, :n], past_key_values=cache).logits]
    for i in range(n, ids.shape[1]):
        m = None if mask is None else mask[:, : i + 1]
        place = torch.tensor([i]) if placed else None
        out.append(
            model(ids[:, i : i + 1], attention_mask=m, past_key_values=cache, cache_position=place).logits[:, -1:]
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize(("K", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (4, torch.float16)], ids=str)
def test_a_model_of_tiny_layers_equals_its_modules(both, K, dtype):
    model, ids = tiny(num_key_value_heads=K, num_hidden_layers=2).to(dtype), prompts(2, 9)
    modules, fused = both(model, lambda: steps(model, ids, DynamicCache()))
    assert far(fused, modules) < TOLERANCE[dtype]


# A norm's offset and who reads whose keys are the same in every dtype, and an interpreted layer takes seconds.
CASES = [(member, dtype) for member in MEMBERS for dtype in TOLERANCE if member != "gemma4_text" or dtype.itemsize == 4]


@pytest.mark.parametrize(("member", "dtype"), CASES, ids=str)
def test_every_member_of_the_family_equals_its_modules(both, started, member, dtype):
    model, ids = member_of(member).to(dtype), prompts(2, 3 * WINDOW)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for padding, cache in ((None, DynamicCache), (mask, DynamicCache), (mask, lambda: WindowCache(model.config))):
        modules, fused = both(model, lambda m=padding, c=cache: steps(model, ids, c(), mask=m))
        assert far(fused, modules) < TOLERANCE[dtype]
    assert started.count("attend") == 3 * 2 * len(model.config.kv_layers()), "attention went through torch"


def test_layers_that_forget_attend_through_the_kernel(both, started):
    model, ids = member_of("gemma3_text"), prompts(2, 3 * WINDOW)
    modules, fused = both(model, lambda: steps(model, ids, WindowCache(model.config)))
    assert far(fused, modules) < TOLERANCE[torch.float32]
    assert started.count("attend") == 4  # two layers, two steps


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_over_caches_that_know_places_on_the_device(both, started, member):
    model, ids = member_of(member), prompts(2, 2 * WINDOW)
    modules, fused = both(model, lambda: steps(model, ids, StaticCache(model.config, max_cache_len=40), placed=True))
    assert far(fused, modules) < TOLERANCE[torch.float32]

    def paged():
        cache = PagedCache(model.config, 4, 16, torch.float32)
        cache.place([Span([2, 1], 0, 2 * WINDOW)])
        model(ids[:1], past_key_values=cache)
        cache.place([Span([2, 1], 2 * WINDOW, 2 * WINDOW + 1)])
        return model(ids[1:, :1], past_key_values=cache).logits

    modules, fused = both(model, paged)
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_rows_of_a_batch_read_the_pages_of_their_windows(both, started):
    model, held = member_of("gemma3_text"), {17: [3, 1, 7, 2, 9], 3: [5], 9: [8, 4, 6]}

    def run():
        cache = PagedCache(model.config, 9, 4, torch.float32)
        for length, pages in held.items():
            cache.place([Span(pages, 0, length)])
            model(prompts(1, length, seed=length), past_key_values=cache)
        where = cache.place([Span(pages, length, length + 1) for length, pages in held.items()])
        positions, masks = where.positions, cache.masks()
        return model(prompts(3, 1), attention_mask=masks, position_ids=positions, past_key_values=cache).logits

    modules, fused = both(model, run)
    assert far(fused, modules) < TOLERANCE[torch.float32]
    assert started.count("attend") >= 2, "attention went through torch"


def test_many_rows_of_a_member_are_normed_and_added_by_a_kernel(both, started):
    model, ids = member_of("gemma3_text"), prompts(9, 3)
    modules, fused = both(model, lambda: model(ids, past_key_values=DynamicCache()).logits)
    assert far(fused, modules) < TOLERANCE[torch.float32]
    assert started == ["norm", "norm", "norm", "gated", "norm"] * 2


def test_a_static_cache_that_is_told_places_on_the_device(both):
    model, ids = tiny(), prompts(2, 10)
    modules, fused = both(model, lambda: steps(model, ids, StaticCache(model.config, max_cache_len=40), placed=True))
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_left_padding_hides_the_same_keys(both):
    model = tiny()
    ids, mask = left_padded([torch.tensor(row) for row in (range(4, 13), [2, 5, 7], [2, 9])], 9)
    modules, fused = both(model, lambda: steps(model, ids, DynamicCache(), mask=mask))
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_several_positions_at_once_and_no_cache(both):
    model, ids = tiny(), prompts(1, 8)
    modules, fused = both(model, lambda: model(ids, use_cache=False).logits)
    assert far(fused, modules) < TOLERANCE[torch.float32]

    def in_two_pieces():
        cache = DynamicCache()
        return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(5, dim=1)], 1)

    again, pieces = both(model, in_two_pieces)
    assert far(pieces, again) < TOLERANCE[torch.float32]
    assert far(pieces, modules) < TOLERANCE[torch.float32]


def test_biases_and_other_activations(both):
    for act in ("gelu_erf", "relu", "silu"):
        model = tiny(attention_bias=True, hidden_act=act)
        modules, fused = both(model, lambda m=model: steps(m, prompts(2, 7), DynamicCache()))
        assert far(fused, modules) < TOLERANCE[torch.float32]


def test_an_activation_of_the_users_own_follows_the_projections(both):
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.sin
    modules, fused = both(model, lambda: steps(model, prompts(2, 8), DynamicCache()))
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_pages_serve_rows_of_different_lengths(both):
    model = tiny()

    def run():
        cache = PagedCache(model.config, 8, 16, torch.float32)
        first, second = [1, 2], [3]
        for pages, ids in ((first, prompts(1, 17)), (second, prompts(1, 5, seed=3))):
            cache.place([Span(pages, 0, ids.shape[1])])
            model(ids, past_key_values=cache)
        where = cache.place([Span(first, 17, 18), Span(second, 5, 6)])
        ids = prompts(2, 1)
        return model(ids, attention_mask=where.mask, position_ids=where.positions, past_key_values=cache).logits

    modules, fused = both(model, run)
    assert far(fused, modules) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("bits", "mixed"), [(8, False), (4, False), (4, True)])
def test_layers_in_8_and_4_bits(both, bits, mixed):
    """mixed: a projection left as it was, so that neither q, k, v nor gate and up have one format."""
    model = tiny(hidden_size=32, intermediate_size=40)
    layer = model.model.layers[0]
    for name, _ in layer.parts().projections():
        parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        if mixed and name in ("k_proj", "up_proj"):
            continue
        module = getattr(parent, name)
        packed = rounding.quantize(module.weight.detach(), bits, 32 if bits == 4 else None, name=name)
        setattr(parent, name, QuantizedLinear(packed, module.bias))
    with torch.no_grad():
        assert (launch.operand(weight_of(layer.mlp.down_proj)).format == WeightFormat.INT4) == (bits == 4)
    modules, fused = both(model, lambda: steps(model, prompts(2, 7), DynamicCache()))
    # The CPU's kernel rounds the inputs to 16 bits in blocks of 32 (2^-16 of the block's largest).
    assert far(fused, modules) < 2e-4


def test_only_attention_that_the_kernel_describes_takes_it(monkeypatch):
    """An additive mask goes through torch, cache and all."""
    model, ids = tiny(), prompts(1, 1)
    monkeypatch.setattr(decide, "fused_layers", TRITON)
    called = []
    monkeypatch.setattr(launch, "attend", lambda *a, **k: called.append(1))
    with torch.no_grad():
        out = model(ids, attention_mask=torch.zeros(1, 1, 1, 1), past_key_values=DynamicCache())
        expected = model(ids, past_key_values=None, attention_mask=torch.zeros(1, 1, 1, 1), output_attentions=True)
    assert not called
    assert far(out.logits, expected.logits) < TOLERANCE[torch.float32]


def test_weights_of_another_dtype_are_refused_in_words():
    layer = tiny().model.layers[0]
    layer.mlp.down_proj.to(torch.bfloat16)
    assert cuda.fuse(layer.parts(), torch.zeros(1, 1, 24)) == (
        "down_proj is in torch.bfloat16 and the activations in torch.float32"
    )
    layer = tiny(attention_bias=True).model.layers[0].to(torch.bfloat16)
    layer.self_attn.k_proj.bias.data = layer.self_attn.k_proj.bias.data.float()
    assert "k_proj is with a bias in torch.float32" in str(
        cuda.fuse(layer.parts(), torch.zeros(1, 1, 24, dtype=torch.bfloat16))
    )
    assert "float64" in str(cuda.fuse(layer.parts(), torch.zeros(1, 1, 24, dtype=torch.float64)))


# -- more rows than the kernels that read weights take ----------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that were started."""
    names = []

    def noting(module, name):
        kernel = getattr(module, name)

        class Noting:
            def __getitem__(self, grid):
                names.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Noting())

    for module, name in ((gemv, "project"), (gemv, "gate_up"), (attention, "attend"), (rowwise, "norm"),
                         (rowwise, "gated")):  # fmt: skip
        noting(module, name)
    return names


@pytest.mark.parametrize("placed", [False, True])
def test_many_rows_of_one_position_read_keys_where_they_lie(both, started, placed):
    model, ids = tiny(), prompts(9, 6)
    cache = (lambda: StaticCache(model.config, max_cache_len=40)) if placed else DynamicCache
    modules, fused = both(model, lambda: steps(model, ids, cache(), placed))
    assert far(fused, modules) < TOLERANCE[torch.float32]
    # The prompt goes through norms and gates, and so do both steps; those attend through the kernel besides.
    assert started.count("attend") == 2 and started.count("norm") == 6 and started.count("gated") == 3
    assert "project" not in started and "gate_up" not in started


def test_many_rows_of_different_lengths_read_their_pages(both, started):
    model, rows = tiny(), 9

    def run():
        cache = PagedCache(model.config, rows, 16, torch.float32)
        for row in range(rows):
            cache.place([Span([1 + row], 0, 2 + row)])
            model(prompts(1, 2 + row, seed=row), past_key_values=cache)
        where = cache.place([Span([1 + row], 2 + row, 3 + row) for row in range(rows)])
        ids = prompts(rows, 1)
        return model(ids, attention_mask=where.mask, position_ids=where.positions, past_key_values=cache).logits

    modules, fused = both(model, run)
    assert far(fused, modules) < TOLERANCE[torch.float32]
    assert started[-3:] == ["attend", "norm", "gated"]


def test_a_long_prompt_goes_through_norms_and_gates_alone(both, started):
    model, ids = tiny(num_key_value_heads=2), prompts(1, 17)
    modules, fused = both(model, lambda: model(ids, past_key_values=DynamicCache()).logits)
    assert far(fused, modules) < TOLERANCE[torch.float32]
    assert started == ["norm", "norm", "gated"]


# -- kernels that do not start -----------------------------------------------------------------------------------------


class Broken:
    """A kernel that this device's compiler refuses."""

    def __getitem__(self, grid):
        def start(*_, **__):
            raise ValueError("out of resource: shared memory")

        return start


@pytest.fixture
def afterwards(monkeypatch):
    monkeypatch.setattr(triton, "_refused", {})


def test_a_norm_that_does_not_start_gives_way_to_its_module(afterwards, monkeypatch):
    model, ids = member_of("gemma3_text"), prompts(2, 4)
    run = lambda: model(ids[:, :4], past_key_values=DynamicCache()).logits  # noqa: E731
    with torch.no_grad():
        monkeypatch.setattr(decide, "fused_layers", {})
        expected = run()
        monkeypatch.setattr(decide, "fused_layers", TRITON)
        for layer in model.model.layers:
            layer.__dict__.pop("fusion", None)
        monkeypatch.setattr(rowwise, "norm", Broken())
        with pytest.warns(UserWarning, match="are not used on cpu.*ValueError: out of resource"):
            assert far(run(), expected) < TOLERANCE[torch.float32]


BREAKABLE = [(gemv, "project", 2), (gemv, "gate_up", 2), (attention, "attend", 2), (attention, "attend", 9),
             (rowwise, "norm", 9), (rowwise, "gated", 9)]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "rows"), BREAKABLE, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("kind", ["dynamic", "static", "told places"])
def test_the_modules_take_the_place_of_a_kernel_that_does_not_start(module, name, rows, kind, afterwards, monkeypatch):
    model, ids = tiny(), prompts(rows, 6)
    monkeypatch.setattr(decide, "fused_layers", {})

    def run():
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
        with torch.no_grad():
            return steps(model, ids, cache, kind == "told places"), cache.get_seq_length()

    expected, length = run()
    monkeypatch.setattr(decide, "fused_layers", TRITON)
    for layer in model.model.layers:
        layer.__dict__.pop("fusion", None)
    monkeypatch.setattr(module, name, Broken())
    with pytest.warns(UserWarning, match="are not used on cpu.*ValueError: out of resource"):
        logits, held = run()
    assert far(logits, expected) < TOLERANCE[torch.float32]
    assert held == length
    assert "one did not start" in triton.decision(torch.device("cpu")).why
    assert run()[1] == length  # and no second warning


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU in the place of a GPU."""
    monkeypatch.setattr(linear_module, "GPU", {"cpu"})
    monkeypatch.setattr(linear_module, "MIN_WEIGHT", 64)
    monkeypatch.setattr(linear_module.cpu, "library", lambda: None)
    ran = []
    kernel = linear_module._linear_rows_on_gpu
    with torch.library._scoped_library("gemmakit", "IMPL") as library:
        library.impl("linear_rows", lambda *a: ran.append(1) or kernel(*a), "CPU", allow_override=True)
        yield ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_head_of_a_step_goes_through_the_kernel(dtype, on_gpu):
    x, weight, bias = torch.randn(2, 4, 24).to(dtype), torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    with torch.no_grad():
        y = linear(x, weight, bias)
    assert on_gpu == [1]
    # One rounding of the result, and one in float32 for each of 25 terms, whatever their order.
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    terms = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    room = torch.finfo(dtype).eps * expected.abs() + 25 * 2.0**-24 * terms
    assert ((y.double() - expected).abs() <= room).all()
    assert str(linear_plan(weight)) == "Triton, without gradients, up to 8 rows"


def test_the_head_goes_through_torch_otherwise(on_gpu, afterwards, monkeypatch):
    weight = torch.randn(40, 24)
    x = torch.randn(8, 24)
    assert linear(x, weight).shape == (8, 40)  # with gradients
    with torch.no_grad():
        linear(torch.randn(9, 24), weight)
        linear(x, torch.randn(24, 40).T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear(x, weight)
        monkeypatch.setattr(linear_module, "MIN_WEIGHT", 1000)
        linear(x, weight)
        assert "960 weights are few" in linear_plan(weight).why
        monkeypatch.setattr(linear_module, "MIN_WEIGHT", 64)
        assert on_gpu == []
        monkeypatch.setattr(gemv, "project", Broken())
        with pytest.warns(UserWarning, match="are not used"):
            y = linear(x, weight)
        assert torch.equal(y, torch.nn.functional.linear(x, weight)) and on_gpu == [1]
        linear(x, weight)
    assert on_gpu == [1]
    assert "one did not start" in linear_plan(weight).why


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_weight_is_said_to_be_read_by_triton_where_it_is(bits, on_gpu, started, afterwards, monkeypatch):
    packed = rounding.quantize(torch.randn(24, 64), bits, 32)
    with torch.no_grad():
        linear_packed(torch.randn(2, 64), packed)
        assert started == ["project"]
        assert str(linear_plan(packed)) == f"Triton int{bits}, up to 32 rows; beyond that expanded"
        monkeypatch.setenv("GEMMAKIT_TRITON", "0")
        linear_packed(torch.randn(2, 64), packed)
        assert started == ["project"]
        assert str(linear_plan(packed)) == f"torch on cpu, int{bits} expanded (Triton kernels: GEMMAKIT_TRITON is 0)"
