"""Limits, quality and random models."""

import time

import pytest
import torch
from checkpoints import cached_random, write_random

import gemmakit
from gemmakit.bench.measure import (
    STD,
    best_s,
    divergence,
    held_out,
    limits,
    load,
    matmul_rate,
    pieces,
    random_model,
    read_bandwidth,
    scheme_config,
    size_config,
)
from gemmakit.errors import InputError
from gemmakit.pytorch.quantize import QuantizedLinear

CPU = torch.device("cpu")


def test_limits_are_measured_in_both_dtypes_and_say_how():
    found = limits("cpu", 1, limit_s=0.01, limit_bytes=1 << 16)
    assert found["bandwidth_gb_per_s"] > 0
    assert found["bandwidth_by"] in ("torch sum", "native read")
    assert set(found["matmul_gflop_per_s"]) == {"float32", "bfloat16"}


def test_the_fastest_way_of_reading_counts(monkeypatch):
    times = {"torch sum": 2.0, "native read": 1.0}
    monkeypatch.setattr("gemmakit.bench.measure.cpu.library", lambda: True)
    monkeypatch.setattr("gemmakit.bench.measure.fitting", lambda least, most, *_: most)
    monkeypatch.setattr("gemmakit.bench.measure.best_s", lambda calls, *_: times.popitem()[1])
    assert read_bandwidth(CPU, 1 << 12, 0.0) == ("torch sum", 4096.0)


class Slow:
    """A machine with a clock of its own: so many operations and bytes a second, however fast the real one is."""

    def __init__(self, monkeypatch, rate):
        self.now, self.rate, self.sizes = 0.0, rate, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "mm", self.product)
        monkeypatch.setattr(torch.Tensor, "sum", lambda b: self.spent(b.nbytes))
        monkeypatch.setattr("gemmakit.bench.measure.cpu.library", lambda: None)

    def product(self, a, b):
        self.sizes.append(len(a))
        self.spent(2 * len(a) ** 3)

    def spent(self, work):
        self.now += work / self.rate


@pytest.mark.parametrize("rate", [1e7, 1.7e8, 1e10, 1e11, 1e12])
@pytest.mark.parametrize("limit_s", [0.05, 1.5])
def test_no_limit_takes_longer_than_a_few_times_what_it_was_given(monkeypatch, rate, limit_s):
    """As where bfloat16 is emulated, at 0.17 GFLOP/s: a product of 2048 by 2048 takes 100 seconds there."""
    slow = Slow(monkeypatch, rate)
    assert matmul_rate(CPU, "bfloat16", limit_s) == pytest.approx(rate)
    assert slow.now < 4 * limit_s + 4 * 2 * 64**3 / rate  # the least product takes what it takes
    slow.now = 0.0
    assert read_bandwidth(CPU, 1 << 26, limit_s)[1] == pytest.approx(rate)
    assert slow.now < 4 * limit_s + 4 * (1 << 17) / rate


@pytest.mark.parametrize(("rate", "size"), [(1e12, 2048), (1.7e8, 256)])
def test_products_are_as_large_as_the_time_allows(monkeypatch, rate, size):
    slow = Slow(monkeypatch, rate)
    matmul_rate(CPU, "bfloat16", 1.5)
    assert slow.sizes[-1] == max(slow.sizes) == size


def test_buffers_are_read_in_turn():
    order = []
    best_s([lambda i=i: order.append(i) for i in range(4)], CPU, 0.0)
    assert order == [0, 1, 2, 3] * 2


def test_random_weights_load_in_the_released_layout(tmp_path):
    write_random(tmp_path, size_config("tiny"))
    model = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    weight = model.model.layers[1].mlp.up_proj.weight.float()
    # 30,720 draws: their standard deviation is within 2 % of the true one but once in a million times.
    assert weight.std().item() == pytest.approx(STD, rel=0.02)
    assert not model.model.norm.weight.any()


def test_the_same_seed_writes_the_same_file(tmp_path):
    for name in "ab":
        write_random(tmp_path / name, size_config("tiny"))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_checkpoint_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMAKIT_BENCH_CACHE", str(tmp_path))
    said = []
    assert cached_random("tiny", say=said.append) == cached_random("tiny", say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "int4-g128"])
def test_weights_made_on_the_device_generate(scheme):
    model = random_model(size_config("tiny"), torch.float32, CPU, scheme_config(scheme))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear) == (scheme is not None)
    out = model.generate(torch.tensor([[2, 5, 9]]), max_new_tokens=3, eos_token_id=[])
    assert out.shape == (1, 6)


@pytest.mark.parametrize("call", [lambda: size_config("3b"), lambda: scheme_config("int3")])
def test_sizes_and_schemes_that_there_are_not_name_those_there_are(call):
    with pytest.raises(InputError, match=r"2b|int8"):
        call()


# -- quality -----------------------------------------------------------------------------------------------------------

IDS = list(range(300, 900))


@pytest.fixture(scope="module")
def demo():
    return load(str(gemmakit.demo_model()), dtype="float32")


def test_a_model_has_the_quality_of_itself(demo):
    assert divergence(demo, demo, IDS) == {"perplexity_ratio": 1.0, "top1_agreement": 1.0, "kl_nats": 0.0}


def test_fewer_bits_are_farther_away(demo):
    name = str(gemmakit.demo_model())
    eight, four = (divergence(demo, load(name, dtype="float32", quantize=q), IDS) for q in ("int8", "int4"))
    assert 0 < eight["kl_nats"] < four["kl_nats"]
    assert 1 >= eight["top1_agreement"] > four["top1_agreement"] > 0.5


def test_every_token_is_predicted_once():
    found = list(pieces(IDS))
    assert [token for piece in found for token in piece[1:]] == IDS
    assert {piece[0] for piece in found} == {2}


def test_the_text_is_named():
    name, text = held_out()
    assert name and len(text) > 1000
