"""Under `batch_invariant` a token's results are equal to the bit whatever is computed with it, and however it comes."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import FORMATS, runnable, using
from packed_weights import SCHEMES, random_packed
from seam_tools import native, quantized
from test_seams_of_the_family import model_of
from tiny_gemma import tiny

from gemmakit.pytorch.cache.paged import PagedCache, Span
from gemmakit.pytorch.kernels import batch_invariant, is_batch_invariant, linear, linear_packed

PAGE = 4
MEMBERS = ["gemma", "gemma2", "gemma3_text", "vaultgemma"]
WEIGHTS = {"plain": None, "int8": (8, None), "int8-32": (8, 32), "int4-32": (4, 32)}
kinds = st.sampled_from([*FORMATS, *itertools.product(SCHEMES, (8, 16))])


def weight(kind, O, I, seed):
    """A plain weight of a dtype, or a packed one whose activations have so many bits."""
    if isinstance(kind, torch.dtype):
        return torch.randn(O, I, generator=torch.Generator().manual_seed(seed)).to(kind)
    return random_packed(kind[0], O, I, seed)._replace(activation_bits=kind[1])


def product(x, w, bias):
    with batch_invariant(), torch.no_grad():
        return linear(x, w, bias) if isinstance(w, torch.Tensor) else linear_packed(x, w, bias)


@native
@pytest.mark.parametrize("isa", runnable())
@settings(max_examples=60, deadline=None)
@given(
    kind=kinds,
    sizes=st.tuples(st.integers(1, 70), st.sampled_from([1, 31, 64, 257, 544, 1056])),
    dtype=st.sampled_from(FORMATS),
    picked=st.lists(st.integers(0, 39), min_size=1, max_size=40),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(isa, kind, sizes, dtype, picked, threads, seed):
    (O, I), dtype = sizes, kind if isinstance(kind, torch.dtype) else dtype
    w, bias = weight(kind, O, I, seed), torch.randn(O).to(dtype)
    x = torch.randn(40, I).to(dtype)
    with using(isa, 1):
        alone = torch.cat([product(row, w, bias) for row in x.split(1)])
    with using(isa, threads):
        assert torch.equal(product(x[picked], w, bias), alone[picked])


@native
@pytest.mark.parametrize("kind", [torch.bfloat16, ("int8", 8), ("int4-32", 8), ("int4-128", 16)])
def test_thousands_of_rows_give_what_each_gives_alone(kind):
    # A prompt is taken so many rows at a time: fewer where each is long.
    for outputs, inputs, rows in ((70, 96, 2100), (6, 16400, 200)):
        w = weight(kind, outputs, inputs, 0)
        x = torch.randn(rows, inputs).bfloat16()
        whole = product(x, w, None)
        for i in {0, 65, 66, 131, 199, rows // 2 - 27, rows // 2 - 26, rows - 1}:
            assert torch.equal(whole[i : i + 1], product(x[i : i + 1], w, None)), (i, inputs)


def member(name, weights="plain", dtype=torch.float32):
    model = tiny(hidden_size=64) if name == "gemma" else model_of(name, hidden_size=64)
    return (model if WEIGHTS[weights] is None else quantized(model, *WEIGHTS[weights])).to(dtype)


class Texts:
    """Texts over the pages of one cache, run in any parts; what each token gave is kept."""

    def __init__(self, model, texts, order=None):
        self.model, self.texts = model, texts
        needed = [-(-len(text) // PAGE) for text in texts]
        free = iter(order or range(1, sum(needed) + 1))
        self.pages = [[next(free) for _ in range(count)] for count in needed]
        self.cache = PagedCache(model.config, sum(needed), PAGE, model.dtype)
        self.done = [0] * len(texts)
        self.logits = [[] for _ in texts]

    @torch.no_grad()
    def run(self, parts):
        """One packed pass: (text, how many tokens) after one another."""
        spans = [Span(self.pages[i], self.done[i], self.done[i] + count) for i, count in parts]
        ids = [t for (i, _), s in zip(parts, spans, strict=True) for t in self.texts[i][s.start : s.end]]
        positions = self.cache.place(spans, packed=True).positions
        with batch_invariant():
            out = self.model(torch.tensor([ids]), position_ids=positions, past_key_values=self.cache)
        for (i, count), logits in zip(parts, out.logits[0].split([count for _, count in parts]), strict=True):
            self.done[i] += count
            self.logits[i].append(logits)

    def run_all(self, rng):
        """In random parts of random lengths, several texts a pass."""
        while left := [i for i, text in enumerate(self.texts) if self.done[i] < len(text)]:
            picked = rng.sample(left, rng.randint(1, len(left)))
            self.run([(i, rng.choice([1, rng.randint(1, len(self.texts[i]) - self.done[i])])) for i in picked])
        return self.results()

    def results(self):
        return [torch.cat(logits) for logits in self.logits]


def alone(model, texts):
    """Each text by itself, in one pass."""
    found = []
    for text in texts:
        one = Texts(model, [text])
        one.run([(0, len(text))])
        found += one.results()
    return found


def check(model, seed, rounds=2):
    rng = random.Random(seed)
    texts = [[rng.randrange(130) for _ in range(length)] for length in (1, 9, 33)]
    expected = alone(model, texts)
    for _ in range(rounds):
        order = list(range(1, sum(-(-len(text) // PAGE) for text in texts) + 1))
        rng.shuffle(order)
        for got, wanted in zip(Texts(model, texts, order).run_all(rng), expected, strict=True):
            assert torch.equal(got, wanted)


@native
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MEMBERS)
def test_tokens_give_the_same_logits_in_any_parts_among_any_others(name, weights):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        check(member(name, weights, dtype), seed)


@native
@pytest.mark.parametrize(("name", "weights"), [("gemma", "plain"), ("gemma3_text", "int8"), ("gemma2", "int4-32")])
def test_the_same_on_any_number_of_threads(name, weights):
    model = member(name, weights, torch.bfloat16)
    rng = random.Random(name)
    texts = [[rng.randrange(130) for _ in range(length)] for length in (300, 41, 7)]
    with using(None, 1):
        expected = alone(model, texts)
    for threads in (2, 3):
        with using(None, threads):
            for got, wanted in zip(Texts(model, texts).run_all(rng), expected, strict=True):
                assert torch.equal(got, wanted)


@native
def test_modules_that_are_called_one_by_one_give_the_same():
    model = member("gemma3_text", dtype=torch.bfloat16)
    torch.nn.Module.register_forward_hook(model.model.layers[0].mlp, lambda *_: None)
    check(model, 0, rounds=1)


@native
@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_the_same_in_float16_and_with_activations_of_16_bits(name):
    check(member(name, dtype=torch.float16), 0)
    model = member(name, "int4-32", torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "activation_bits"):
            module.activation_bits = 16
    check(model, 1)


@native
def test_a_text_that_takes_over_pages_of_another_gives_what_it_gives_afresh():
    model = member("gemma3_text", dtype=torch.bfloat16)
    rng = random.Random(0)
    first = [rng.randrange(130) for _ in range(21)]
    second = [*first[:12], *(rng.randrange(130) for _ in range(9))]
    texts = Texts(model, [first, second])
    texts.run([(0, 14)])
    for _ in range(7):  # its pages are filled as a prompt, then by decoding
        texts.run([(0, 1)])
    texts.pages[1][:3], texts.done[1] = texts.pages[0][:3], 12
    texts.run([(1, 9)])
    assert torch.equal(texts.results()[1], alone(model, [second])[0][12:])


def test_the_context_ends_where_it_ends_and_outside_nothing_changes():
    assert not is_batch_invariant()

    def inside() -> None:
        with batch_invariant():
            assert is_batch_invariant()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        inside()
    assert not is_batch_invariant()
    packed, x = random_packed("int8", 64, 64), torch.randn(40, 64)
    with torch.no_grad():
        before = linear_packed(x, packed)
        product(x, packed, None)
        assert torch.equal(linear_packed(x, packed), before)
